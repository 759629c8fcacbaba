"""Training speed: frames/s, memory, and where a step's time goes (data, G, D, R1, EMA, ADA), with random clips.

    python bench/train_step.py [--preset paper256] [--kernels triton] [--no-compile] [--batch-split 4] [--out FILE]

"frames/s" is of whole steps one after another, R1 in its turn, nothing waiting in between; the phases are timed one by
one, each waited for, so they add up to a little more. Model-FLOP utilization counts 618 GFLOP per trained frame at
paper256 (spec §11: convolutions and matrix products, gradients included) against a large matrix product in the same run
and dtype. Data are random bytes, copied from pinned memory: decoding is bench/loader.py's question.

On a GPU: paper256, compiled, for each choice of kernels. On a CPU: tiny, eager.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else `kernels` is bench/kernels.py
from bench.timing import describe, do_without, matmul_rate, synchronize, write

do_without("av", "tqdm", "tyro")
import kernels
import train as training
from mostgan.config import train_preset
from mostgan.data import Batch
from mostgan.device import peak_memory_mb, pick_device
from mostgan.run import Stats

GFLOP_PER_FRAME = {"paper256": 618}
CLIPS = SimpleNamespace(lengths=np.full(100, 200), labels=None)


class Step:
    """A training run without a folder: `phases` lists a step's parts, in order."""

    def __init__(self, config, device):
        self.config, self.device = config, device
        kernels.use(config.kernels)
        torch.compiler.reset()
        self.state, self.stats = training.new_state(config, device), Stats(Path("."), device)
        self.state.ada_p = 0.2  # what ADA may come to
        self.objective = training.objectives(config)
        B, T, R = config.batch_clips, config.model.frames_per_clip, config.model.resolution
        t = torch.arange(T, dtype=torch.float64).expand(B, T) * 3
        batch = Batch(torch.randint(256, (B, T, 3, R, R), dtype=torch.uint8), t, torch.zeros(B, dtype=torch.long))
        self.batch = Batch(*(x.pin_memory() for x in batch)) if device.type == "cuda" else batch

    def data(self):
        self.draw = training.Draws(self.config, CLIPS, self.device, self.state)
        self.real = self.draw.pieces(Batch(*(x.to(self.device, non_blocking=True) for x in self.batch)))

    def generator(self):
        self.fakes = training.generator_step(self.state, self.draw, self.objective.generator, self.config, self.stats)

    def discriminator(self):
        training.discriminator_step(self.state, self.real, self.fakes, self.draw, self.objective.discriminator,
                                    self.config, self.stats)  # fmt: skip

    def r1(self):
        training.r1_step(self.state, self.real, self.draw, self.objective.r1, self.config, self.stats)

    def ema(self):
        training.update_ema(self.state, self.config)
        self.state.step += 1

    def ada(self):
        training.adjust_ada(self.state, self.config)
        self.state.ada_p = 0.2

    def __call__(self, timed=None):
        """One step; timed: a dict of lists of milliseconds by phase to add to, each phase waited for."""
        for phase in (self.data, self.generator, self.discriminator, self.r1, self.ema, self.ada):
            if phase == self.r1 and self.state.step % self.config.r1_interval:
                continue
            started = time.perf_counter()
            phase()
            if timed is not None:
                synchronize(self.device)
                timed.setdefault(phase.__name__, []).append(1e3 * (time.perf_counter() - started))


def measure(config, device, steps):
    """A row of the table."""
    step = Step(config, device)
    for _ in range(3):  # compiles everything, R1 too: it comes with step 0
        step()
    step.state.step = 0
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    seconds = (time.perf_counter() - started) / steps
    timed, step.state.step = {}, 0
    for _ in range(3):
        step(timed)
    phases = {name: statistics.median(times) for name, times in timed.items()}
    phases["r1"] = phases.pop("r1") / config.r1_interval  # its share of a step
    frames = config.frames_per_step / seconds
    return dict(kernels=kernels.chosen(device), compiled=config.compile, batch_split=config.batch_split,
                frames_per_second=frames, ms_per_step=1e3 * seconds, peak_memory_mb=peak_memory_mb(device),
                phases_ms=phases)  # fmt: skip


def main():
    device = pick_device()
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("paper256", "tiny"), default="paper256" if on_gpu else "tiny")
    parser.add_argument("--kernels", nargs="+", choices=("triton", "reference"),
                        default=["triton", "reference"] if on_gpu else ["reference"])  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    parser.add_argument("--batch-split", type=int, help="pieces of a batch (default: the preset's)")
    parser.add_argument("--steps", type=int, default=16, help="timed steps (default 16, an interval of R1)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    config = train_preset(args.preset, "sky")
    config = dataclasses.replace(config, compile=args.compile, batch_split=args.batch_split or config.batch_split)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    result = describe(device) | dict(preset=args.preset, dtype=config.precision, rows=[])
    print(f"{args.preset}, steps of {config.frames_per_step} frames, {config.precision}, {result['device']}, "
          f"torch {result['torch']}")
    print(f"{'kernels':12}{'compiled':>9}{'frames/s':>10}{'ms/step':>9}{'MFU':>6}{'peak MB':>9}   phases, ms a step")
    for choice in args.kernels:
        try:
            row = measure(dataclasses.replace(config, kernels=choice), device, args.steps)
        except Exception as error:  # the other row is still worth its time
            result["rows"].append(dict(kernels=choice, error=f"{type(error).__name__}: {error}"))
            print(f"{choice:12} failed: {str(error).splitlines()[0][:90]}")
            continue
        if args.preset in GFLOP_PER_FRAME:
            flop = GFLOP_PER_FRAME[args.preset] * 1e9
            row["model_flop_utilization"] = row["frames_per_second"] * flop / matmul_rate(device, dtype)
        result["rows"].append(row)
        mfu = f"{row['model_flop_utilization']:6.0%}" if "model_flop_utilization" in row else f"{'–':>6}"
        phases = "  ".join(f"{name} {ms:.1f}" for name, ms in row["phases_ms"].items())
        print(f"{row['kernels']:12}{str(row['compiled']):>9}{row['frames_per_second']:10.1f}{row['ms_per_step']:9.1f}"
              f"{mfu}{row['peak_memory_mb']:9.0f}   {phases}", flush=True)
        write(args.out, result)
    failed = sum("error" in row for row in result["rows"])
    if failed:
        sys.exit(f"train_step.py: {failed} of {len(result['rows'])} rows failed")


if __name__ == "__main__":
    main()
