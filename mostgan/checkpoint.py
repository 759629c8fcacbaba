"""Checkpoints: safetensors and JSON only, complete or absent.

A checkpoint is a folder: model.safetensors (the averaged generator) and config.json (its ModelConfig) are all that
sampling needs; training.safetensors and training.json hold the rest of the training state.
"""

import dataclasses
import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Literal

import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mostgan.config import ModelConfig, UserError
from mostgan.discriminator import Discriminator
from mostgan.model import Generator
from mostgan.released import from_released_names, read_released, sha256

__all__ = ["find", "from_released_names", "load", "load_discriminator", "load_state", "read_tensors", "read_training",
           "save"]  # fmt: skip

CHECKPOINT_NAME = "checkpoint-{:06d}"


def save(folder, step, ema, tensors, scalars, keep=2):
    """Write checkpoint `step` into folder, whole or not at all, and drop all but the newest `keep`. Returns its path.

    ema: the averaged generator; tensors: name → tensor and scalars: JSON values, the rest of the training state.
    """
    folder = Path(folder)
    path, temporary = folder / CHECKPOINT_NAME.format(step), folder / f".saving-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        save_file({k: v.contiguous() for k, v in ema.state_dict().items()}, temporary / "model.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / "training.safetensors")
        (temporary / "config.json").write_text(json.dumps(dataclasses.asdict(ema.config), indent=2) + "\n")
        (temporary / "training.json").write_text(json.dumps(scalars, indent=2) + "\n")
        for file in [*temporary.iterdir(), temporary]:
            _fsync(file)
        if path.exists():  # the same step, saved again after a resume: the same content
            shutil.rmtree(path)
        temporary.rename(path)
        _fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _checkpoints(run):
    """Complete checkpoints in a run folder, oldest first."""
    return sorted(p for p in run.glob("checkpoint-*") if (p / "model.safetensors").exists())


def find(path=None, runs="runs"):
    """The checkpoint folder that path means: itself, or the newest in a run folder; None: the newest of all runs.

    Raises UserError if there is none.
    """
    if path is None:
        newest = sorted((c for run in Path(runs).glob("*") for c in _checkpoints(run)[-1:]),
                        key=lambda checkpoint: checkpoint.stat().st_mtime)
        if not newest:
            raise UserError(f"no checkpoint in {runs}/: make one with `python train.py --dataset sky`, "
                            "or name one with --checkpoint")
        return newest[-1]
    path = Path(path)
    if path.is_file():
        path = path.parent
    if (path / "model.safetensors").exists():
        return path
    if not path.is_dir() or not _checkpoints(path):
        raise UserError(f"{path} is neither a checkpoint (a folder with model.safetensors) nor a run that has one")
    return _checkpoints(path)[-1]


def load(path=None, device="cpu"):
    """The generator of a checkpoint, ready to sample. path: as `find` takes it. Returns an eval-mode Generator.

    Raises UserError on a missing, damaged or wrong checkpoint.
    """
    path = find(path)
    generator = Generator(_read(path / "config.json", lambda text: ModelConfig(**json.loads(text))))
    load_state(generator, read_tensors(path / "model.safetensors"), path)
    return generator.to(device).eval().requires_grad_(False)


def load_state(module, state, path):
    """module.load_state_dict, with a UserError that names the checkpoint if the two do not fit."""
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path} does not fit its config.json: {detail}") from None


def read_tensors(path):
    """name → tensor of a safetensors file; UserError if it is damaged or missing."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_training(path):
    """(tensors, scalars) of a checkpoint's training state; UserError if it has none."""
    path = find(path)
    if not (path / "training.json").exists():
        raise UserError(f"{path} holds a model but no training state: it can be sampled from, not resumed")
    return read_tensors(path / "training.safetensors"), _read(path / "training.json", json.loads)


def _read(path, parse):
    try:
        return parse(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def load_discriminator(path, device="cpu"):
    """The discriminator beside an imported generator, or of a training checkpoint. UserError if there is none."""
    path = find(path)
    discriminator = Discriminator(load(path).config)
    if (path / "discriminator.safetensors").exists():
        state = read_tensors(path / "discriminator.safetensors")
    else:
        tensors, _ = read_training(path)
        state = {name.removeprefix("D."): value for name, value in tensors.items() if name.startswith("D.")}
    load_state(discriminator, state, path)
    return discriminator.to(device)


def import_released(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    /,
    network: Literal["G_ema", "G"] = "G_ema",
    discriminator: bool = False,
    half_precision: tuple[int, ...] | None = None,
    motion_distance: int | None = None,
):
    """Makes a checkpoint of a released MoStGAN-V or StyleGAN-V network, without executing anything in its file.

    Args:
        source: network-snapshot.pkl, or a safetensors file of a state dict with the released names.
        out: the checkpoint folder to make.
        network: the averaged generator or the last one.
        discriminator: write the discriminator too, beside the generator.
        half_precision: resolutions that the release runs in half precision. There its convolutions are pre-normalized
            and motion gives the demodulation factor only. Default: as the file stores, else the four highest.
        motion_distance: frames between two anchor codes; only for a file that does not tell.
    """
    if out.exists():
        raise UserError(f"{out} is there already: choose another name")
    made = read_released(source, network, discriminator, half_precision, motion_distance)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".importing-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        save_file(made.generator, temporary / "model.safetensors")
        if made.discriminator is not None:
            save_file(made.discriminator, temporary / "discriminator.safetensors")
        (temporary / "config.json").write_text(json.dumps(dataclasses.asdict(made.config), indent=2) + "\n")
        (temporary / "provenance.json").write_text(json.dumps(made.provenance, indent=2) + "\n")
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes files that only their owner reads
            _fsync(file)
        _fsync(temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"inferred: {made.inferred}")
    print(f"{out}: sample with `python sample.py --checkpoint {out}`")


def export(checkpoint: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], /, clips: int = 1):
    """Writes the generator as a program that runs without this package: torch.export.load(OUT).module().

    Takes seconds for a small model, a minute or two for one of 256².

    Args:
        checkpoint: a checkpoint or a run.
        out: the .pt2 file to write.
        clips: clips that the program renders at a time; the number of frames stays open.
    """
    from mostgan.export import export_file  # here, for it takes seconds to import

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
        scalars = _read(path / "training.json", json.loads)
    print("config")
    for name, value in dataclasses.asdict(generator.config).items():
        print(f"  {name:32}{', '.join(map(str, value)) or 'none' if isinstance(value, tuple) else value}")
    print("training")
    for name, value in (scalars or {"none": "a model without its training state"}).items():
        print(f"  {name:32}{value}")
    print("provenance")
    for name, value in _provenance(path).items():
        print(f"  {name:32}{value}")


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def _provenance(path):
    """Where a checkpoint comes from: provenance.json of an import, or the config of the run that it lies in."""
    known = {"model.safetensors SHA-256": sha256(path / "model.safetensors")}
    if (path / "provenance.json").exists():
        return known | _read(path / "provenance.json", json.loads)
    if (path.parent / "config.json").exists() and (path / "training.json").exists():
        run = _read(path.parent / "config.json", json.loads)
        return known | {key: run[key] for key in ("preset", "dataset", "data", "seed", "total_kframes") if key in run}
    return known | {"unknown": "no provenance.json, and no run around it"}


def main():
    try:
        tyro.extras.subcommand_cli_from_dict({"import": import_released, "export": export, "show": show},
                                             prog="python -m mostgan.checkpoint", description=__doc__)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
