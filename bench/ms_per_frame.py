"""ms per generated frame at the paper's 256² configuration: eager, compiled, and with the Triton
kernels.

    python bench/ms_per_frame.py [--frames 1 16 64] [--variants eager compiled triton ...]
                                 [--precision bf16] [--busy 2] [--out results.json]

A row renders windows of so many frames of one clip. Its floor is the larger of a frame's arithmetic
(30.8 GFLOP, spec §11: twice the multiply-adds of convolutions and matrix products) at the rate of a
large matrix product, and its memory traffic (100 MB, the lower estimate of the performance plan) at
that of a large copy, both measured in this run, so that the fraction does not depend on how fast
the machine is today. Weights are random: speed does not depend on them.

"on host": the same with every frame brought to host memory. On a GPU in bfloat16, and all variants
by default; on a CPU in float32, and eager: compiling takes minutes there.

--busy N, instead of all this, on a CPU: sampling by the first variant, and a training step of the
preset `tiny`, alone and beside N processes that keep a core busy each, in turn; and how many times
longer it takes then.

Below the rows: a video by the fastest of them, from the first latent to the finished mp4, written
as sample.py writes it, beside the same frames rendered only.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before this folder, whose kernels.py is not the package `kernels`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mostgan  # noqa: F401  before PyTorch, whose threads it tells how to wait

# isort: split
import torch

import kernels
from bench.timing import copy_rate, describe, matmul_rate, seconds, write
from mostgan.config import ModelConfig, train_preset
from mostgan.device import choose_kernels, peak_memory_mb, pick_device, to_host
from mostgan.model import Generator
from mostgan.program import run_program
from mostgan.rendering import render as render_video

GFLOP_PER_FRAME, MB_PER_FRAME = 30.8, 100
VARIANTS = {  # name → kernels, torch.compile's mode (None: eager)
    "auto compiled, CUDA graphs": ("auto", "reduce-overhead"),
    "compiled": ("reference", "default"),
    "eager": ("reference", None),
    "auto": ("auto", None),
    "triton": ("triton", None),
    "triton compiled": ("triton", "default"),
    "triton compiled, CUDA graphs": ("triton", "reduce-overhead"),
    "dry run": ("auto", "aot_eager"),
}


def make_generator(variant, device, config):
    """A generator that renders as the variant says."""
    kernels_choice, mode = VARIANTS[variant]
    choose_kernels(kernels_choice, False, device)
    torch.compiler.reset()
    torch.manual_seed(0)
    generator = Generator(config).to(device).eval().requires_grad_(False)
    if mode == "aot_eager":
        generator.synthesis.compile(fullgraph=True, dynamic=False, backend=mode)
    elif mode is not None:
        generator.synthesis.compile(fullgraph=True, dynamic=False, mode=mode)
    return generator


def measure(variant, frames, device, dtype, repeats, config):
    """(seconds per frame, the same with every frame brought to host memory, peak MB) of windows
    of `frames` frames of one clip, in uint8.
    """
    generator = make_generator(variant, device, config)
    windows = max(1, 64 // frames) if device.type == "cuda" else 1

    def render(to=lambda windows, device: windows):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for _ in to(render_video(generator, 0, 0, frames * windows, window=frames), device):
                pass

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    per_frame = seconds(render, device, repeats, warmups=2) / (frames * windows)
    hosted = seconds(lambda: render(to_host), device, repeats, warmups=1) / (frames * windows)
    return per_frame, hosted, peak_memory_mb(device)


def end_to_end(variant, window, device, dtype, repeats, config):
    """A video of four windows (a GPU: of 1,024 frames at least), rendered only and to a finished
    mp4, in turn.
    """
    from mostgan.video import VideoWriter  # here: the rest does without PyAV

    generator = make_generator(variant, device, config)
    frames = window * (4 if device.type == "cpu" else max(4, 1024 // window))
    times = []
    with (
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        tempfile.TemporaryDirectory() as folder,
    ):
        for _ in range(repeats + 1):
            started = time.perf_counter()
            for pictures in render_video(generator, seed=0, frames=frames, window=window):
                pictures.cpu()
            rendered = time.perf_counter()
            with VideoWriter(Path(folder, "sample.mp4"), 25) as video:
                for pictures in render_video(generator, seed=0, frames=frames, window=window):
                    video.write(pictures[0].cpu())
            times.append((rendered - started, time.perf_counter() - rendered, video.seconds))
    # The first is a warm-up.
    render_only, to_mp4, encoding = (statistics.median(column) for column in zip(*times[1:]))
    return dict(
        variant=variant,
        frames=frames,
        render_fps=frames / render_only,
        mp4_fps=frames / to_mp4,
        encoding_ms_per_frame=encoding / frames * 1e3,
    )


@contextlib.contextmanager
def busy_processes(count):
    """While it lasts, so many processes keep a core busy each."""
    # They end with this process, however it ends.
    command = [sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def beside_others(count, variant, frames, device, dtype, repeats, config):
    """Milliseconds of a sampled frame and of a training step, quiet and busy: {name: median}."""
    from bench.train_step import Step

    generator = make_generator(variant, device, config)
    precision = "float32" if dtype == torch.float32 else "bf16"
    preset = dataclasses.replace(train_preset("tiny", "sky"), compile=False, precision=precision)
    step = Step(preset, device, "inductor")

    def sample():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for _ in render_video(generator, 0, 0, frames):
                pass

    def train():
        for _ in range(preset.r1_interval):  # one of them with R1
            step()

    works = {"sampling": (sample, frames), "training": (train, preset.r1_interval)}
    times = {f"{work}_{how}_ms": [] for work in works for how in ("quiet", "busy")}
    for round_ in range(repeats + 1):
        for others in (0, count):
            with busy_processes(others):
                for work, (run, pieces) in works.items():
                    milliseconds = 1e3 * seconds(run, device, 1, warmups=0) / pieces
                    # The first round is a warm-up.
                    if round_:
                        times[f"{work}_{'busy' if others else 'quiet'}_ms"].append(milliseconds)
    return {name: statistics.median(all_) for name, all_ in times.items()}


def print_beside_others(count, times):
    for work, unit in (("sampling", "frame"), ("training", "step")):
        quiet, busy = times[f"{work}_quiet_ms"], times[f"{work}_busy_ms"]
        print(
            f"{work}: {quiet:.1f} ms/{unit} quiet, {busy:.1f} beside {count} busy processes: "
            f"{busy / quiet:.2f} x"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--frames", type=int, nargs="+", help="frames of a window (default 16; on a GPU 1 16 64)"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, help="default eager; on a GPU all"
    )
    parser.add_argument("--resolution", type=int, default=256, help="smaller for a quick look")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="times rendered, of which the median counts (default 5)",
    )
    parser.add_argument(
        "--precision", choices=("float32", "bf16"), help="default float32; on a GPU bf16"
    )
    parser.add_argument("--busy", type=int, help="measure beside so many busy processes")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny model, only to try the program"
    )
    args = parser.parse_args()
    device = pick_device()
    if args.busy is not None and (args.busy < 1 or device.type == "cuda"):
        parser.error("--busy takes at least 1 process, and measures on a CPU only")
    if args.dry_run:
        args.frames, args.variants, args.repeats, args.resolution = [2], ["dry run"], 1, 32
    on_gpu = device.type == "cuda"
    precision = args.precision or ("bf16" if on_gpu else "float32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = ModelConfig(resolution=args.resolution)
    if args.dry_run:
        config = ModelConfig(resolution=32, channel_base=256, channel_max=16)
    rows, rates = [], []
    result = describe(device) | dict(
        resolution=args.resolution, dtype=str(dtype).removeprefix("torch.")
    )
    print(
        f"MoStGAN-V {args.resolution}², one clip, {result['dtype']}, {result['device']}, torch "
        f"{result['torch']}"
    )
    if args.busy:
        variant, frames = (args.variants or ["eager"])[0], (args.frames or [16])[0]
        times = beside_others(args.busy, variant, frames, device, dtype, args.repeats, config)
        print_beside_others(args.busy, times)
        write(args.out, result | times)
        return
    print(
        f"{'variant':32}{'frames':>7}{'ms/frame':>10}{'on host':>10}{'GFLOP/s':>10}{'peak MB':>9}"
        f"{'of matmul':>11}{'of floor':>10}"
    )
    bandwidth = copy_rate(device)
    for variant in args.variants or (
        [v for v in VARIANTS if v != "dry run"] if on_gpu else ["eager"]
    ):
        for frames in args.frames or ([1, 16, 64] if on_gpu else [16]):
            # The matmul is timed before and after: a shared machine's clock may change in between.
            before = matmul_rate(device, dtype, args.repeats)
            try:
                per_frame, hosted, peak = measure(
                    variant, frames, device, dtype, args.repeats, config
                )
            except Exception as error:  # the other variants are still worth their time
                rows.append(
                    dict(
                        variant=variant,
                        frames_per_window=frames,
                        error=f"{type(error).__name__}: {error}",
                    )
                )
                print(f"{variant:32}{frames:>7}  failed: {str(error).splitlines()[0][:60]}")
                continue
            rate = 2 / (1 / before + 1 / matmul_rate(device, dtype, args.repeats))
            row = dict(
                variant=variant,
                frames_per_window=frames,
                ms_per_frame=per_frame * 1e3,
                ms_per_frame_on_host=hosted * 1e3,
                peak_memory_mb=peak,
                kernels=kernels.summary(device),
            )
            if args.resolution == 256:  # the arithmetic of a frame is known
                row["gflop_per_s"] = GFLOP_PER_FRAME / per_frame
                row["fraction_of_matmul_rate"] = GFLOP_PER_FRAME * 1e9 / per_frame / rate
                floor = max(GFLOP_PER_FRAME * 1e9 / rate, MB_PER_FRAME * 1e6 / bandwidth)
                row["floor_ms"], row["fraction_of_floor"] = floor * 1e3, floor / per_frame
            rows.append(row)
            rates.append(rate)
            show(row)
            write(args.out, result | dict(rows=rows))
    measured = [row for row in rows if "error" not in row]
    if not measured:
        sys.exit("ms_per_frame.py: every variant failed")
    result |= dict(
        matmul_gflop_per_s=sum(rates) / len(rates) / 1e9, copy_gb_per_s=bandwidth / 1e9, rows=rows
    )
    best = min(measured, key=lambda row: row["ms_per_frame"])
    if importlib.util.find_spec("av") and not args.dry_run:
        video = end_to_end(
            best["variant"], best["frames_per_window"], device, dtype, args.repeats, config
        )
        result["end_to_end"] = video
        print(
            f"{video['frames']} frames to a finished mp4, {video['variant']}: "
            f"{video['mp4_fps']:.2f} frames/s, "
            f"rendered only {video['render_fps']:.2f}; encoding "
            f"{video['encoding_ms_per_frame']:.2f} ms/frame"
        )
    else:
        print("PyAV is not installed: nothing is written to an mp4")
    print(
        f"matrix product {result['matmul_gflop_per_s']:.0f} GFLOP/s, copy {bandwidth / 1e9:.0f} "
        "GB/s"
    )
    write(args.out, result)
    if "fraction_of_matmul_rate" in measured[-1]:
        print(f"fraction of matmul rate: {measured[-1]['fraction_of_matmul_rate']:.2f}")
    if len(measured) < len(rows):
        sys.exit(f"ms_per_frame.py: {len(rows) - len(measured)} of {len(rows)} rows failed")


def show(row):
    known = f"{row['gflop_per_s']:10.0f}" if "gflop_per_s" in row else f"{'–':>10}"
    fractions = "".join(
        f"{row[key]:{width}.2f}" if key in row else f"{'–':>{width}}"
        for key, width in (("fraction_of_matmul_rate", 11), ("fraction_of_floor", 10))
    )
    print(
        f"{row['variant']:32}{row['frames_per_window']:>7}{row['ms_per_frame']:10.3f}"
        f"{row['ms_per_frame_on_host']:10.3f}{known}"
        f"{row['peak_memory_mb']:9.0f}{fractions}",
        flush=True,
    )


if __name__ == "__main__":
    run_program(main)
