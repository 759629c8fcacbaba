"""Training speed: frames/s, memory, and where a step's time goes (data, G, D, R1, EMA, ADA), with
random clips.

    python bench/train_step.py [--preset paper256] [--kernels triton]
                               [--no-compile] [--batch-split 4] [--out FILE]

The phases are timed one by one, each waited for, R1 last, for it takes longest to compile.
"frames/s" is of steps one after another, nothing waiting in between, with R1's share added.
Model-FLOP utilization counts 618 GFLOP per trained frame at paper256 (spec §11: convolutions and
matrix products, gradients included) against a large matrix product in the same run and dtype. Data
are random bytes, copied from pinned memory: decoding is bench/loader.py's question.

On a GPU: paper256, compiled, for each choice of kernels. On a CPU: tiny, eager.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from types import SimpleNamespace

# Before this folder, whose kernels.py is not the package `kernels`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mostgan  # noqa: F401  before PyTorch, whose threads it tells how to wait

# isort: split
import numpy as np
import torch

from bench.timing import describe, do_without, matmul_rate, synchronize, write

do_without("av", "PIL", "tqdm", "tyro")
import kernels
import train as training
from mostgan.config import train_preset
from mostgan.data import Batch
from mostgan.device import choose_kernels, peak_memory_mb, pick_device
from mostgan.program import run_program
from mostgan.progress import Skips, Stats

GFLOP_PER_FRAME = {"paper256": 618}
CLIPS = SimpleNamespace(lengths=np.full(100, 200), labels=None)


PHASES = ("data", "generator", "discriminator", "ema", "ada")  # of every step; R1 is of some


class Step:
    """The trainer's own loop, without a folder, on random clips."""

    def __init__(self, config, device, backend):
        choose_kernels(config.kernels, False, device)
        torch.compiler.reset()
        self.config, self.device, self.waits, self.milliseconds = config, device, False, {}
        self.state, stats = training.new_state(config, device), Stats(Path("."), device)
        training.open_batches = self.batches
        # Where each phase of the loop ends.
        self.ends("pieces_of", lambda *args: "data")
        names = {"G": "generator", "D": "discriminator", "R1": "r1"}
        self.ends("optimize", lambda adam, phase, *args: names[phase])
        self.ends("update_ema", lambda *args: "ema")
        self.loop = training.steps(self.state, config, CLIPS, device, stats, Skips(), backend)

    def batches(self, config, clips, device, step):
        """Yields the same random clips again and again, copied to the device each time."""
        B, T, R = config.batch_clips, config.model.frames_per_clip, config.model.resolution
        t = torch.arange(T, dtype=torch.float64).expand(B, T) * 3
        frames = torch.randint(256, (B, T, 3, R, R), dtype=torch.uint8)
        batch = Batch(frames, t, torch.zeros(B, 0), torch.zeros(B, T, 0))
        if device.type == "cuda":
            batch = Batch(*(x.pin_memory() for x in batch))
        while True:
            yield Batch(*(x.to(device, non_blocking=True) for x in batch))

    def ends(self, name, phase_of):
        """Has the trainer's function `name` end a phase: phase_of(its arguments)."""
        function = ORIGINAL.setdefault(name, getattr(training, name))

        def ending(*args):
            result = function(*args)
            self.mark(phase_of(*args))
            return result

        setattr(training, name, ending)

    def mark(self, phase):
        if self.waits:
            synchronize(self.device)
            now = time.perf_counter()
            self.milliseconds[phase] = self.milliseconds.get(phase, 0.0) + 1e3 * (now - self.begun)
            self.begun = now

    def __call__(self, r1=False, waits=False):
        """One step, with R1 if asked for. waits: for each phase, adding up their milliseconds."""
        # R1 is of every r1_interval-th step, from 0 on, and ADA's p moves after every ada_interval.
        self.state.step = 0 if r1 else self.config.ada_interval - 1
        self.state.ada_p = 0.2  # what ADA may come to
        self.waits, self.begun = waits, time.perf_counter()
        next(self.loop)
        self.mark("ada")


ORIGINAL = {}  # functions of train.py that a Step has replaced


def measure(config, device, steps, result, backend):
    """A row of the table, entered into `result` phase by phase, so that being cut off leaves what
    was measured.
    """
    started = time.perf_counter()
    step = Step(config, device, backend)
    row = {"kernels": config.kernels, "compiled": config.compile, "batch_split": config.batch_split}
    row["phases_ms"] = {}
    result["rows"].append(row)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()  # compiles, and chooses kernels; the second one lets CUDA graphs settle
    synchronize(device)
    row["first_step_seconds"] = time.perf_counter() - started
    step()
    row["kernels_chosen"] = kernels.summary(device)
    synchronize(device)
    for _ in range(3):
        step(waits=True)
    row["phases_ms"] = {phase: step.milliseconds[phase] / 3 for phase in PHASES}
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    row["ms_per_step_without_r1"] = 1e3 * (time.perf_counter() - began) / steps
    row["peak_memory_mb"] = peak_memory_mb(device)
    yield row
    step(r1=True)
    synchronize(device)
    for _ in range(3):
        step(r1=True, waits=True)
    row["phases_ms"]["r1"] = step.milliseconds["r1"] / 3 / config.r1_interval  # its share of a step
    row["ms_per_step"] = row["ms_per_step_without_r1"] + row["phases_ms"]["r1"]
    row["frames_per_second"] = 1e3 * config.frames_per_step / row["ms_per_step"]
    row["peak_memory_mb"] = peak_memory_mb(device)
    yield row


def show(row):
    """One line: of whole steps once R1 has been measured, before that of the other phases."""
    figures = [
        f"{row[key]:{width}}" if key in row else f"{'–':>{width.split('.')[0]}}"
        for key, width in (
            ("frames_per_second", "10.1f"),
            ("ms_per_step", "9.1f"),
            ("model_flop_utilization", "6.0%"),
            ("peak_memory_mb", "9.0f"),
        )
    ]
    phases = "  ".join(f"{name} {ms:.1f}" for name, ms in row["phases_ms"].items())
    print(f"{row['kernels']:12}{row['compiled']!s:>9}{''.join(figures)}   {phases}", flush=True)


def main():
    device = pick_device()
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=("paper256", "tiny"), default="paper256" if on_gpu else "tiny"
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=("auto", "triton", "reference"),
        default=["auto", "reference"] if on_gpu else ["reference"],
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    parser.add_argument("--batch-split", type=int, help="pieces of a batch (default: the preset's)")
    parser.add_argument(
        "--steps", type=int, default=16, help="timed steps (default 16, an interval of R1)"
    )
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny model and aot_eager, only to try the program"
    )
    args = parser.parse_args()
    config = train_preset(args.preset, "sky")
    config = dataclasses.replace(
        config, compile=args.compile, batch_split=args.batch_split or config.batch_split
    )
    if args.dry_run:
        model = dataclasses.replace(config.model, resolution=32, channel_base=256, channel_max=8)
        config = dataclasses.replace(
            config, model=model, batch_clips=2, augment="bgc", compile=True
        )
        args.kernels, args.steps = ["auto"], 1
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    rate = matmul_rate(device, dtype)
    result = describe(device) | dict(
        preset=args.preset, dtype=config.precision, matmul_flop_per_s=rate, rows=[]
    )
    print(
        f"{args.preset}, steps of {config.frames_per_step} frames, {config.precision}, "
        f"{result['device']}, "
        f"torch {result['torch']}"
    )
    print(
        f"{'kernels':12}{'compiled':>9}{'frames/s':>10}{'ms/step':>9}{'MFU':>6}{'peak MB':>9}   "
        "phases, ms a step"
    )
    for choice in args.kernels:
        rows = measure(
            dataclasses.replace(config, kernels=choice),
            device,
            args.steps,
            result,
            "aot_eager" if args.dry_run else "inductor",
        )
        try:
            for row in rows:
                if args.preset in GFLOP_PER_FRAME and "frames_per_second" in row:
                    row["ceiling_frames_per_second"] = rate / (GFLOP_PER_FRAME[args.preset] * 1e9)
                    share = row["frames_per_second"] / row["ceiling_frames_per_second"]
                    row["model_flop_utilization"] = share
                show(row)
                write(args.out, result)
        except Exception as error:  # the other row is still worth its time
            result["rows"].append(dict(kernels=choice, error=f"{type(error).__name__}: {error}"))
            print(f"{choice:12} failed: {(str(error).splitlines() or [''])[0][:90]}")
            write(args.out, result)
    failed = sum("error" in row for row in result["rows"])
    if failed:
        sys.exit(f"train_step.py: {failed} of {len(result['rows'])} rows failed")


if __name__ == "__main__":
    run_program(main)
