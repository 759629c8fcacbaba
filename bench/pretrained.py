"""Trains, scores and writes anew the small model that comes with this package:

    python bench/pretrained.py      # → mostgan/pretrained/sky64

It is trained by train.py on the built-in procedural sky alone, for hours of a CPU. Interrupted, the
same command goes on. provenance.json beside the model says how it was made.
"""

import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
import tyro

# Before this folder, whose kernels.py is not the package `kernels`.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.timing import describe  # noqa: E402
from mostgan import checkpoint  # noqa: E402
from mostgan.checkpoint import BUILT_IN, write_json, write_tensors  # noqa: E402
from mostgan.config import UserError  # noqa: E402
from mostgan.files import whole_folder  # noqa: E402
from mostgan.prepare import pack_sky  # noqa: E402
from mostgan.prepare.sky import VERSION  # noqa: E402
from mostgan.program import run_program  # noqa: E402

TRAINING = "--eval-every 25 --snapshot-kframes 25"
CLIPS = 512  # more than `--dataset sky` makes: D sees each of them some hundred times


def make(kframes: float = 200, work: Path = ROOT / "runs" / "pretrained", out: Path = BUILT_IN):
    """Trains for `kframes` thousand frames in the folder `work`, and writes the checkpoint with the
    best proxy FVD16 to `out`.
    """
    clips, others, run = work / "sky", work / "other-sky", work / "run"
    work.mkdir(parents=True, exist_ok=True)
    pack_sky(clips, 64, CLIPS)
    pack_sky(others, 64, CLIPS, seed=1)
    start = ["--preset tiny --dataset sky --motion-distance 32", TRAINING, "--data", clips]
    start = ["--resume", run] if (run / "config.json").exists() else [*start, "--out", run]
    program("train.py", *start, "--total-kframes", f"{kframes:g}")
    best = checkpoint.best_checkpoint(run) or checkpoint.find(run)
    scores = {
        "the model": score(work, best, "--data", others),
        "the sky itself": score(work, clips, others, "--random-windows"),
    }
    publish(best, out, scores)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB from {best}")


def program(*words):
    """Runs a program of this checkout: words are strings of options, and paths. UserError where it
    does not end well.
    """
    command = [sys.executable]
    for word in words:
        command += [str(word)] if isinstance(word, Path) else word.split()
    print(" ".join(command), flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        raise UserError("the command above failed")


def score(work, *words):
    """What `python -m mostgan.metrics` measures: name → mean and deviation of three runs."""
    result = work / "scores.json"
    protocol = "--runs 3 --clips 256 --frames 64 --long-clips 0"
    program("-m mostgan.metrics", *words, protocol, "--out", result)
    results = json.loads(result.read_text())["results"]
    return {name: {"mean": of["mean"], "std": of["std"]} for name, of in results.items()}


def publish(best, out, scores):
    """Writes the averaged generator of a checkpoint in bf16, with its configuration and origin."""
    about = describe(torch.device("cpu")) | {"processor": processor()}
    about |= {
        "made by": "python bench/pretrained.py",
        "data": f"{CLIPS} clips of the built-in procedural sky, version {VERSION}; nothing else",
        "checkpoint": best.name,
        "training": json.loads((best.parent / "config.json").read_text()),
        "scores": scores,
    }
    state = checkpoint.read_networks(best)["ema"]
    with whole_folder(out) as folder:
        half = {name: tensor.bfloat16() for name, tensor in state.items()}
        write_tensors(folder / "model.safetensors", half)
        write_json(folder / "config.json", dataclasses.asdict(checkpoint.read_config(best)))
        write_json(folder / "provenance.json", about)


def processor():
    """The name of this machine's processor, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    run_program(
        lambda: tyro.cli(make, description=__doc__), "interrupted; the same command goes on"
    )
