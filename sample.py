"""Sample video from a checkpoint, streamed in constant memory.

    python sample.py --frames 1024                      # the newest run's newest checkpoint → samples/<run>-seed0.mp4
    python sample.py --checkpoint runs/00000-sky-tiny --seed 7 --clips 4 --psi 0.8 --out four.gif
    python sample.py --start 10000000 --frames 256      # a window of an endless video, rendered alone
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from mostgan import checkpoint
from mostgan.config import DATASETS, UserError
from mostgan.device import peak_memory_mb, pick_device
from mostgan.run import read_config
from mostgan.video import VideoWriter, grid


@dataclass(frozen=True)
class Options:
    checkpoint: Path | None = None
    """a run folder or one checkpoint in it; default: the newest checkpoint in runs/"""
    frames: int = 256
    """length of the video in frames"""
    seed: int = 0
    """of the first clip; clip i has seed + i"""
    clips: int = 1
    """how many clips, side by side in one video"""
    psi: float = 1.0
    """truncation: 1 none, towards 0 more typical and less diverse"""
    start: float = 0.0
    """first frame, up to 100,000,000"""
    label: int | None = None
    """class, for a conditional model"""
    fps: float | None = None
    """default: the dataset's"""
    out: Path | None = None
    """.mp4, .gif, or no suffix for a folder of PNGs; default samples/<run>-seed<seed>.mp4"""
    window: int = 16
    """frames rendered at a time"""


def sample(options: Options):
    device = pick_device()
    path = checkpoint.find(options.checkpoint)
    generator = checkpoint.load(path, device)
    out = options.out or Path("samples", f"{path.parent.name}-seed{options.seed}.mp4")
    columns = 1
    while columns**2 < options.clips:
        columns += 1
    rows = -(-options.clips // columns)
    windows = generator.render(options.seed, options.start, options.frames, options.clips, label=options.label,
                               psi=options.psi, window=options.window)
    rendering, started = 0.0, time.perf_counter()
    bar = tqdm(total=options.frames, unit="frame", disable=None)
    with VideoWriter(out, options.fps or dataset_fps(path)) as video:
        while True:
            before = time.perf_counter()
            window = next(windows, None)
            if window is not None:
                window = window.cpu()  # waits for the device, so that the time is the rendering's
            rendering += time.perf_counter() - before
            if window is None:
                break
            video.write(grid(window, rows, columns))
            bar.update(window.shape[1])
    bar.close()
    seconds = time.perf_counter() - started
    per_frame = 1000 / (options.frames * options.clips)
    print(f"{out}: {options.frames} frames of {options.clips} clip{'s' * (options.clips > 1)} from {path}")
    print(f"{rendering * per_frame:.2f} ms/frame rendering, {seconds * per_frame:.2f} ms/frame with writing, "
          f"peak memory {peak_memory_mb(device):.0f} MB, on {device}")


def dataset_fps(path):
    """Frames per second of the dataset that a checkpoint was trained on; 25 if it lies outside a run."""
    try:
        return DATASETS[read_config(path.parent).dataset].fps
    except UserError:
        return 25.0


if __name__ == "__main__":
    try:
        sample(tyro.cli(Options, description=__doc__))
    except UserError as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit("sample.py: interrupted; nothing was written")
