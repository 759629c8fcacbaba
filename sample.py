"""Sample video from a checkpoint, streamed in constant memory. Options that fit together may be
combined.

python sample.py --frames 1024                  # the newest run, or a model in the package, as mp4
python sample.py --start 10000000 --frames 256  # a stretch of an endless video, rendered alone
python sample.py --loop 10 --out loop.gif       # 10 seconds that repeat without a seam
python sample.py --start 500 --speed -0.25      # from frame 500 backwards, in slow motion
python sample.py --grid 4x4 --rows motion --columns content   # a row moves, a column looks alike
python sample.py --content-seeds 1 2 3 --motion-seed 7        # content changes, motion runs on
python sample.py --motion-style 0=0 3=2         # without style 0, style 3 twice as strong
python sample.py --condition words.safetensors:clip7    # as the conditions of clip7 say
"""

import dataclasses
import itertools
import json
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mostgan  # noqa: F401  before PyTorch, whose threads it tells how to wait

# isort: split
import torch
import tyro
from tqdm import tqdm

import kernels
from mostgan import checkpoint
from mostgan.config import UserError
from mostgan.data import read_conditions
from mostgan.device import choose_kernels, has_bf16, peak_memory_mb, pick_device, to_host
from mostgan.files import sha256_of
from mostgan.program import run_program
from mostgan.rendering import exact, loop_step, render
from mostgan.video import VideoWriter, grid

DEFAULT_FPS = 25.0  # of a checkpoint that does not know its data's
Shared = Literal["content", "motion", "nothing"]


@dataclass(frozen=True)
class Options:
    checkpoint: Path | None = None
    """a run folder or one checkpoint in it; default: the newest checkpoint in runs/, or without
    any a small model that comes with this package
    """
    out: Path | None = None
    """.mp4, .gif, .webp, .npy, or no suffix for a folder of PNGs; default
    samples/<run>-seed<seed>.mp4, with a number where that is there
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
    condition: tuple[str, ...] = ()
    """for a model conditioned on vectors: FOLDER:NAME, the conditions of clip NAME of a packed
    folder; or FILE:NAME, those in a file as prepare takes it (of one clip: FILE), a row for each
    frame; or the numbers of a clip's vector
    """
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
    """of the convolutions; on a CPU that has instructions for it, bf16 is faster, and what it
    changes is measured and printed
    """
    compile: bool = torch.cuda.is_available()
    """torch.compile the synthesis network: a minute or so before the first frame, and faster from
    there on
    """
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """what the ops of kernels/ run as on a GPU: auto is the fastest that agrees with plain PyTorch,
    measured once
    """


def sample(options: Options):
    """Renders and writes a video. Returns whether it is complete: Ctrl-C ends it early. Raises
    UserError.
    """
    stop = stop_signal()
    path = checkpoint.find(options.checkpoint)
    if options.checkpoint is None and path == checkpoint.BUILT_IN:
        print(
            "no run in runs/ with a checkpoint: this is the small model that comes with MoStGAN-V, "
            "trained on its built-in sky; train your own with: python train.py --dataset sky"
        )
    rate = checkpoint.read_config(path).fps or DEFAULT_FPS
    rows, columns = parse_grid(options.grid)
    fps, frames, way = way_through_time(options, rate)
    video = open_video(options, path, fps)
    device = pick_device()
    if options.precision == "bf16" and not has_bf16(device):
        raise UserError("--precision bf16: this processor has no instructions for it; leave it out")
    choose_kernels(options.kernels, options.compile, device)
    generator = checkpoint.load(path, device)
    video.check_size(rows * generator.config.resolution, columns * generator.config.resolution)
    of_clips = what_clips_show(options, rows, columns, rate)

    def windows_of(frames):
        return render(generator, start=options.start, frames=frames, **of_clips, **way)

    windows = windows_of(frames)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")
    if options.precision == "bf16" and device.type == "cpu":
        print_cost_of_bf16(windows_of, autocast)
    if options.compile:  # with CUDA graphs: windows all have one shape
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        generator.synthesis.compile(fullgraph=True, dynamic=False, mode=mode)
    if options.loop is not None:
        print_loop(generator.config, fps, exact(rate), **way)
    with autocast:
        pictures = (grid(window, rows, columns) for window in to_host(windows, device))
        done, seconds = write_video(video, pictures, frames, stop, device)
    clips = rows * columns
    print(f"{video.path}: {counted(done, 'frame')} of {counted(clips, 'clip')} from {path}")
    print_speed({name: 1000 * of / (done * clips) for name, of in seconds.items()}, options, device)
    return done == frames


def open_video(options, path, fps):
    """The VideoWriter of --out. UserError where something is in its place."""
    of_run = path.name.startswith("checkpoint-")
    name = path.parent.name if of_run else path.name
    out = options.out or Path("samples", f"{name}-seed{options.seed}.mp4")
    numbers = itertools.count(2)
    while options.out is None and out.exists() and not options.force:
        out = Path("samples", f"{name}-seed{options.seed}-{next(numbers)}.mp4")
    video = VideoWriter(out, fps, options.crf, describe(options, path, fps))
    for file in (out, video.sidecar):
        if file is not None and file.exists() and not options.force:
            raise UserError(
                f"{file} is there already: choose another --out, or write over it with --force"
            )
    return video


def write_video(video, pictures, frames, stop, device):
    """Writes pictures as they are rendered, until there are no more or `stop` is set.

    Returns how many, and the seconds that rendering, encoding and all of it took, a dict. Raises
    KeyboardInterrupt where there are none.
    """
    done, rendering, started = 0, 0.0, time.perf_counter()
    bar = tqdm(total=frames, unit="frame", disable=None, delay=0.3)
    with video:
        while not stop.is_set():
            before = time.perf_counter()
            picture = next(pictures, None)
            if picture is None:
                break
            rendering += time.perf_counter() - before
            video.write(picture)
            if not done and device.type == "cuda":
                bar.write(f"kernels: {kernels.summary(device)}")
            done += len(picture)
            bar.update(len(picture))
        if not done:
            raise KeyboardInterrupt
    bar.close()
    whole = time.perf_counter() - started
    return done, {"all": whole, "rendering": rendering, "encoding": video.seconds}


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
            told = "more than 0, and less than 10⁹"
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be {told}")
    fps = exact(rate if options.fps is None else options.fps)
    loop = None if options.loop is None else max(1, round(exact(options.loop) * fps))
    frames = options.frames if options.frames is not None else loop or 256
    return fps, frames, {"step": exact(options.speed) * exact(rate) / fps, "loop": loop}


def what_clips_show(options, rows, columns, rate):
    """The arguments of `render` that say what the clips of a grid show. rate: the dataset's fps."""
    content, motion = grid_seeds(options, rows, columns)
    return dict(
        seed=content,
        clips=rows * columns,
        motion_seed=motion,
        **read_conditions(options.label, options.condition),
        psi=options.psi,
        content_frames=exact(options.content_seconds) * exact(rate),
        style_gain=parse_gains(options.motion_style),
    )


def print_loop(config, fps, rate, step, loop):
    pace, anchors = loop_step(config, step, loop)
    print(
        f"a loop of {counted(loop, 'frame')} ({float(loop / fps):g} s) goes through "
        f"{counted(anchors, 'motion anchor')}, {config.motion_distance} frames apart: "
        f"speed {float(pace * fps / rate):.4g}"
    )


def print_cost_of_bf16(windows_of, autocast):
    """How far a video's first frame in bfloat16 is from the one in float32."""
    exact_frame = next(windows_of(1)).float()
    with autocast:
        difference = (next(windows_of(1)).float() - exact_frame).abs().mean()
    print(f"bf16 changes the first frame by {difference:.2f} of 255 grey levels in the mean")


def print_speed(of_frame, options, device):
    """of_frame: milliseconds by name, as `write_video` names them."""
    compiled = "compiled" if options.compile else "not compiled"
    print(
        f"{of_frame['all']:.2f} ms/frame: rendering and transfer {of_frame['rendering']:.2f}, and "
        f"beside them encoding {of_frame['encoding']:.2f}; peak memory "
        f"{peak_memory_mb(device):.0f} MB, on {device}, {options.precision}, {compiled}, "
        f"kernels: {kernels.summary(device)}"
    )


def counted(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"


def parse_grid(text):
    """'4x3' → (4, 3): rows and columns."""
    match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", text)
    if match is None:
        raise UserError(f"--grid is {text!r}, but must be ROWSxCOLUMNS, such as 4x3")
    return int(match[1]), int(match[2])


def grid_seeds(options, rows, columns):
    """Content and motion seeds of the clips, row by row, as `render` takes them."""

    def numbers(what):
        """Which content, or motion, each clip shows: by its row, its column, neither or both."""
        by_row, by_column = options.rows == what, options.columns == what
        along_column, along_row = (0 if by_column else 1), (0 if by_row else 1)
        if along_column and along_row:
            along_column = columns  # each clip has its own
        return [along_column * r + along_row * c for r in range(rows) for c in range(columns)]

    first_motion = options.seed if options.motion_seed is None else options.motion_seed
    motion = [first_motion + i for i in numbers("motion")]
    path = options.content_seeds
    if not path:
        return [options.seed + i for i in numbers("content")], motion
    # Each clip starts at a seed of its own.
    return [path[i % len(path) :] + path[: i % len(path)] for i in numbers("content")], motion


def parse_gains(texts):
    """['0=0', '3=2'] → {0: 0.0, 3: 2.0}."""
    gains = {}
    for text in texts:
        match = re.fullmatch(r"(\d+)=([-+.\de]+)", text)
        try:
            style, gain = int(match[1]), float(match[2])
        except (TypeError, ValueError):
            raise UserError(f"--motion-style {text}: write k=GAIN, such as 3=0 or 0=1.5") from None
        if style in gains:
            raise UserError(f"--motion-style {text}: style {style} has the gain {gains[style]:g}")
        gains[style] = gain
    return gains


def describe(options, path, fps):
    """What the file remembers of its making: the checkpoint's name and hash, and every option that
    decides a frame.

    fps: that of the video, for which the options may hold None.
    """
    chosen = dataclasses.asdict(options) | {"fps": float(fps)}
    for key in ("checkpoint", "out", "force"):
        del chosen[key]
    return json.dumps(
        {
            "program": "MoStGAN-V",
            "checkpoint": f"{path.resolve().parent.name}/{path.name}",
            "model.safetensors sha256": sha256_of(path / "model.safetensors"),
            "options": chosen,
        }
    )


def main():
    if not sample(tyro.cli(Options, description=__doc__)):
        print("interrupted; the video ends with what was rendered", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_program(main, interrupted="interrupted; nothing was written")
