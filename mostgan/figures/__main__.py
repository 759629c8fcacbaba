"""The paper's figures 5 to 8 of a model (spec §14) and the curves of its run, as PNG and WebP in a
folder with a page of them, index.html.

    python -m mostgan.figures runs/00000-sky-paper256 --out figures/sky
    python -m mostgan.figures --seed 3 --frames 128
"""

from importlib.util import find_spec
from pathlib import Path

import torch
import tyro

from mostgan import checkpoint
from mostgan.config import UserError
from mostgan.device import choose_kernels, pick_device
from mostgan.figures import read_curves, watch
from mostgan.figures.page import page, section
from mostgan.files import sha256_of, whole_folder, write_whole
from mostgan.program import run_program
from mostgan.rendering import exact, render

CLIPS = 4  # that figure 5 is of
CONTENTS, MOTIONS = 4, 3  # that figure 8 shows


def run(
    model: tyro.conf.Positional[Path | None] = None,
    /,
    *,
    out: Path | None = None,
    force: bool = False,
    seed: int = 0,
    frames: int = 64,
    speed: float = 1.0,
    label: int | None = None,
    condition: tuple[str, ...] = (),
):
    """Draws the paper's figures of a model, and puts them on a page.

    Args:
        model: a run folder or one checkpoint in it. Default: that of sample.py.
        out: the folder to write. Default: figures/<run>.
        force: write over figures that are there.
        seed: of the first clip; the others' follow.
        frames: length of the clips.
        speed: of time: frames of the dataset from one frame to the next.
        label: class, for a model conditioned on classes.
        condition: for a model conditioned on vectors: FILE:NAME, the conditions of clip NAME in a
            file as prepare takes it, or the numbers of a clip's vector.
    """
    if find_spec("matplotlib") is None:
        raise UserError(
            "figures need matplotlib: pip install 'mostgan[figures]', in a checkout pip install "
            "-e '.[figures]'"
        )
    if frames < 2:
        raise UserError(f"frames is {frames}, but must be at least 2")
    path = checkpoint.find(model).resolve()
    name = path.parent.name if path.name.startswith("checkpoint-") else path.name
    out = out or Path("figures", name)
    others = {file.suffix for file in out.glob("*")} - {".png", ".webp", ".html"}
    if out.exists() and (not force or others or not out.is_dir()):
        told = "choose another --out, or write over it with --force if it holds figures alone"
        raise UserError(f"{out} is there already: {told}")
    device = pick_device()
    choose_kernels("reference", False, device)
    generator = checkpoint.load(path, device)
    config, fps = generator.config, generator.config.fps or 25.0
    about = f"""Checkpoint {path.name} (sha256 {sha256_of(path / "model.safetensors")[:12]}):
        {config.resolution}², {config.motion_styles} motion styles of rank {config.rank}, motion
        anchors {config.motion_distance} frames apart. Rendered in float32 from seed {seed} on:
        clips of {frames} frames, {speed:g} of the dataset's apart. A model with K = 0 has no
        figures 5 to 7, a checkpoint with no stats.jsonl beside it no curves."""
    shown = {"step": exact(speed)} | checkpoint.read_conditions(label, condition)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as folder:
        sections = []
        for exhibit in exhibits(generator, path.parent / "stats.jsonl", seed, frames, fps, shown):
            sections.append(section(exhibit, folder, fps))
            print(exhibit.title, flush=True)
        write_whole(folder / "index.html", page(f"Figures of {name}", about, sections))
    print(f"{out / 'index.html'} has these figures of {path}")


def exhibits(generator, stats, seed, frames, fps, shown):
    """Yields an Exhibit of every figure that there can be of a model. stats: the run's stats.jsonl,
    if there is one; shown: further arguments of `render`.
    """
    from mostgan.figures import drawing  # which imports matplotlib

    contents = [seed + c for _ in range(MOTIONS) for c in range(CONTENTS)]
    motions = [seed + m for m in range(MOTIONS) for _ in range(CONTENTS)]
    # First, since it checks all that was asked for.
    clips = render(generator, contents, 0, frames, len(contents), motion_seed=motions, **shown)
    second = float(shown["step"]) / fps
    pictures, layers = watch(generator, seed, frames, **shown)
    if layers:
        others = [watch(generator, seed + i, frames, **shown)[1] for i in range(1, CLIPS)]
        yield drawing.similarity([layers, *others])
        yield drawing.attention(layers, frames * second)
        for layer in {layer.block: layer for layer in layers}.values():  # a block's last
            yield drawing.where_styles_act(pictures, layer, second)
    clips = torch.cat([window.cpu() for window in clips], dim=1)
    yield drawing.content_against_motion(clips.unflatten(0, (MOTIONS, CONTENTS)), second)
    if curves := read_curves(stats):
        yield drawing.course(curves)


def main():
    options = {"config": (tyro.conf.OmitArgPrefixes,), "description": __doc__}
    run_program(lambda: tyro.cli(run, **options), "interrupted; nothing was written")


if __name__ == "__main__":
    main()
