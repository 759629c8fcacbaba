"""A run folder: its config, stats.jsonl, sample grids, and stopping cleanly."""

import dataclasses
import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import torch

from mostgan.config import ModelConfig, TrainConfig, UserError
from mostgan.device import peak_memory_mb
from mostgan.video_writer import VideoWriter, grid, write_png

GRID_SIDE, GRID_FRAMES = 4, 32  # a snapshot shows 4 × 4 clips of 32 frames …
STRIP_FRAMES = 8  # … and its png these many frames of each, in a row
SHARED_MOTION_SEED = 10_000  # of the grid whose clips all move alike


def start_run(out, config, clips):
    """Make the run folder: out, or runs/<n>-<dataset>-<preset>. Returns its path; UserError if it holds a run."""
    if out is None:
        runs = Path("runs")
        numbers = [int(m.group(1)) for p in runs.glob("*") if (m := re.match(r"(\d+)-", p.name))]
        data = config.dataset + ("-builtin" if clips.builtin else "")
        out = runs / f"{max(numbers, default=-1) + 1:05d}-{data}-{config.preset}"
    if (out / "config.json").exists():
        raise UserError(f"{out} already holds a run: go on with --resume {out}, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    described = dataclasses.asdict(config) | {"builtin_data": clips.builtin, "data": str(clips.path)}
    write_text(out / "config.json", json.dumps(described, indent=2) + "\n")
    return out


def read_config(run):
    """The TrainConfig of a run folder; UserError if it has none."""
    try:
        values = json.loads((run / "config.json").read_text())
        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        model = ModelConfig(**values["model"])
        return TrainConfig(**{key: value for key, value in values.items() if key in fields} | {"model": model})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {run / 'config.json'}: {error}") from None


def write_text(path, text):
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    temporary.replace(path)


class Stats:
    """Means, and counts, since the last line of stats.jsonl. Values stay on their device until a line is written."""

    def __init__(self, run, device):
        self.path, self.device = run / "stats.jsonl", device
        self.values, self.counts, self.since = {}, {}, time.perf_counter()

    def add(self, **values):
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach().float().mean())

    def add_count(self, **values):
        for name, value in values.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def write(self, frames_since, **more):
        """Append a line: the means, `more`, frames/s over frames_since frames, peak memory. Returns it as a dict."""
        now = time.perf_counter()
        line = dict(more)
        for name, values in self.values.items():
            line[name] = round(float(torch.stack(values).mean()), 6)
        line |= {name: int(value) for name, value in self.counts.items()}
        line["frames_per_second"] = round(frames_since / (now - self.since), 2)
        line["peak_memory_mb"] = round(peak_memory_mb(self.device), 1)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.values, self.counts, self.since = {}, {}, now
        return line

    def drop_after(self, frames):
        """Remove lines past `frames`, which a run resumed from there writes again."""
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["frames"] <= frames]
            write_text(self.path, "".join(line + "\n" for line in kept))


def save_grids(run, generator, frames_done, fps):
    """Sample grids with fixed latents: one where every clip moves by itself, one where all share their motion."""
    labels = generator.config.num_labels
    count = GRID_SIDE**2
    label = [i % labels for i in range(count)] if labels else None
    for name, motion_seed in (("samples", None), ("shared-motion", SHARED_MOTION_SEED)):
        windows = generator.render(0, frames=GRID_FRAMES, clips=count, motion_seed=motion_seed, label=label)
        write_grid(run / f"{name}-{frames_done // 1000:06d}k", torch.cat(list(windows), dim=1), fps)


def save_real_grid(run, clips, fps):
    """The same grid of real clips: their first frames."""
    chosen = np.linspace(0, len(clips) - 1, min(len(clips), GRID_SIDE**2)).astype(int)
    length = min(GRID_FRAMES, *(int(clips.lengths[i]) for i in chosen)) if len(chosen) > 1 else int(clips.lengths[0])
    length = min(length, GRID_FRAMES)
    write_grid(run / "real", torch.from_numpy(np.stack([clips.frames(i, np.arange(length)) for i in chosen])), fps)


def write_grid(path, clips, fps):
    """uint8 [n, T, 3, H, W] → path.mp4, all clips side by side, and path.png, a row of frames over time per clip."""
    with VideoWriter(path.with_suffix(".mp4"), fps) as video:
        video.write(grid(clips, GRID_SIDE, GRID_SIDE))
    moments = torch.linspace(0, clips.shape[1] - 1, min(STRIP_FRAMES, clips.shape[1])).round().long()
    strips = clips[: 2 * GRID_SIDE, moments].flatten(0, 1).unsqueeze(1)
    write_png(path.with_suffix(".png"), grid(strips, -(-len(strips) // len(moments)), len(moments))[0])


class StopSignal:
    """Ctrl-C or SIGTERM once: `requested` is set and the step is finished; twice: Python's own KeyboardInterrupt."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.requested = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
