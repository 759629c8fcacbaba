"""Trains, scores and writes anew the small model that comes with this package:

    python bench/pretrained.py      # → mostgan/pretrained/sky64

It is trained by train.py on the built-in procedural sky alone, for about two hours of one core that
has bf16 instructions (with OMP_NUM_THREADS=1). Interrupted, the same command goes on.
provenance.json beside the model says how it was made.
"""

import dataclasses
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import torch
import tyro

# Before this folder, whose kernels.py is not the package `kernels`.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.timing import describe, frames_trained  # noqa: E402
from mostgan import checkpoint  # noqa: E402
from mostgan.checkpoint import BUILT_IN, write_json, write_tensors  # noqa: E402
from mostgan.config import UserError  # noqa: E402
from mostgan.files import read_json, whole_folder  # noqa: E402
from mostgan.prepare import pack_sky  # noqa: E402
from mostgan.prepare.sky import VERSION  # noqa: E402
from mostgan.program import run_program  # noqa: E402

PATIENCE = 5  # seconds for a program to end by itself
CLIPS = 512  # more than `--dataset sky` makes: D sees each of them some two hundred times
TRAINING = (
    "--preset tiny --dataset sky --motion-distance 32 --precision bf16 --snapshot-kframes 10 "
    "--batch-split 1"
)
# Up to how many thousand frames a stage goes, and what it changes. The preset's rates and γ make
# pictures soon; a weaker R1 then sharpens them, twice, and lower rates let them settle. The odd
# numbers are those of a run that was steered by its pictures, which this repeats. From the third
# stage on, stats.jsonl has scores.
SETTLE = "--generator-lr 0.001 --discriminator-lr 0.001 --ema-half-life-kclips 3 --eval-every 25"
STAGES = (
    (80, ""),
    (109, "--r1-gamma 1"),
    (258, SETTLE),
    (310, "--r1-gamma 0.3"),
    (math.inf, "--generator-lr 0.0003 --discriminator-lr 0.0003"),
)


def make(kframes: float = 340, work: Path = ROOT / "runs" / "pretrained", out: Path = BUILT_IN):
    """Trains for `kframes` thousand frames in the folder `work`, and writes the last checkpoint to
    `out`.
    """
    work, out = work.resolve(), out.resolve()
    clips, others, run = work / "sky", work / "other-sky", work / "run"
    work.mkdir(parents=True, exist_ok=True)
    pack_sky(clips, 64, CLIPS)
    pack_sky(others, 64, CLIPS, seed=1)
    train(run, clips, kframes)
    last = checkpoint.find(run)
    scores = {
        "the model": score(work, last, "--data", others),
        "the sky itself": score(work, clips, others, "--random-windows"),
    }
    publish(last, out, scores, read_lines(work / "starts.jsonl"))
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB from {last}")


def train(run, clips, kframes):
    """Trains in a run folder, stage after stage, from where it is now. starts.jsonl beside it keeps
    what was started when.
    """
    for end, changes in STAGES:
        end, begin = min(end, kframes), frames_trained(run) / 1000
        if begin >= end:
            continue
        started = {"from kframes": begin, "commit": describe(torch.device("cpu"))["commit"]}
        with open(run.parent / "starts.jsonl", "a") as file:
            file.write(json.dumps(started | {"options": changes}) + "\n")
        new = [TRAINING, "--data", clips, "--out", run]
        start = ["--resume", run] if (run / "config.json").exists() else new
        program("train.py", *start, changes, "--total-kframes", str(end))
        # A signal stopped it, for which train.py saves and ends well.
        if frames_trained(run) < round(1000 * end):
            raise KeyboardInterrupt


def read_lines(path):
    """The values in a file with one in JSON on each line; none without the file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def program(*words):
    """Runs a program of this checkout: words are strings of options, and paths. UserError where it
    does not end well.
    """
    command = [sys.executable]
    for word in words:
        command += [str(word)] if isinstance(word, Path) else word.split()
    print(" ".join(command), flush=True)
    child = subprocess.Popen(command, cwd=ROOT)
    try:
        status = child.wait()
    except KeyboardInterrupt:  # which a terminal sends to the child, too: it saves what it has
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        raise
    if status:
        raise UserError("the command above failed")


def score(work, *words):
    """What `python -m mostgan.metrics` measures: name → mean and deviation of three runs."""
    result = work / "scores.json"
    protocol = "--runs 3 --clips 256 --frames 64 --long-clips 0"
    program("-m mostgan.metrics", *words, protocol, "--out", result)
    results = json.loads(result.read_text())["results"]
    return {name: {"mean": of["mean"], "std": of["std"]} for name, of in results.items()}


def publish(path, out, scores, starts=()):
    """Writes the averaged generator of a checkpoint in bf16, with its configuration and origin.
    starts: how its training was started and gone on with, as `train` keeps it.
    """
    # Without what is of this machine: where the clips are.
    training = read_json(path.parent / "config.json")
    training = {name: value for name, value in training.items() if name not in ("data", "cache")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = describe(device) | {"processor": processor()}
    about |= {
        "made by": "python bench/pretrained.py",
        "data": f"{CLIPS} clips of the built-in procedural sky, version {VERSION}; nothing else",
        "checkpoint": path.name,
        "frames": read_json(path / "training.json").get("frames"),
        "starts": list(starts),
        "training": training,
        "scores": scores,
    }
    state = checkpoint.read_networks(path)["ema"]
    with whole_folder(out) as folder:
        half = {name: tensor.bfloat16() for name, tensor in state.items()}
        write_tensors(folder / "model.safetensors", half)
        write_json(folder / "config.json", dataclasses.asdict(checkpoint.read_config(path)))
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
