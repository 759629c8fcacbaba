"""Sample video from a checkpoint, streamed in constant memory. Options that fit together may be
combined.

python sample.py --frames 1024                  # the newest run → samples/<run>-seed0.mp4
python sample.py --start 10000000 --frames 256  # a stretch of an endless video, rendered alone
python sample.py --loop 10 --out loop.gif       # 10 seconds that repeat without a seam
python sample.py --start 500 --speed -0.25      # from frame 500 backwards, in slow motion
python sample.py --grid 4x4 --rows motion --columns content   # a row moves, a column looks alike
python sample.py --content-seeds 1 2 3 --motion-seed 7        # content changes, motion runs on
python sample.py --motion-style 0=0 3=2         # without style 0, style 3 twice as strong
"""

import dataclasses
import hashlib
import json
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import kernels
from mostgan import checkpoint
from mostgan.config import DATASETS, UserError
from mostgan.device import choose_kernels, peak_memory_mb, pick_device, to_host
from mostgan.render import exact, loop_step
from mostgan.run import read_config
from mostgan.video import VideoWriter, grid

Shared = Literal["content", "motion", "nothing"]


@dataclass(frozen=True)
class Options:
    checkpoint: Path | None = None
    """a run folder or one checkpoint in it; default: the newest checkpoint in runs/"""
    out: Path | None = None
    """.mp4, .gif, .webp, .npy, or no suffix for a folder of PNGs; default
    samples/<run>-seed<seed>.mp4
    """
    force: bool = False
    """write over a file that is there"""
    crf: int = 17
    """quality of an mp4, from 0 (best) to 51"""
    frames: int | None = None
    """length of the video; default 256, or one loop"""
    seed: int = 0
    """of content and motion; in a grid, of the first clip"""
    motion_seed: int | None = None
    """of the motion, if it is another"""
    content_seeds: tuple[int, ...] = ()
    """seeds through which the content moves, and round again"""
    content_seconds: float = 4.0
    """time from one of them to the next; in a loop, all of them take one loop"""
    psi: float = 1.0
    """truncation: 1 none, towards 0 more typical and less diverse"""
    label: int | None = None
    """class, for a model conditioned on classes"""
    condition: tuple[float, ...] = ()
    """condition vector, for a model conditioned on vectors"""
    motion_style: tuple[str, ...] = ()
    """k=GAIN: scales the share of motion style k (from 0); 0 removes it"""
    start: float = 0.0
    """time of the first frame, in frames of the dataset, from -100,000,000 to 100,000,000"""
    speed: float = 1.0
    """of time; 0.25 is slow motion, negative is backwards"""
    fps: float | None = None
    """frames per second of the video, whose pace stays; default: the checkpoint's"""
    loop: float | None = None
    """seconds after which the video repeats; its pace is adapted so that it closes"""
    grid: str = "1x1"
    """clips side by side: ROWSxCOLUMNS; clip i has seed + i, unless rows or columns share"""
    rows: Shared = "nothing"
    """what the clips of a row have in common"""
    columns: Shared = "nothing"
    """what the clips of a column have in common"""
    precision: Literal["bf16", "float32"] = "bf16" if torch.cuda.is_available() else "float32"
    """of the convolutions"""
    compile: bool = torch.cuda.is_available()
    """torch.compile the synthesis network: a minute or so before the first frame, and faster from
    there on
    """
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """what the ops of kernels/ run as on a GPU: auto is the fastest that agrees with plain PyTorch,
    measured once
    """


def sample(options: Options):
    """Render and write a video. Returns whether it is complete: Ctrl-C ends it early. Raises
    UserError.
    """
    stop = stop_signal()
    path = checkpoint.find(options.checkpoint)
    name = (
        path.parent.name if path.name.startswith("checkpoint-") else path.name
    )  # of the run, if it is of one
    out = options.out or Path("samples", f"{name}-seed{options.seed}.mp4")
    rate = dataset_fps(path)
    rows, columns = parse_grid(options.grid)
    fps, frames, way = way_through_time(options, rate)
    video = VideoWriter(out, fps, options.crf, describe(options, path, fps))
    for file in (out, video.sidecar):
        if file is not None and file.exists() and not options.force:
            raise UserError(
                f"{file} is there already: choose another --out, or write over it with --force"
            )
    device = pick_device()
    choose_kernels(options.kernels, options.compile, device)
    generator = checkpoint.load(path, device)
    video.check_size(rows * generator.config.resolution, columns * generator.config.resolution)
    if options.compile:  # with CUDA graphs: windows all have one shape
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        generator.synthesis.compile(fullgraph=True, dynamic=False, mode=mode)
    content, motion = grid_seeds(options, rows, columns)
    windows = generator.render(
        content,
        options.start,
        frames,
        rows * columns,
        motion,
        list(options.condition) or options.label,
        options.psi,
        content_frames=exact(options.content_seconds) * exact(rate),
        style_gain=parse_gains(options.motion_style),
        **way,
    )
    if options.loop is not None:
        print_loop(generator.config, fps, exact(rate), **way)

    windows = to_host(windows, device)
    done, rendering, started = 0, 0.0, time.perf_counter()
    bar = tqdm(total=frames, unit="frame", disable=None, delay=0.3)
    half = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")
    with video, half:
        while not stop.is_set():
            before = time.perf_counter()
            window = next(windows, None)
            if window is None:
                break
            rendering += time.perf_counter() - before
            picture = grid(window, rows, columns)
            video.write(picture)
            if not done and device.type == "cuda":
                bar.write(f"kernels: {kernels.summary(device)}")
            done += len(picture)
            bar.update(len(picture))
        if not done:
            raise KeyboardInterrupt
    bar.close()
    seconds = time.perf_counter() - started
    per_frame = 1000 / (done * rows * columns)
    print(
        f"{out}: {done} frame{'s' * (done > 1)} of {rows * columns} "
        f"clip{'s' * (rows * columns > 1)} from {path}"
    )
    print(
        f"{seconds * per_frame:.2f} ms/frame: rendering and transfer {rendering * per_frame:.2f}, "
        "and beside them "
        f"encoding {video.seconds * per_frame:.2f}; "
        f"peak memory {peak_memory_mb(device):.0f} MB, on {device}, {options.precision}, "
        f"{'compiled' if options.compile else 'not compiled'}, kernels: {kernels.summary(device)}"
    )
    return done == frames


def stop_signal():
    """An event that Ctrl-C or SIGTERM sets. A second one is a KeyboardInterrupt, which leaves no
    video.
    """
    stop = threading.Event()

    def handle(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


def way_through_time(options, rate):
    """--speed, --fps, --loop → (frames per second, frames in all, render's step and loop). rate:
    the dataset's fps.
    """
    for name in ("fps", "loop", "content_seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1e9:
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be more than 0")
    fps = exact(rate if options.fps is None else options.fps)
    loop = None if options.loop is None else max(1, round(exact(options.loop) * fps))
    frames = options.frames if options.frames is not None else loop or 256
    return fps, frames, {"step": exact(options.speed) * exact(rate) / fps, "loop": loop}


def print_loop(config, fps, rate, step, loop):
    pace, anchors = loop_step(config, step, loop)
    print(
        f"a loop of {loop} frame{'s' * (loop > 1)} ({float(loop / fps):g} s) goes through "
        f"{anchors} motion "
        f"anchor{'s' * (anchors > 1)}, {config.motion_distance} frames apart: speed "
        f"{float(pace * fps / rate):.4g}"
    )


def parse_grid(text):
    """'4x3' → (4, 3): rows and columns."""
    match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", text)
    if match is None:
        raise UserError(f"--grid is {text!r}, but must be ROWSxCOLUMNS, such as 4x3")
    return int(match[1]), int(match[2])


def grid_seeds(options, rows, columns):
    """Content and motion seeds of the clips, row by row, as `render` takes them."""

    def numbers(
        what,
    ):  # which content, or motion, each clip shows: by its row, its column, neither or both
        by_row, by_column = options.rows == what, options.columns == what
        return [
            (r if not by_column else 0) if by_row else c if by_column else r * columns + c
            for r in range(rows)
            for c in range(columns)
        ]

    motion = [
        (options.seed if options.motion_seed is None else options.motion_seed) + i
        for i in numbers("motion")
    ]
    path = options.content_seeds
    if path:  # each clip starts at a seed of its own
        return [
            tuple(path[(i + k) % len(path)] for k in range(len(path))) for i in numbers("content")
        ], motion
    return [options.seed + i for i in numbers("content")], motion


def parse_gains(texts):
    """['0=0', '3=2'] → {0: 0.0, 3: 2.0}."""
    gains = {}
    for text in texts:
        match = re.fullmatch(r"(\d+)=([-+.\de]+)", text)
        try:
            gains[int(match[1])] = float(match[2])
        except (TypeError, ValueError):
            raise UserError(f"--motion-style {text}: write k=GAIN, such as 3=0 or 0=1.5") from None
    return gains


def describe(options, path, fps):
    """What the file remembers of its making: the checkpoint's name and hash, and every option that
    decides a frame.

    fps: that of the video, for which the options may hold None.
    """
    with open(path / "model.safetensors", "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    chosen = dataclasses.asdict(options) | {"fps": float(fps)}
    for key in ("checkpoint", "out", "force"):
        del chosen[key]
    return json.dumps(
        {
            "program": "MoStGAN-V",
            "checkpoint": f"{path.resolve().parent.name}/{path.name}",
            "model.safetensors sha256": digest.hexdigest(),
            "options": chosen,
        }
    )


def dataset_fps(path):
    """Frames per second of a checkpoint's data; of an older one, the preset's of its run, else
    25.
    """
    fps = checkpoint.read_config(path).fps
    if fps is not None:
        return fps
    try:
        return DATASETS[read_config(path.parent).dataset].fps
    except UserError:
        return 25.0


if __name__ == "__main__":
    try:
        if not sample(tyro.cli(Options, description=__doc__)):
            sys.exit("sample.py: interrupted; the video ends with what was rendered")
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        sys.exit(
            "sample.py: the GPU's memory is too small for so many clips at once: choose a smaller "
            "--grid"
        )
    except KeyboardInterrupt:
        sys.exit("sample.py: interrupted; nothing was written")
