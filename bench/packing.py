"""How fast is packing, what does it need, what does it lose, and what does it survive?

    python bench/packing.py --data VIDEOS [--resolution 256] [--times 50] [--kills 20] [--out packing.json]

speed   packs the videos `times` times over under different names, beside ffmpeg writing JPEGs of the same quality from
        the same files (if ffmpeg is installed); frames per second of processor time; peak memory for few and many clips
loss    PSNR of packed frames against the center crop of the source; --lossless must be exact
drill   kills packings at random moments and runs them again: the end must be, byte for byte, what one run makes
faults  packs 40 damaged files: none may end in a traceback, or leave anything outside the folder asked for
VIDEOS is a folder of videos with frames of the resolution or larger.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose kernels.py is not the package
from mostgan.config import UserError
from mostgan.data import Clips
from mostgan.packing import pack
from mostgan.prepare import check
from mostgan.sources import find_sources

ROOT = Path(__file__).resolve().parents[1]
PREPARE = [sys.executable, "-m", "mostgan.prepare"]


def run(command, **more):
    """(processor seconds of the command and what it started, peak memory in MB, the finished process)."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, process.returncode, output


def prepare(src, dst, resolution, *more):
    shutil.rmtree(dst, ignore_errors=True)
    seconds, memory, status, output = run([*PREPARE, str(src), str(dst), "--resolution", str(resolution), *more])
    if status:
        raise UserError(f"packing {src} failed: {output.strip().splitlines()[-1]}")
    return seconds, memory


def repeated(files, folder, times):
    """A folder with every file `times` times under different names."""
    folder.mkdir()
    for k in range(times):
        for file in files:
            (folder / f"{k:03d}-{file.name}").symlink_to(file)
    return folder


def speed(files, work, resolution, times):
    few, many = repeated(files, work / "few", 5), repeated(files, work / "many", times)
    before = ffmpeg_rate(files, work, resolution)  # and again after: other programs come and go
    _, memory_few = prepare(few, work / "few-packed", resolution)
    begun = time.perf_counter()
    seconds, memory = prepare(many, work / "many-packed", resolution)
    elapsed, frames = time.perf_counter() - begun, int(Clips(work / "many-packed").lengths.sum())
    result = {"clips": times * len(files), "frames": frames, "frames/s and core": frames / seconds}
    result |= {"frames/s on the clock": frames / elapsed, f"memory, {5 * len(files)} clips, MB": memory_few,
               f"memory, {times * len(files)} clips, MB": memory}  # fmt: skip
    if shutil.which("ffmpeg"):
        rates = before, ffmpeg_rate(files, work, resolution)
        result["ffmpeg's frames/s and core"] = sum(rates) / 2
        result["ffmpeg / this"] = result["ffmpeg's frames/s and core"] / result["frames/s and core"]
    else:
        print("ffmpeg is not installed: no comparison", file=sys.stderr)
    return result


def ffmpeg_rate(files, work, resolution):
    """Frames per second of processor time of ffmpeg, one thread, writing JPEGs at its finest quantizer, 4:4:4."""
    if not shutil.which("ffmpeg"):
        return None
    seconds, frames, out = 0.0, 0, work / "jpegs"
    side = f"crop='min(iw,ih)':'min(iw,ih)',scale={resolution}:{resolution}:flags=bicubic,format=yuvj444p"
    for file in 2 * files:
        out.mkdir()
        options = ["-vf", side, "-threads", "1", "-qmin", "1", "-q:v", "1"]
        command = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(file), *options, str(out / "%06d.jpg")]
        used, _, status, output = run(command)
        if status:
            raise UserError(f"ffmpeg failed on {file}: {output}")
        seconds, frames = seconds + used, frames + len(list(out.iterdir()))
        shutil.rmtree(out)
    return frames / seconds


def loss(files, work, resolution):
    sources, worst, total, count = find_sources(files[0].parent), np.inf, 0.0, 0
    for lossless in (False, True):
        pack(sources, work / f"loss-{lossless}", resolution, lossless)
    clips, exact = Clips(work / "loss-False"), Clips(work / "loss-True")
    same = True
    for c, source in enumerate(sources):
        for f, image in enumerate(source.frames(resolution)):
            same &= bool((exact.frames(c, [f])[0].transpose(1, 2, 0) == image).all())
            error = np.mean((clips.frames(c, [f])[0].transpose(1, 2, 0).astype(np.float32) - image) ** 2)
            psnr = 10 * np.log10(255**2 / max(error, 1e-3))
            worst, total, count = min(worst, psnr), total + psnr, count + 1
    sizes = [sum(shard["bytes"] for shard in c.info["shards"]) / count / 1024 for c in (clips, exact)]
    return {"worst PSNR, dB": worst, "mean PSNR, dB": total / count, "lossless is exact": same,
            "KiB per frame": sizes[0], "KiB per frame, lossless": sizes[1]}  # fmt: skip


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def drill(files, work, resolution, kills):
    """One packing killed again and again; a new one when it ends. Returns counts."""
    src = repeated(files, work / "drill", 2)
    prepare(src, work / "whole", resolution)
    whole, dst, rng = contents(work / "whole"), work / "place" / "packed", random.Random(0)
    dst.parent.mkdir()
    command, result = [*PREPARE, str(src), str(dst), "--resolution", str(resolution)], {"kills": 0, "finished": 0}
    while result["kills"] < kills:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not dst.exists():
            time.sleep(0.001)
        try:
            process.wait(rng.uniform(0, 3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL if rng.random() < 0.7 else signal.SIGINT)
            result["kills"] += 1
        process.wait()
        if result["kills"] == kills:
            break
        if (dst / "index.json").exists():
            compare(dst, whole, result)
            shutil.rmtree(dst)
    _, _, status, output = run(command)
    if status and "exists already" not in output:
        raise UserError(f"the last run failed: {output}")
    compare(dst, whole, result)
    if list(dst.parent.iterdir()) != [dst]:
        raise UserError(f"something was written outside: {list(dst.parent.iterdir())}")
    return result


def compare(dst, whole, result):
    wrong = check(dst)
    if wrong or contents(dst) != whole:
        raise UserError(f"{dst} differs from an uninterrupted run: {wrong}")
    result["finished"] += 1


def faults(files, work, count=40):
    """Damaged copies of the videos, each packed alone and all together with a good one."""
    rng, src = random.Random(0), work / "faults"
    src.mkdir()
    data = files[0].read_bytes()
    for i in range(count):
        broken, suffix = bytearray(data), files[0].suffix
        if i < count // 2:
            del broken[int(len(broken) * (i + 0.5) / (count // 2)) :]
        elif i < count - 6:
            for _ in range(rng.choice([1, 20, 400])):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        else:
            suffix = rng.choice([".png", ".gif", ".avi", ".webm", ".zip", ".jpg"])
            broken = broken if i % 2 else bytearray(b"text, not a video\n" * 50 if i % 4 else b"")
        (src / f"{i:02d}{suffix}").write_bytes(broken)
    result = {"files": count, "tracebacks": 0, "skipped": 0, "packed": 0}
    (work / "alone").mkdir()
    for file in sorted(src.iterdir()):
        dst = work / "alone" / file.stem
        _, _, status, output = run([*PREPARE, str(file), str(dst), "--resolution", "64"])
        result["tracebacks"] += "Traceback" in output or status not in (0, 2)
        result["packed" if status == 0 else "skipped"] += 1
        if dst.exists() and (status or check(dst)):
            raise UserError(f"{file.name} left {dst}")
    shutil.copy(files[0], src / "good.mp4")
    index = pack(find_sources(src), work / "together", 64)
    result["together: packed, skipped"] = [len(index["clips"]), len(index["skipped"])]
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=["speed", "loss", "drill", "faults"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.data.is_dir() or not (files := sorted(f.resolve() for f in args.data.iterdir() if f.is_file())):
        raise UserError(f"{args.data} is no folder of videos")
    parts = {"speed": lambda work: speed(files, work, args.resolution, args.times),
             "loss": lambda work: loss(files, work, args.resolution),
             "drill": lambda work: drill(files, work, args.resolution, args.kills),
             "faults": lambda work: faults(files, work)}  # fmt: skip
    results = {}
    for name in args.only or parts:
        with tempfile.TemporaryDirectory() as work:
            results[name] = parts[name](Path(work))
        for key, value in results[name].items():
            print(f"{name:8s} {key:32s} {value if not isinstance(value, float) else format(value, '.2f')}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1, default=float) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
