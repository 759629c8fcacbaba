"""`python -m mostgan.prepare SRC DST --resolution 256`: videos, frame folders and zips of either → packed clips.

A packed folder holds
    index.json       version, resolution, settings, clips (name, frames, fps, label), shards, what was skipped
    offsets.npy      int64 [F+1]: frame f of all frames is bytes offsets[f] … offsets[f+1] of the shards laid end to end
    shard-00000.bin  coded frames (video.FrameEncoder), clip after clip; a clip never crosses a shard
so that any frame is one slice of a memory map and one decode. The same input and settings give the same bytes.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from mostgan.config import UserError
from mostgan.sources import UNREADABLE, find_sources
from mostgan.video import FrameEncoder

FORMAT, VERSION = "mostgan-clips", 1
MIN_FRAMES = 3  # what one training sample takes from a clip
SHARD_BYTES = 1 << 30


def pack(sources, dst, resolution, lossless=False, extra=None, replace=False, jobs=None):
    """Packs clips into the folder `dst`, which appears when all is done, and returns its index (a dict).

    sources: objects with name, label, fps and frames(resolution), such as sources.Source or sky.SkyClip. extra: more
    entries for the index. replace: an existing dst is replaced, at the end. Unreadable and short clips are named on
    stderr and skipped. Raises UserError when no clip is left, when dst exists or cannot be written.
    """
    dst = Path(dst)
    if resolution < 4:
        raise UserError(f"a resolution of {resolution} pixels is too small")
    if dst.exists() and not replace:
        raise UserError(f"{dst} exists already; remove it or choose another place")
    try:
        with _building(dst) as partial, closing(_code_all(sources, partial, resolution, lossless, jobs)) as coded:
            index = {"format": FORMAT, "version": VERSION, "resolution": resolution}
            index["settings"] = {"crop": "center", "lossless": lossless, "min_psnr": FrameEncoder.MIN_PSNR}
            index |= (extra or {}) | _join(coded, partial)
            (partial / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {dst}: {error.strerror or error}") from error
    return index


@contextmanager
def _building(dst):
    """A fresh folder that becomes `dst` when the block ends well, and vanishes when it does not."""
    partial = dst.with_name(f".{dst.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {dst}; wait until it has finished") from None
        except OSError:
            pass  # a file system without locks
        try:
            for left in partial.iterdir():  # by a killed run
                if left.name != "lock":
                    left.unlink()
            yield partial
            (partial / "lock").unlink()
            for file in partial.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            old = dst.with_name(f".{dst.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if dst.exists():
                os.rename(dst, old)
            os.rename(partial, dst)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _code_all(sources, folder, resolution, lossless, jobs):
    """Codes every clip into a file of its own, in parallel, with a progress bar; yields (source, file, sizes, problem)
    in the order of the sources.

    Threads suffice: decoding, scaling and coding all run outside Python's lock.
    """
    stop, torch_threads = threading.Event(), torch.get_num_threads()
    pool = ThreadPoolExecutor(jobs or os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = [
            pool.submit(_code_one, source, folder / f"clip-{number:07d}", resolution, lossless, stop)
            for number, source in enumerate(sources)
        ]
        pairs = zip(sources, futures)
        for source, future in tqdm(pairs, desc="preparing", total=len(futures), unit="clip", mininterval=0.5):
            yield source, *future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)


def _code_one(source, file, resolution, lossless, stop):
    """Writes one clip's coded frames to `file`; returns (file, the frames' sizes, problem or None)."""
    encoder, sizes = FrameEncoder(resolution, lossless), []
    with open(file, "wb") as out:
        try:
            for image in _readable(source.frames(resolution)):
                sizes.append(out.write(encoder.encode(image)))
                if stop.is_set():
                    break
        except _Unreadable as error:
            return file, sizes, f"unreadable ({error})"
    return file, sizes, None if len(sizes) >= MIN_FRAMES else f"shorter than {MIN_FRAMES} frames"


class _Unreadable(Exception):
    pass


def _readable(frames):
    """The frames; failures to read become _Unreadable, to tell them from failures to write."""
    try:
        yield from frames
    except UNREADABLE as error:
        raise _Unreadable(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def _join(coded, folder):
    """Moves the coded clips, in order, into shards; writes offsets.npy; returns index entries on clips and shards."""
    clips, skipped, sizes, shards = [], [], [], _Shards(folder)
    for source, file, clip_sizes, problem in coded:
        if problem:
            skipped.append({"name": source.name, "problem": problem})
            tqdm.write(f"skipped {source.name}: {problem}", file=sys.stderr)
        else:
            shards.append(file, sum(clip_sizes))
            sizes += clip_sizes
            entry = {"name": source.name, "frames": len(clip_sizes), "fps": source.fps, "label": source.label}
            clips.append(entry)
        file.unlink()
    shards.close()
    if not clips:
        raise UserError(_nothing_usable(skipped))
    np.save(folder / "offsets.npy", np.cumsum([0] + sizes, dtype=np.int64))
    fps = float(np.median([clip["fps"] for clip in clips]))
    return {"fps": fps, "clips": clips, "shards": shards.entries, "skipped": skipped}


class _Shards:
    """Files of at most SHARD_BYTES (or one clip), appended to clip by clip; entries describe them for the index."""

    def __init__(self, folder):
        self.folder, self.entries, self.file, self.digest = folder, [], None, None

    def append(self, part, size):
        if self.file is None or self.entries[-1]["bytes"] + size > SHARD_BYTES:
            self.close()
            self.entries.append({"file": f"shard-{len(self.entries):05d}.bin", "bytes": 0})
            self.file, self.digest = open(self.folder / self.entries[-1]["file"], "wb"), hashlib.sha256()
        with open(part, "rb") as coded:
            while block := coded.read(1 << 20):
                self.file.write(block)
                self.digest.update(block)
        self.entries[-1]["bytes"] += size

    def close(self):
        if self.file:
            self.file.close()
            self.entries[-1]["sha256"] = self.digest.hexdigest()


def _nothing_usable(skipped):
    first = skipped[0]
    return (
        f"none of the {len(skipped)} clips can be used: {_counts(skipped)}; first, {first['name']}: {first['problem']}"
    )


def _counts(skipped):
    counts = Counter(entry["problem"].split(" (")[0] for entry in skipped)
    return ", ".join(f"{count} {problem}" for problem, count in sorted(counts.items()))


def summary(index):
    """One line on what was packed."""
    clips, skipped = index["clips"], index["skipped"]
    frames, size = sum(clip["frames"] for clip in clips), sum(shard["bytes"] for shard in index["shards"])
    text = f"{len(clips)} clips, {frames} frames of {index['resolution']} pixels, {size / 1e6:.1f} MB"
    return text + (f"; skipped {len(skipped)}: {_counts(skipped)}" if skipped else "")


def prepare(
    src: tyro.conf.Positional[Path],
    dst: tyro.conf.Positional[Path],
    /,
    resolution: int,
    labels: Literal["folders"] | None = None,
    lossless: bool = False,
):
    """Packs videos, folders of frames, or a zip of either into a form that training reads frame by frame.

    Args:
        src: folder (nested and mixed as you like), zip, or single video.
        dst: the folder to make.
        resolution: side of the square frames, in pixels; frames are center-cropped and resized.
        labels: `folders` makes each top-level folder a class; otherwise a dataset.json is used if there is one.
        lossless: keep every frame exactly (about twice the size).
    """
    index = pack(find_sources(src, labels), dst, resolution, lossless)
    print(f"{dst}: {summary(index)}")


def main():
    try:
        tyro.cli(prepare)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")


if __name__ == "__main__":
    main()
