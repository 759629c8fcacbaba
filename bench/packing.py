"""How fast is packing, and what memory does it take?

    python bench/packing.py --data VIDEOS [--resolution 256] [--times 20] [--out FILE]

rate    packs the videos `times` times over, under different names, and as one long film cut into
        clips, beside ffmpeg writing JPEGs of the same quality and shape from the same files;
        frames per second of processor time
cores   the long film on two cores beside one: frames per second on the clock
memory  of the largest process, for a few clips and for many, for a short film and a long one
VIDEOS is a folder of videos of one size. Without the ffmpeg program, that comparison is left out.
What is compared is measured in turn, in `--rounds` rounds, of which the medians are shown.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import timing
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, whose kernels.py is not the package
from mostgan.config import UserError  # noqa: E402
from mostgan.data import Clips  # noqa: E402

CLIP_LENGTH = 64  # frames, of the long film


class Used:
    """What a command and all that it started used: processor seconds, seconds on the clock, MB of
    the largest process."""

    def __init__(self, command, cores=None):
        def begin():
            if cores:
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

        begun = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=begin,
        )
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise UserError(f"{' '.join(command)} failed: {output.strip()[-500:]}")
        self.clock = time.perf_counter() - begun
        self.processor = usage.ru_utime + usage.ru_stime
        self.megabytes = usage.ru_maxrss / 1024


def prepare(src, dst, resolution, *more, cores=None):
    """(what it used, the frames that it packed)."""
    shutil.rmtree(dst, ignore_errors=True)
    command = [sys.executable, "-m", "mostgan.prepare", str(src), str(dst)]
    used = Used([*command, "--resolution", str(resolution), *more], cores)
    return used, int(Clips(dst).lengths.sum())


def repeated(files, folder, times):
    """A folder with every file `times` times under different names."""
    folder.mkdir()
    for k in range(times):
        for file in files:
            (folder / f"{k:03d}-{file.name}").symlink_to(file)
    return folder


def endless_frames(files):
    """Frames of the videos one after the other, over and over."""
    while True:
        for file in files:
            with av.open(str(file)) as source:
                yield from source.decode(video=0)


def long_film(files, path, frames):
    """One film of so many frames: the videos end to end, with a key frame every 2 seconds."""
    with av.open(str(path), "w") as container:
        film = container.add_stream("libx264", rate=25, options={"g": "50"})
        film.bit_rate, film.pix_fmt = 8_000_000, "yuv420p"
        for count, frame in zip(range(frames), endless_frames(files)):
            if count == 0:
                film.width, film.height = frame.width, frame.height
            frame.pts, frame.time_base, frame.pict_type = count, Fraction(1, 25), 0
            container.mux(film.encode(frame))
        container.mux(film.encode(None))
    return path


def ffmpeg(files, work, resolution):
    """(processor seconds, frames) of the ffmpeg program writing JPEGs, on one thread.

    Its finest quantizer (1 … 2) is close to quality 95; 4:4:4; the centered square.
    """
    side = f"crop='min(iw,ih)':'min(iw,ih)',scale={resolution}:{resolution}:flags=bicubic"
    seconds, frames, out = 0.0, 0, work / "jpegs"
    for file in files:
        out.mkdir()
        command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-i", str(file)]
        command += ["-vf", f"{side},format=yuvj444p", "-threads", "1", "-qmin", "1", "-q:v", "2"]
        seconds += Used([*command, str(out / "%06d.jpg")]).processor
        frames += len(list(out.iterdir()))
        shutil.rmtree(out)
    return seconds, frames


def rates(files, film, work, resolution, times, rounds):
    """{name: frames per second of processor time}; measured in turn."""
    many = repeated(files, work / "many", times)
    cut = ("--clip-length", str(CLIP_LENGTH))
    found = {"many clips": [], "a long film": []}
    found |= {f"ffmpeg, {name}": [] for name in found} if shutil.which("ffmpeg") else {}
    for _ in range(rounds):
        for name, src, more in (("many clips", many, ()), ("a long film", film, cut)):
            used, frames = prepare(src, work / "packed", resolution, *more)
            found[name].append(frames / used.processor)
            if shutil.which("ffmpeg"):
                # As many runs of it as there are videos; it takes as long for each of their copies.
                seconds, frames = ffmpeg(files if src == many else [film], work, resolution)
                found[f"ffmpeg, {name}"].append(frames / seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def cores(film, work, resolution, rounds):
    """{name: frames per second on the clock} of the long film on one core and on two."""
    found = {1: [], 2: []}
    for _ in range(rounds):
        for count in found:
            options = ("--clip-length", str(CLIP_LENGTH))
            used, frames = prepare(film, work / "packed", resolution, *options, cores=count)
            found[count].append(frames / used.clock)
    return {f"{count} cores": statistics.median(values) for count, values in found.items()}


def memory(files, film, work, resolution, times):
    """{name: MB of the largest process}."""
    few, short = repeated(files, work / "few", 1), long_film(files, work / "short.mp4", 500)
    cases = {f"{len(files)} clips": few, f"{len(files) * times} clips": work / "many"}
    cases |= {"a short film in one clip": short, "a long film in one clip": film}
    return {
        name: prepare(src, work / "packed", resolution)[0].megabytes for name, src in cases.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--frames", type=int, default=8000, help="of the long film")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    files = sorted(file.resolve() for file in args.data.glob("*") if file.is_file())
    if not files:
        raise UserError(f"{args.data} is no folder of videos")
    record = timing.describe(torch.device("cpu")) | {"cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        film = long_film(files, work / "film.mp4", args.frames)
        record["rate"] = rates(files, film, work, args.resolution, args.times, args.rounds)
        for name, value in record["rate"].items():
            print(f"{name:26s} {value:8.0f} frames per second of processor time")
        for name in ("many clips", "a long film"):
            if f"ffmpeg, {name}" in record["rate"]:
                ratio = record["rate"][f"ffmpeg, {name}"] / record["rate"][name]
                print(f"{name:26s} {ratio:8.2f} times what ffmpeg takes")
        timing.write(args.out, record)
        record["cores"] = cores(film, work, args.resolution, args.rounds)
        one, two = record["cores"].values()
        print(
            f"a long film on two cores: {two:.0f} frames/s, on one {one:.0f}: {two / one:.2f} times"
        )
        record["memory"] = memory(files, film, work, args.resolution, args.times)
        for name, value in record["memory"].items():
            print(f"{name:26s} {value:8.0f} MB")
        timing.write(args.out, record)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
