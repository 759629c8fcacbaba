"""How fast do packed clips come back? Decoding per core beside Pillow, random samples, and the whole loader.

    python bench/loader.py --data VIDEOS [--resolution 256] [--workers 1 2] [--out loader.json]

VIDEOS: whatever training takes; without it, the built-in sky. Needs Pillow (pip install pillow) for the comparison.
Rates per core are per second of processor time; rates of the loader are per second on the clock.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose kernels.py is not the package
from mostgan.config import UserError
from mostgan.data import batches, open_data, sample_real
from mostgan.video import FrameDecoder

ROUNDS = 5
IMAGES = 400  # per round


def rate(function, items):
    """items per second of processor time, once."""
    begun = time.process_time()
    function()
    return items / (time.process_time() - begun)


def decoders(clips):
    """Functions that decode the same JPEGs one by one; how many there are; their share of all frames."""
    rng = np.random.default_rng(0)
    coded = [clips._coded(frame) for frame in rng.integers(0, clips.lengths.sum(), 2 * IMAGES)]
    jpegs = [data for data in coded if data[:2] == b"\xff\xd8"]
    share, jpegs = len(jpegs) / len(coded), jpegs[:IMAGES]
    if not jpegs:
        raise UserError(f"at {clips.resolution} pixels these frames are all stored exactly: no JPEG to compare")
    decoder, out = FrameDecoder(clips.resolution), np.empty((3, clips.resolution, clips.resolution), np.uint8)
    functions = {"decode: this repository": lambda: [decoder.decode(data, out) for data in jpegs]}
    try:
        from PIL import Image
    except ImportError:
        print("Pillow is not installed: no comparison", file=sys.stderr)
        return functions, len(jpegs), share

    def pillow():
        for data in jpegs:
            np.asarray(Image.open(io.BytesIO(data)))

    def pillow_planes():
        for data in jpegs:
            out[:] = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)

    functions["decode: Pillow, to [H,W,3]"] = pillow
    functions["decode: Pillow, to [3,H,W]"] = pillow_planes
    return functions, len(jpegs), share


def samples(clips, count, rng):
    usable = np.flatnonzero(clips.lengths >= 3)
    for clip in rng.choice(usable, count):
        clips.frames(clip, sample_real(clips.lengths[clip], 3, rng)[0])


def loader(clips, workers, batch=32, seconds=6.0):
    """Frames per second on the clock, after the first batches."""
    endless = batches(clips, batch, 3, seed=0, workers=workers)
    for _ in range(2 * workers + 2):
        next(endless)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() < begun + seconds:
        next(endless)
        count += batch * 3
    elapsed = time.perf_counter() - begun
    endless.close()
    return count / elapsed


def device():
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] or ["?"]
    return f"{names[0] or platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each number of workers")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        clips = open_data(args.data, "sky", args.resolution, cache=folder)
        functions, count, share = decoders(clips)
        rates = {name: [] for name in functions} | {"random samples of 3 frames": []}
        rng = np.random.default_rng(0)
        for _ in range(ROUNDS):  # in turn, so that a busy moment hits them all
            for name, function in functions.items():
                rates[name].append(rate(function, count))
            rates["random samples of 3 frames"].append(rate(lambda: samples(clips, count // 3, rng), count // 3 * 3))
        rows = [(name, statistics.median(values), "frames/s and core") for name, values in rates.items()]
        for workers in args.workers:
            rows.append((f"loader, {workers} workers", loader(clips, workers, seconds=args.seconds), "frames/s"))
    print(f"{device()}; {args.resolution} pixels, {share:.0%} of the frames are JPEG; torch {torch.__version__}")
    base = statistics.median(rates.get("decode: Pillow, to [3,H,W]", [0]))  # what the loader must deliver as well
    for name, value, unit in rows:
        compared = f" {value / base:5.2f} x Pillow to [3,H,W]" if base and not name.startswith("loader") else ""
        print(f"{name:32s} {value:8.0f} {unit:18s}{compared}")
    if args.out:
        record = {"device": device(), "resolution": args.resolution, "jpeg_share": share}
        args.out.write_text(json.dumps(record | {name: round(value, 1) for name, value, _ in rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
