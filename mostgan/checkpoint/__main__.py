"""python -m mostgan.checkpoint import | export | show"""

import dataclasses
import json
import shutil
import uuid
from pathlib import Path
from typing import Literal

import tyro

from mostgan.checkpoint import (
    find,
    fsync,
    load,
    load_discriminator,
    read_file,
    write_json,
    write_tensors,
)
from mostgan.checkpoint.released import read_released
from mostgan.config import UserError
from mostgan.files import sha256_of
from mostgan.program import run_program


def import_released(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    /,
    network: Literal["G_ema", "G"] = "G_ema",
    discriminator: bool = False,
    training: bool = False,
    half_precision: tuple[int, ...] | None = None,
    motion_distance: int | None = None,
):
    """Makes a checkpoint of a released MoStGAN-V or StyleGAN-V network, without executing anything
    in its file.

    Args:
        source: network-snapshot.pkl, or a safetensors file of a state dict with the released names.
        out: the checkpoint folder to make.
        network: the averaged generator or the last one.
        discriminator: write the discriminator too, beside the generator.
        training: write all that train.py --start-from can go on from: the averaged generator, the
            last one and the discriminator.
        half_precision: resolutions that the release runs in half precision. There its convolutions
            are pre-normalized and motion gives the demodulation factor only. Default: as the file
            stores, else the four highest.
        motion_distance: frames between two anchor codes; only for a file that does not tell.
    """
    if out.exists():
        raise UserError(f"{out} is there already: choose another name")
    if training and network != "G_ema":
        raise UserError("--training brings both generators: leave out --network")
    made = read_released(source, network, discriminator, training, half_precision, motion_distance)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".importing-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        write_tensors(temporary / "model.safetensors", made.networks[network])
        if "D" in made.networks:
            write_tensors(temporary / "discriminator.safetensors", made.networks["D"])
        if training:
            write_tensors(temporary / "last_generator.safetensors", made.networks["G"])
        if made.class_means is not None:
            write_tensors(temporary / "class_means.safetensors", {"w": made.class_means})
        write_json(temporary / "config.json", dataclasses.asdict(made.config))
        write_json(temporary / "provenance.json", made.provenance)
        for file in [*temporary.iterdir(), temporary]:
            fsync(file)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"configuration: {made.notes}")
    print(f"{out}: sample with `python sample.py --checkpoint {out}`")


def export(
    checkpoint: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], /, clips: int = 1
):
    """Writes the generator as a program that runs without this package:
    torch.export.load(OUT).module().

    Takes seconds for a small model, a minute or two for one of 256².

    Args:
        checkpoint: a checkpoint or a run.
        out: the .pt2 file to write.
        clips: clips that the program renders at a time; the number of frames stays open.
    """
    from mostgan.checkpoint.export import export_file  # here, for it takes seconds to import

    print(export_file(load(checkpoint), out, clips).replace("FILE", repr(str(out)), 1), end="")


def show(path: tyro.conf.Positional[Path], /):
    """Prints a checkpoint's config, parameter counts, training progress and provenance.

    Args:
        path: a checkpoint or a run.
    """
    path = find(path)
    generator = load(path)
    print(f"{path}")
    for name, part in generator.named_children():
        print(f"  {name:18}{count(part):>12,} parameters")
    print(f"  {'generator':18}{count(generator):>12,} parameters")
    scalars = None
    if (path / "training.json").exists() or (path / "discriminator.safetensors").exists():
        print(f"  {'discriminator':18}{count(load_discriminator(path)):>12,} parameters")
    if (path / "training.json").exists():
        scalars = read_file(path / "training.json", json.loads)
    print("config")
    for name, value in dataclasses.asdict(generator.config).items():
        if isinstance(value, tuple):
            value = ", ".join(map(str, value)) or "none"
        print(f"  {name:32}{value}")
    print("training")
    for name, value in (scalars or {"none": "a model without its training state"}).items():
        print(f"  {name:32}{value}")
    print("provenance")
    for name, value in _provenance(path).items():
        print(f"  {name:32}{value}")


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def _provenance(path):
    """Where a checkpoint comes from: provenance.json of an import, or the config of the run that it
    lies in.
    """
    known = {"model.safetensors SHA-256": sha256_of(path / "model.safetensors")}
    if (path / "provenance.json").exists():
        return known | read_file(path / "provenance.json", json.loads)
    if (path.parent / "config.json").exists() and (path / "training.json").exists():
        run = read_file(path.parent / "config.json", json.loads)
        return known | {
            key: run[key]
            for key in ("preset", "dataset", "data", "seed", "total_kframes")
            if key in run
        }
    return known | {"unknown": "no provenance.json, and no run around it"}


def main():
    commands = {"import": import_released, "export": export, "show": show}
    options = {"prog": "python -m mostgan.checkpoint", "description": __doc__}

    def work():
        tyro.extras.subcommand_cli_from_dict(commands, **options)

    run_program(work, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    main()
