"""What packing survives: damaged sources, and being killed.

    python bench/damage.py --data VIDEOS [--sources 40] [--kills 20] [--resolution 64] [--out FILE]

sources  damaged copies of the videos (cut off, bytes flipped, zeroed, swapped, misnamed), each
         packed alone, then all together beside a good one: no traceback, exit status 0 or 2 with
         one line, nothing outside the destination, no half-made folder
kills    one packing killed at random moments and started again until it is finished: the end is,
         byte for byte, what one uninterrupted run makes; and no worker is left behind
VIDEOS is a folder of videos. Exit status 1 where anything was lost.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import timing
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, whose kernels.py is not the package
from mostgan.config import UserError  # noqa: E402
from mostgan.prepare import check  # noqa: E402

WAYS = ("cut off", "bit flipped", "bytes flipped", "zeros", "parts swapped", "wrong name", "text")


class Failed(Exception):
    """The drill found something lost."""


def start(src, dst, resolution, *more):
    command = [sys.executable, "-m", "mostgan.prepare", str(src), str(dst)]
    command += ["--resolution", str(resolution), "--clip-length", "32", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def damaged(data, way, rng):
    """A damaged copy of the bytes of a video."""
    broken, at = bytearray(data), rng.randrange(len(data))
    if way == "cut off":
        del broken[at:]
    if way == "bit flipped":
        broken[at] ^= 1 << rng.randrange(8)
    if way == "bytes flipped":
        for _ in range(400):
            broken[rng.randrange(len(broken))] ^= 255
    if way == "zeros":
        broken[at : at + 3000] = bytes(len(broken[at : at + 3000]))
    if way == "parts swapped":
        broken = broken[at:] + broken[:at]
    if way == "text":
        broken = bytearray(b"This is text and no video.\n" * 100)
    return bytes(broken)


def sources(files, work, count, resolution, rng):
    """A row (way, file, exit status, what was said last) for each damaged source."""
    src, rows = work / "src", []
    src.mkdir()
    for k in range(count):
        file, way = files[k % len(files)], WAYS[k % len(WAYS)]
        suffix = rng.choice([".gif", ".zip", ".png", ".avi", ".webm", ".tar"])
        suffix = suffix if way == "wrong name" else file.suffix
        (src / f"{k:02d}{suffix}").write_bytes(damaged(file.read_bytes(), way, rng))
    before = sorted(work.rglob("*"))
    for k, file in enumerate(sorted(src.iterdir())):
        dst = work / "dst"
        process = start(file, dst, resolution)
        output = process.communicate()[0]
        said = output.strip().splitlines()[-1] if output.strip() else ""
        if process.returncode not in (0, 2) or "Traceback" in output:
            raise Failed(f"{file.name}: exit status {process.returncode}: {output}")
        if process.returncode == 2 and (dst.exists() or not said.startswith("error: ")):
            raise Failed(f"{file.name}: not one line, or {dst} was left: {output}")
        if process.returncode == 0 and check(dst):
            raise Failed(f"{file.name}: {check(dst)}")
        shutil.rmtree(dst, ignore_errors=True)
        if sorted(work.rglob("*")) != before:
            raise Failed(f"{file.name}: something was written outside the destination")
        rows.append((WAYS[k % len(WAYS)], file.name, process.returncode, said))
    shutil.copy(files[0], src / f"good{files[0].suffix}")
    process = start(src, work / "together", resolution)
    output = process.communicate()[0]
    if process.returncode or "Traceback" in output or check(work / "together"):
        raise Failed(f"all together: {output}")
    return rows


def group_is_gone(group, seconds=20):
    """Whether no process of a group lives after so long; zombies do not count."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        states = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                states.append(stat.read_text().rpartition(")")[2].split())
            except OSError:
                continue
        if not any(int(state[2]) == group and state[0] != "Z" for state in states):
            return True
        time.sleep(0.05)
    return False


def kills(files, work, count, resolution, rng):
    """A row (number of the packing, signal, seconds after its start, files there) for each kill."""
    src, dst, rows, packings = work / "films", work / "place" / "packed", [], 1
    src.mkdir()
    for k in range(3):
        for file in files:
            (src / f"{k}-{file.name}").symlink_to(file.resolve())
    process = start(src, work / "whole", resolution)
    begun, output = time.monotonic(), process.communicate()[0]
    whole, longest = contents(work / "whole"), time.monotonic() - begun
    if process.returncode:
        raise Failed(f"the uninterrupted run failed: {output}")
    dst.parent.mkdir()
    while len(rows) < count:
        process, moment = start(src, dst, resolution), rng.uniform(0, longest)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            kind = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
            process.send_signal(kind)
            there = len(list(dst.iterdir())) if dst.exists() else 0
            rows.append((packings, kind.name, round(moment, 2), there))
        output = process.communicate()[0]
        if not group_is_gone(process.pid):
            raise Failed(f"kill {len(rows)}: a worker process was left behind")
        if "Traceback" in output:
            raise Failed(f"kill {len(rows)}: {output}")
        if process.returncode == 0:
            compare(dst, whole)
            shutil.rmtree(dst)
            packings += 1
    process = start(src, dst, resolution)
    if process.communicate()[0] is None or process.returncode:
        raise Failed("the last run failed")
    compare(dst, whole)
    return rows


def compare(dst, whole):
    if contents(dst) != whole or check(dst):
        raise Failed(f"{dst} differs from an uninterrupted run: {check(dst)}")
    if list(dst.parent.iterdir()) != [dst]:
        raise Failed(f"something was written outside: {list(dst.parent.iterdir())}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--sources", type=int, default=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    files = sorted(file for file in args.data.glob("*") if file.is_file())
    if not files:
        raise UserError(f"{args.data} is no folder of videos")
    record = timing.describe(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        rng = random.Random(args.seed)
        rows = sources(files, Path(folder), args.sources, args.resolution, rng)
        for way, name, status, said in rows:
            print(f"{way:14s} {name:10s} {'packed' if status == 0 else 'refused':8s} {said[:80]}")
        ends = Counter("packed" if status == 0 else "refused" for _, _, status, _ in rows)
        print(f"{len(rows)} damaged sources, no traceback, nothing outside: {dict(ends)}")
        record["sources"] = dict(ends)
        timing.write(args.out, record)
    with tempfile.TemporaryDirectory() as folder:
        rows = kills(files, Path(folder), args.kills, args.resolution, rng)
        for packing, kind, moment, there in rows:
            print(
                f"packing {packing:2d}  {kind:8s} after {moment:6.2f} s with {there:3d} files there"
            )
        print(
            f"{len(rows)} kills in {rows[-1][0]} packings: the same bytes, no process left behind"
        )
        record["kills"] = len(rows)
        timing.write(args.out, record)


if __name__ == "__main__":
    try:
        main()
    except (Failed, UserError) as error:
        sys.exit(f"error: {error}")
