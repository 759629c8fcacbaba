"""Is anything lost? Kills, full disks, damaged checkpoints, signals and a killed process, on a tiny
run.

    python bench/faults.py [--kills 30 …] [--out bench/results/faults-cpu.json]

A drill whose number is 0 is left out, and what the file already holds of it is kept. Each time the
same command is started again until the run is finished; its parameters and the whole training state
must then have the bits of a run that was never interrupted, and stats.jsonl one line per step.
Then: what checkpoints cost the preset `tiny`. Runs on CPUs, in a temporary folder: one process
takes its two pieces side by side, two processes one each. Takes about half an hour.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

# Before this folder, whose kernels.py is not the package `kernels`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train as training
from mostgan import checkpoint
from mostgan.checkpoint.training import Saver
from mostgan.config import UserError, train_preset

ROOT = Path(__file__).resolve().parents[1]
STEPS, CLIPS, FRAMES = 60, 4, 3
PATIENCE = 1800  # seconds, on a machine that others use too
MODEL = (
    "--resolution 32 --channel-base 128 --channel-max 8 --z-dim 16 --w-dim 16 --motion-noise-dim "
    "16 "
    "--motion-code-dim 16 --num-frequencies 8 --motion-vector-dim 8 --motion-styles 2 "
    "--motion-resolutions 16 "
    "--discriminator-hidden-dim 16 --mbstd-group 2"
)
RUN = (
    f"--preset tiny {MODEL} --batch-clips {CLIPS} --batch-split 2 --augment bgc --ada-kclips 0.5 "
    "--r1-interval 4 "
    f"--log-kframes {CLIPS * FRAMES / 1000} --save-minutes 0.01 --total-kframes {{kframes}} --out "
    f"{{out}} --resume"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3"]


class Failed(Exception):
    """The drill found something lost."""


class Run:
    """A run folder and the command that starts it and goes on with it."""

    def __init__(self, out, steps=STEPS, launcher=(sys.executable,)):
        self.out, self.steps, self.output = Path(out), steps, Path(f"{out}.txt")
        arguments = RUN.format(kframes=steps * CLIPS * FRAMES / 1000, out=out).split()
        self.command = [*launcher, str(ROOT / "train.py"), *arguments]

    def start(self):
        threads = "1" if TORCHRUN[2] in self.command else "2"
        with open(self.output, "a") as file:
            return subprocess.Popen(
                self.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": threads},
            )

    def finish(self):
        """Start, and let it come to its end."""
        if code := self.start().wait(timeout=PATIENCE):
            raise Failed(f"{self.out}: exit status {code}: {self.output.read_text()[-1000:]}")

    def newest(self):
        """The newest checkpoint's step, 0 without; every checkpoint must be whole."""
        found = [path for path in self.out.glob("checkpoint-*") if path.is_dir()]
        for path in found:
            if wrong := checkpoint.damage(path):
                raise Failed(f"{path}: {wrong}")
        return max((int(path.name.split("-")[1]) for path in found), default=0)

    def last_step(self):
        """The last step in stats.jsonl, 0 without."""
        steps = re.findall(r'^{"step": (\d+),.*}$', (self.text("stats.jsonl")), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def text(self, name):
        return (self.out / name).read_text() if (self.out / name).exists() else ""

    def saving(self):
        return any(self.out.glob(".saving-*"))

    def wait(self, process, until, seconds=PATIENCE):
        """Wait until until() or the process's end, whichever is first. Returns whether it still
        runs.
        """
        deadline = time.monotonic() + seconds
        while process.poll() is None and not until():
            if time.monotonic() > deadline:
                raise Failed(f"{self.out}: waited for nothing: {self.output.read_text()[-1000:]}")
            time.sleep(0.001)
        return process.poll() is None

    def state(self):
        """Every tensor and value of the last checkpoint but the time."""
        path = self.out / checkpoint.CHECKPOINT_NAME.format(self.steps)
        tensors, scalars = checkpoint.read_training(path)
        return tensors | {
            f"ema.{key}": value for key, value in load_file(path / "model.safetensors").items()
        }, scalars

    def check(self, reference):
        """Finished, with the reference's bits, and a line of stats.jsonl per step."""
        (tensors, scalars), (expected, values) = self.state(), reference.state()
        differ = [key for key in expected if not torch.equal(tensors[key], expected[key])]
        differ += [key for key in values if key != "seconds" and scalars[key] != values[key]]
        steps = [json.loads(line)["step"] for line in self.text("stats.jsonl").splitlines()]
        if differ or steps != list(range(1, self.steps + 1)):
            raise Failed(
                f"{self.out}: {len(differ)} tensors and values differ ({differ[:3]}); steps "
                f"logged: {steps}"
            )


def kills(folder, rng, count, reference):
    """SIGKILL at random moments from the start of the process on, every other one aimed at a
    save.
    """
    inside, lost, runs, done = 0, 0, 0, 0
    run = Run(folder / "killed-0")
    while done < count:
        process, before = run.start(), run.newest()
        if done % 2:
            moment = time.monotonic() + rng.uniform(0, 15)
            running = run.wait(process, lambda moment=moment: time.monotonic() > moment)
        else:
            old = run.saving()  # left by the kill before; removed when the run goes on
            running = old and run.wait(process, lambda run=run: not run.saving()) or not old
            after = rng.randrange(3)
            for _ in range(after + 1):  # the first, second or third save of this start
                running = running and run.wait(process, lambda run=run: not run.saving())
                running = running and run.wait(process, run.saving)
            time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.wait()
        if running:
            done, inside = done + 1, inside + run.saving()
            newest = run.newest()
            if newest < before:
                raise Failed(
                    f"{run.out}: the newest checkpoint was {before}, after the kill {newest}"
                )
            lost = max(lost, run.last_step() - newest)
        else:  # it had come to its end
            run.check(reference)
            runs += 1
            run = Run(folder / f"killed-{runs}")
    run.finish()
    run.check(reference)
    return {"times": count, "inside a save": inside, "runs": runs + 1, "most steps redone": lost}


def full_disks(folder, rng, count, reference):
    """Files may not grow beyond 100 kB from the first checkpoint on: until a save has failed, or
    until the end.
    """
    to_the_end = 0
    for i in range(count):
        run = Run(folder / f"full-{i}")
        process = run.start()
        run.wait(process, run.newest)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        run.wait(process, lambda run=run: "could not save" in run.output.read_text())
        run.newest()
        if i % 2:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            if process.wait(timeout=PATIENCE):
                raise Failed(f"{run.out}: did not go on after the disk had room again")
        else:
            to_the_end += 1
            if (
                not process.wait(timeout=PATIENCE)
                or "make room and go on with" not in run.output.read_text()
            ):
                raise Failed(f"{run.out}: ended as if its last save had not failed")
            run.newest()
            run.finish()
        run.check(reference)
    return {"times": count, "full to the end": to_the_end}


def damages(folder, rng, count, reference):
    """The newest checkpoint truncated, with a byte flipped, or with a file missing."""
    base = Run(folder / "base", 12)
    base.finish()
    kinds = {"truncated": 0, "flipped byte": 0, "missing file": 0}
    for i in range(count):
        run, kind = Run(folder / f"damaged-{i}", 12), list(kinds)[i % 3]
        shutil.copytree(base.out, run.out)
        newest = run.out / checkpoint.CHECKPOINT_NAME.format(12)
        file = newest / rng.choice([*checkpoint.FILES, "checksums.json"])
        data = bytearray(file.read_bytes())
        if kind == "missing file":
            file.unlink()
        else:
            at = rng.randrange(len(data) - 1)
            data[at] ^= 1 << rng.randrange(8)
            file.write_bytes(data[:at] if kind == "truncated" else data)
        run.finish()
        # A wrong checksum speaks against the file it is of.
        named = "" if file.name == "checksums.json" else file.name
        if f"warning: {newest} is damaged and passed over: {named}" not in run.output.read_text():
            raise Failed(f"{run.out}: {file.name} ({kind}) was not named: {run.output.read_text()}")
        run.check(reference)
        kinds[kind] += 1
    return {"times": count, **kinds}


def signals(folder, rng, count, reference):
    """SIGTERM at a random moment of the training."""
    lost = 0
    for i in range(count):
        run = Run(folder / f"term-{i}")
        process, step = run.start(), rng.randrange(1, STEPS * 3 // 4)
        run.wait(process, lambda run=run, step=step: run.last_step() >= step)
        process.send_signal(signal.SIGTERM)
        if process.wait(timeout=PATIENCE) or "train.py --resume" not in run.output.read_text():
            raise Failed(f"{run.out}: did not save and exit 0: {run.output.read_text()[-500:]}")
        lost = max(lost, run.last_step() - run.newest())
        run.finish()
        run.check(reference)
    return {"times": count, "most steps redone": lost}


def killed_ranks(folder, rng, count, reference):
    """SIGKILL of one of two processes under torchrun, which restarts them; nobody starts anything
    again.

    The reference is the run of one process: with two pieces of a batch in all, the bits are the
    same.
    """
    redone = 0
    for i in range(count):
        run = Run(folder / f"rank-{i}", launcher=TORCHRUN)
        process, step = run.start(), rng.randrange(STEPS // 4, STEPS // 2)
        run.wait(process, lambda run=run, step=step: run.last_step() >= step)
        os.kill(workers(process.pid)[i % 2], signal.SIGKILL)
        redone = max(redone, run.last_step() - run.newest())
        if code := process.wait(timeout=PATIENCE):
            raise Failed(f"{run.out}: torchrun ended with {code}: {run.output.read_text()[-2000:]}")
        run.check(reference)
    return {
        "times": count,
        "rank 0": (count + 1) // 2,
        "rank 1": count // 2,
        "most steps redone": redone,
    }


def workers(parent):
    """Processes of train.py that torchrun started, by rank (Linux)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                environment = (stat.parent / "environ").read_bytes()
                found[int(re.search(rb"(?:^|\0)RANK=(\d+)", environment).group(1))] = int(
                    stat.parent.name
                )
        except (OSError, AttributeError):
            continue
    return [found[rank] for rank in sorted(found)]


def cost(folder):
    """What share of a run of the preset `tiny` its checkpoints take at the default interval, upper
    bound: the time that training waits, and the time that the writing thread takes, as if it all
    were taken from training.
    """
    torch.set_num_threads(1)
    config = dataclasses.replace(train_preset("tiny", "sky"), total_kframes=0.96)
    training.train(config, folder / "cost")
    lines = (folder / "cost" / "stats.jsonl").read_text().splitlines()
    state, times = training.new_state(config, torch.device("cpu")), []
    training.load_state(state, checkpoint.find(folder / "cost"))
    saver = Saver(folder / "cost", None, 10, 2, print)
    for _ in range(10):
        state.step += 1
        begun = time.perf_counter()
        saver.start(state)
        waited = time.perf_counter()
        saver.finish()
        times.append((waited - begun, time.perf_counter() - begun))
    waits, whole = (statistics.median(column) for column in zip(*times))
    interval = config.snapshot_kframes * 1000 / json.loads(lines[-1])["frames_per_second"]
    return {
        "training waits, s": round(waits, 4),
        "whole save, s": round(whole, 4),
        "seconds of training between saves": round(interval, 1),
        "share": round(whole / interval, 5),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, count in (
        ("kills", 30),
        ("full-disks", 5),
        ("damages", 20),
        ("signals", 5),
        ("killed-ranks", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument(
        "--cost", type=int, default=1, help="0: do not measure what checkpoints cost"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "faults-cpu.json")
    args = parser.parse_args()
    args.out = args.out.resolve()
    drills = {
        "SIGKILL at random moments": (kills, args.kills, STEPS),
        "disk full while saving": (full_disks, args.full_disks, STEPS),
        "newest checkpoint damaged": (damages, args.damages, 12),
        "SIGTERM": (signals, args.signals, STEPS),
        "one of two processes killed under torchrun": (killed_ranks, args.killed_ranks, STEPS),
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        references = {steps: Run(f"uninterrupted-{steps}", steps) for steps in (STEPS, 12)}
        for reference in references.values():
            reference.finish()
        for name, (drill, count, steps) in drills.items():
            if not count:
                continue
            started = time.perf_counter()
            results[name] = drill(Path(folder), random.Random(args.seed), count, references[steps])
            detail = ", ".join(
                f"{key} {value}" for key, value in results[name].items() if key != "times"
            )
            print(
                f"{name:44s} {results[name]['times']:3d}  same bits  {detail}  "
                f"({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
        if args.cost:
            results["cost"] = cost(Path(folder))
            print(f"a checkpoint of the preset tiny: {results['cost']}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(args.out.read_text())["drills"] if args.out.exists() else {}
    record = {
        "steps": STEPS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "drills": kept | results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (Failed, UserError) as error:
        sys.exit(f"faults.py: {error}")
