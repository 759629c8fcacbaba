"""The paper's figures 5 to 8 of a model (spec §14) and the curves of its run, as PNG and WebP in a
folder with a page of them, index.html.

    python -m mostgan.figures runs/00000-sky-paper256 --out figures/sky
    python -m mostgan.figures --seed 3 --frames 128
"""

from pathlib import Path

import torch
import tyro

from mostgan import checkpoint
from mostgan.config import UserError
from mostgan.data import read_conditions
from mostgan.device import choose_kernels, pick_device
from mostgan.figures import curves, watch
from mostgan.figures.page import page, section
from mostgan.files import sha256_of, whole_folder, write_whole
from mostgan.program import need, run_program
from mostgan.progress import read_stats
from mostgan.rendering import exact, render

CLIPS = 4  # that figure 5 is of
CONTENTS, MOTIONS = 4, 3  # that figure 8 shows


def run(
    model: tyro.conf.Positional[Path | None] = None,
    /,
    *,
    out: Path | None = None,
    seed: int = 0,
    frames: int = 64,
    speed: float = 1.0,
    label: int | None = None,
    condition: tuple[str, ...] = (),
):
    """Draws the paper's figures of a model, and puts them on a page.

    Args:
        model: a run folder or one checkpoint in it. Default: that of sample.py.
        out: the folder to write, which must not be there yet. Default: figures/<run>.
        seed: of the first clip; the others' follow.
        frames: length of the clips.
        speed: of time: frames of the dataset from one frame to the next.
        label: class, for a model conditioned on classes.
        condition: for a model conditioned on vectors: FILE:NAME or numbers, as of sample.py.
    """
    need("matplotlib", "figures")
    if frames < 2:
        raise UserError(f"frames is {frames}, but must be at least 2")
    path = checkpoint.find(model).resolve()
    name = path.parent.name if path.name.startswith("checkpoint-") else path.name
    out = out or Path("figures", name)
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or choose another --out")
    device = pick_device()
    choose_kernels("reference", False, device)
    generator = checkpoint.load(path, device)
    config, fps = generator.config, generator.config.fps or 25.0
    about = f"""Checkpoint {path.name} (sha256 {sha256_of(path / "model.safetensors")[:12]}):
        {config.resolution}², {config.motion_styles} motion styles of rank {config.rank}, motion
        anchors {config.motion_distance} frames apart. Rendered in float32 from seed {seed} on:
        clips of {frames} frames, {speed:g} of the dataset's apart, label {label}, condition
        {" ".join(condition) or None}. With fewer than two motion styles there are no figures 5, 6
        and 7, without stats.jsonl beside a checkpoint no curves."""
    shown = {"step": exact(speed)} | read_conditions(label, condition)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as folder:
        sections = []
        for exhibit in exhibits(generator, path.parent, seed, frames, fps, shown):
            sections.append(section(exhibit, folder, fps))
            print(exhibit.title, flush=True)
        write_whole(folder / "index.html", page(f"Figures of {name}", about, sections))
    print(f"{out / 'index.html'} has these figures of {path}")


def exhibits(generator, run, seed, frames, fps, shown):
    """Yields an Exhibit of each figure that there is of a model. shown: arguments of `render`."""
    from mostgan.figures import drawing  # which imports matplotlib

    contents = [seed + c for _ in range(MOTIONS) for c in range(CONTENTS)]
    motions = [seed + m for m in range(MOTIONS) for _ in range(CONTENTS)]
    # First, since it checks all that was asked for.
    clips = render(generator, contents, 0, frames, len(contents), motion_seed=motions, **shown)
    second, columns = float(shown["step"]) / fps, curves(read_stats(run))
    if generator.config.motion_styles > 1:
        pictures, layers = watch(generator, seed, frames, **shown)
        others = [watch(generator, seed + i, frames, **shown)[1] for i in range(1, CLIPS)]
        yield drawing.similarity([layers, *others])
        yield drawing.attention(layers, frames * second)
        for layer in {layer.block: layer for layer in layers}.values():  # a block's last
            yield drawing.where_styles_act(pictures, layer, second)
    clips = torch.cat([window.cpu() for window in clips], dim=1)
    yield drawing.content_against_motion(clips.unflatten(0, (MOTIONS, CONTENTS)), second)
    if "loss_G" in columns:
        yield drawing.course(columns)


def main():
    options = {"config": (tyro.conf.OmitArgPrefixes,), "description": __doc__}
    run_program(lambda: tyro.cli(run, **options), "interrupted; nothing was written")


if __name__ == "__main__":
    main()
