"""How fast do packed clips come back?

    python bench/loader.py --data VIDEOS [--resolutions 256 128 64] [--files 20000] [--out FILE]

samples  random samples of 3 frames, beside Pillow decoding the same JPEGs to [3, H, W] with nothing
         else to do (where frames are JPEGs), or beside copying the same frames out of memory
loader   the whole loader with 1, 2, … worker processes
files    samples from a data set of many files of one clip each, beside one of 48 files; opening it
VIDEOS: whatever training takes; without it, the built-in sky. Rates of samples are per second of
processor time, so they are per core; rates of the loader are per second on the clock. What is
compared is measured in turn, so that a busy moment hits both; the medians of all rounds are shown.
"""

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
import timing
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, whose kernels.py is not the package
from mostgan.config import UserError  # noqa: E402
from mostgan.data import Clips, batches, sample_real  # noqa: E402
from mostgan.prepare import open_data  # noqa: E402

ROUNDS = 7
SAMPLES = 150  # per round, of 3 frames each


def rate(function, items):
    """Items per second of processor time, once."""
    begun = time.process_time()
    function()
    return items / (time.process_time() - begun)


def in_turn(functions, items, rounds=ROUNDS):
    """{name: median rate} of functions that are called in turn."""
    rates = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            rates[name].append(rate(function, items))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}  # first: warm-up


def draw(clips, rng):
    """A clip that is long enough, and three of its frames as training draws them."""
    clip = int(rng.choice(np.flatnonzero(clips.lengths >= 3)))
    return clip, sample_real(clips.lengths[clip], 3, rng)[0]


def frames_in_memory(clips, drawn):
    """The drawn frames as they are stored: bytes of JPEGs, or arrays [3, R, R]."""
    found = []
    for clip, indices in drawn:
        tensors = safetensors.numpy.load_file(clips.path / clips.info["clips"]["file"][clip])
        if "frames" in tensors:
            found += [tensors["frames"][i].copy() for i in indices]
        else:
            offsets, jpeg = tensors["offsets"], tensors["jpeg"]
            found += [jpeg[offsets[i] : offsets[i + 1]].tobytes() for i in indices]
    return found


def samples(clips):
    """{what: frames per second and core} for random samples and what they are measured against."""
    rng = np.random.default_rng(0)
    drawn = [draw(clips, rng) for _ in range(SAMPLES)]
    stored = frames_in_memory(clips, drawn)
    out = np.empty((3, clips.resolution, clips.resolution), np.uint8)

    def ours():
        for clip, indices in drawn:
            clips.frames(clip, indices)

    def pillow():
        for data in stored:
            out[:] = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)

    def copies():
        for data in stored:
            out[:] = data

    jpeg = isinstance(stored[0], bytes)
    reference = {"Pillow, the same JPEGs": pillow} if jpeg else {"copies in memory": copies}
    return in_turn({"samples": ours} | reference, 3 * SAMPLES)


def loader(clips, workers, seconds, batch=32):
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


def made_set(folder, clip, index, files):
    """A data set of `files` links to copies of one small clip."""
    folder.mkdir()
    table, names = index["clips"], [f"clip-{k:05d}.safetensors" for k in range(files)]
    for name in names:
        shutil.copyfile(clip, folder / name)
    shutil.copyfile(clip.parent / "preview.png", folder / "preview.png")
    columns = {name: column and column[:1] * files for name, column in table.items()}
    columns |= {"file": names, "name": names, "source": names}
    text = json.dumps(index | {"clips": columns}, indent=1)
    (folder / "index.json").write_text(text)
    return Clips(folder)


def many_files(clips, folder, files):
    """Samples per second of a data set of many files and of one of 48, whose clips are the same."""
    clip, index = clips.path / clips.info["clips"]["file"][0], clips.info
    sets = {
        f"{n} files": made_set(folder / f"{n}-files", clip, index, n)
        for n in dict.fromkeys((files, 48))
    }
    rng = np.random.default_rng(0)

    def reader(data):
        drawn = [draw(data, rng) for _ in range(2000)]
        for number, _ in drawn:
            (data.path / data.info["clips"]["file"][number]).read_bytes()  # a warm cache

        def read():
            for number, indices in drawn:
                data.frames(number, indices)

        return read

    return in_turn({name: reader(data) for name, data in sets.items()}, 2000, rounds=3)


def opening(folder):
    """(seconds, MB) that opening a data set takes, in a process of its own."""
    program = (
        "import resource, sys, time\n"
        "from mostgan.data import Clips\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, begun = peak(), time.perf_counter()\n"
        "clips = Clips(sys.argv[1])\n"
        "print(time.perf_counter() - begun, peak() - before)\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 128, 64])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each number of workers")
    parser.add_argument("--files", type=int, default=20_000, help="0: leave this part out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    record = timing.describe(torch.device("cpu")) | {"cores": len(os.sched_getaffinity(0))}
    print(f"{record['cores']} cores, {limit} open files allowed")
    with tempfile.TemporaryDirectory() as work:
        for resolution in args.resolutions:
            clips = open_data(args.data, "sky", resolution, cache=Path(work, "cache"))
            coding = clips.info["coding"]
            rates = samples(clips)
            (ours, reference) = rates.values()
            for name, value in rates.items():
                print(f"{resolution:4d} px {coding:4s} {name:24s} {value:9.0f} frames/s and core")
            print(f"{resolution:4d} px {coding:4s} {'ratio':24s} {ours / reference:9.2f}")
            record[f"{resolution}"] = {"coding": coding, "ratio": ours / reference} | rates
            for workers in args.workers:
                value = loader(clips, workers, args.seconds)
                name = f"loader, {workers} workers"
                print(f"{resolution:4d} px {coding:4s} {name:24s} {value:9.0f} frames/s")
                record[f"{resolution}"][name] = value
            timing.write(args.out, record)
        if args.files:
            small = open_data(args.data, "sky", 64, cache=Path(work, "cache"))
            many, few = (rates := many_files(small, Path(work), args.files)).values()
            seconds, megabytes = opening(Path(work, f"{args.files}-files"))
            for name, value in rates.items():
                print(f"{name:17s} {value:9.0f} samples/s and core")
            print(f"ratio {many / few:.2f}; opened in {seconds:.2f} s, {megabytes:.0f} MB")
            record["files"] = rates | {"ratio": many / few, "open s": seconds, "open MB": megabytes}
            timing.write(args.out, record)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
