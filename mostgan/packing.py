"""Coding clips into a packed folder, in parallel, in a way that may be killed at any moment and gone on with.

A packed folder holds
    shard-00000.bin  coded frames (video.FrameEncoder), clip after clip; a clip never crosses a shard
    offsets.npy      int64 [F+1]: frame f of all frames is bytes offsets[f] … offsets[f+1] of the shards laid end to end
    index.json       version, resolution, settings, clips (name, source, start, frames, fps, label, crc32), shards, what
                     was skipped. It is written last: without it, the folder is not finished.
    preview.png      first, middle and last frame of some clips
    SHA256SUMS       of the files above, as `sha256sum -c` reads them
so that any frame is one slice of a memory map and one decode. The same input and settings give the same bytes.

While it is made there are also clip-*.part, coded sources that wait for their turn, and packing.jsonl, the journal:
what was asked for, then a line for each source whose frames lie in the shards. A later run takes up the sources that
the journal lists, as long as they are the same and the shards hold what it says, and goes on with the next one.
Beside the part of a source that is being cut into clips lies clip-*.jsonl, a line for each clip that the part holds
whole, and how to find the frame after it: a later run goes on there, in the midst of the source (see coding.py).
"""

import fcntl
import hashlib
import json
import os
import sys
from collections import Counter
from contextlib import closing, contextmanager
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from mostgan.coding import MIN_FRAMES, NOTES, TOO_SHORT, Coder, blocks, crc_of, in_parallel
from mostgan.config import UserError
from mostgan.sources import JOURNAL
from mostgan.video import FrameDecoder, FrameEncoder, center_crop_resize, png

FORMAT, VERSION = "mostgan-clips", 2
SHARD_BYTES = 1 << 30
PREVIEW_CLIPS, PREVIEW_PIXELS = 12, 128


def pack(
    sources, dst, resolution, lossless=False, extra=None, replace=False, jobs=None, clip_length=None, strict=False
):
    """Packs clips into the folder `dst` and returns its index (a dict). Goes on where an interrupted run stopped.

    sources: objects with name, label, fps, identity() and frames(resolution), such as sources.Source or sky.SkyClip.
    extra: more entries for the index. replace: a finished dst is replaced. clip_length: longer sources are cut into
    clips of so many frames, the last one of what is left. Unreadable and short clips are named on stderr and skipped;
    strict makes them an error. Raises UserError for that, when no clip is left, when dst exists or cannot be written.
    """
    dst = Path(dst)
    if not 4 <= resolution <= 4096:
        raise UserError(f"a resolution of {resolution} pixels is not possible: from 4 to 4096")
    if clip_length is not None and clip_length < MIN_FRAMES:
        raise UserError(f"clips of {clip_length} frames are too short: training takes {MIN_FRAMES} frames of a clip")
    asked = {"format": FORMAT, "version": VERSION, "resolution": resolution, **(extra or {})}
    settings = {"lossless": lossless, "min_psnr": FrameEncoder.MIN_PSNR, "clip_length": clip_length}
    asked["settings"] = asked.get("settings", {}) | settings
    try:
        with _locked(dst, replace) as journal:
            # Another FFmpeg may code other bytes: what it began, this one does not go on with.
            packed = _Packed(dst, journal, {**asked, "shard_bytes": SHARD_BYTES, "ffmpeg": av.library_versions})
            done = packed.take_up(sources, strict)
            if done:
                tqdm.write(f"{dst}: going on after {done} of {len(sources)} clips", file=sys.stderr)
            coder = Coder(dst, resolution, lossless, clip_length)
            with closing(in_parallel(coder, sources, done, jobs)) as coded:
                for source, result in coded:
                    if result.problem and strict:
                        raise UserError(f"{source.name}: {result.problem} (without --strict it would be skipped)")
                    packed.add(source, result)
            index = packed.finish(asked)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {dst}: {reason}; the same command will go on where this one stopped") from error
    return index


@contextmanager
def _locked(dst, replace):
    """The open journal of dst, a folder that is new, or left by an interrupted run, or finished and to be replaced."""
    if (dst / "index.json").exists() and not replace:
        (dst / JOURNAL).unlink(missing_ok=True)  # left by a kill in the last moment
        raise UserError(f"{dst} exists already; remove it or choose another place")
    if dst.exists() and not ((dst / "index.json").exists() or (dst / JOURNAL).exists()):
        if not dst.is_dir() or any(dst.iterdir()):
            raise UserError(f"{dst} exists already and is no packed folder; choose another place")
    dst.mkdir(parents=True, exist_ok=True)
    with open(dst / JOURNAL, "a+b") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {dst}; wait until it has finished") from None
        except OSError:
            pass  # a file system without locks
        yield journal


# -------------------------------------------------------------------------------------------- the folder, the journal


class _Packed:
    """The folder while it is made: shards that grow clip by clip, and the journal that says how far they are good."""

    def __init__(self, folder, journal, header):
        self.folder, self.journal, self.header = folder, journal, json.dumps(header).encode() + b"\n"
        self.clips, self.skipped, self.sizes = [], [], []
        self.shards = []  # index entries: file, bytes

    def take_up(self, sources, strict):
        """Reads back what an earlier run has done, clears away the rest; returns how many sources need no more work.

        strict: a source that could not be used does.
        """
        for name in ("index.json", "index.json.part", "offsets.npy", "preview.png", "SHA256SUMS"):
            (self.folder / name).unlink(missing_ok=True)
        self.journal.seek(0)
        good, done = 0, 0  # bytes of the journal, sources
        for line in self.journal:
            if good == 0 and line != self.header:
                tqdm.write(f"{self.folder}: begun with other settings; starting over", file=sys.stderr)
                break
            if good and not (done < len(sources) and self._take_up_line(line, sources[done], strict)):
                break
            done, good = done + (good > 0), good + len(line)
        self.journal.truncate(good)
        self.journal.seek(good)
        if not good:
            self.journal.write(self.header)
            self.journal.flush()
        sizes = {shard["file"]: shard["bytes"] for shard in self.shards}
        for file in self.folder.glob("shard-*.bin"):
            if file.name in sizes:
                os.truncate(file, sizes[file.name])
            else:
                file.unlink()
        begun = {f"clip-{number:07d}" for number in range(done, len(sources))} if good else set()
        for file in [*self.folder.glob("clip-*.part"), *self.folder.glob(f"clip-*{NOTES}")]:
            if file.stem[: len("clip-0000000")] not in begun or not file.with_suffix(NOTES).exists():
                file.unlink()
        return done

    def _take_up_line(self, line, source, strict):
        try:
            entry = json.loads(line)
        except ValueError:
            return False  # the kill came while it was written
        before = [dict(shard) for shard in self.shards]
        usable = entry["clips"] or not strict
        if usable and line.endswith(b"\n") and entry["identity"] == source.identity():
            if all(self._holds(sum(sizes), clip["crc32"]) for clip, sizes in zip(entry["clips"], entry["sizes"])):
                self._count(entry)
                return True
        self.shards = before
        return False

    def _holds(self, size, crc):
        """Whether the shards hold, where the next clip goes, `size` bytes of this checksum; takes them in."""
        shard = self._shard_for(size)
        try:
            with open(self.folder / shard["file"], "rb") as file:
                file.seek(shard["bytes"])
                found, read = crc_of(file, size)
        except FileNotFoundError:
            return False
        shard["bytes"] += size
        return (found, read) == (crc, size)

    def _shard_for(self, size):
        if not self.shards or self.shards[-1]["bytes"] + size > SHARD_BYTES:
            self.shards.append({"file": f"shard-{len(self.shards):05d}.bin", "bytes": 0})
        return self.shards[-1]

    def add(self, source, coded):
        """Moves one source's frames into the shards and notes it in the journal."""
        entry = {"identity": source.identity(), "clips": [], "sizes": [], "skipped": []}
        for k, clip in enumerate(coded.clips):
            name, sizes = source.name if len(coded.clips) == 1 else f"{source.name}#{k:04d}", clip["sizes"]
            if coded.problem or len(sizes) < MIN_FRAMES:  # too short: the rest of a video that was cut
                break
            with open(clip["file"], "rb") as file:
                file.seek(clip["offset"])
                self._append(file, sum(sizes))
            place = {"name": name, "source": source.name, "start": k * len(coded.clips[0]["sizes"])}
            more = {"fps": source.fps, "label": source.label, "crc32": clip["crc32"]}
            entry["clips"].append(place | {"frames": len(sizes)} | more)
            entry["sizes"].append(sizes)
        if coded.problem:
            entry["skipped"].append({"name": source.name, "problem": coded.problem})
        elif len(entry["clips"]) < len(coded.clips):
            entry["skipped"].append({"name": name, "problem": TOO_SHORT})
        self.journal.write(json.dumps(entry).encode() + b"\n")
        self.journal.flush()
        self._count(entry)
        for skipped in entry["skipped"]:
            tqdm.write(f"skipped {skipped['name']}: {skipped['problem']}", file=sys.stderr)
        for file in self.folder.glob(f"{coded.stem}*"):
            file.unlink()

    def _append(self, part, size):
        shard = self._shard_for(size)
        with open(self.folder / shard["file"], "ab") as file:
            for block in blocks(part, size):
                file.write(block)
        shard["bytes"] += size

    def _count(self, entry):
        self.clips += entry["clips"]
        self.skipped += entry["skipped"]
        self.sizes += [np.array(sizes, np.int64) for sizes in entry["sizes"]]

    def finish(self, asked):
        """Writes all that is not a shard, the index last of all, and returns the index."""
        folder = self.folder
        if not self.clips:
            (folder / JOURNAL).unlink()
            folder.rmdir()
            raise UserError(f"none of the {len(self.skipped)} clips can be used: {counts(self.skipped)}; first, "
                            f"{self.skipped[0]['name']}: {self.skipped[0]['problem']}")  # fmt: skip
        offsets = np.cumsum(np.concatenate([[0], *self.sizes]), dtype=np.int64)
        np.save(folder / "offsets.npy", offsets)
        fps = float(np.median([clip["fps"] for clip in self.clips]))
        index = {**asked, "fps": fps, "clips": self.clips, "shards": self.shards, "skipped": self.skipped}
        (folder / "preview.png").write_bytes(png(contact_sheet(folder, index, offsets)))
        (folder / "index.json.part").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        (folder / "SHA256SUMS").write_text(_checksums(folder, [shard["file"] for shard in self.shards]))
        for file in folder.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.replace(folder / "index.json.part", folder / "index.json")
        (folder / JOURNAL).unlink()
        return index


def contact_sheet(folder, index, offsets):
    """First, middle and last frame of some clips, a row each: uint8 [H,W,3]."""
    chosen = np.unique(np.linspace(0, len(index["clips"]) - 1, PREVIEW_CLIPS).round().astype(int))
    lengths = np.array([clip["frames"] for clip in index["clips"]])
    firsts, ends = np.cumsum(lengths) - lengths, np.cumsum([shard["bytes"] for shard in index["shards"]])
    decoder, pixels, rows = FrameDecoder(index["resolution"]), min(index["resolution"], PREVIEW_PIXELS), []
    for clip in chosen:
        row = []
        for frame in firsts[clip] + np.array([0, lengths[clip] // 2, lengths[clip] - 1]):
            shard = int(np.searchsorted(ends, offsets[frame], side="right"))
            with open(folder / index["shards"][shard]["file"], "rb") as file:
                file.seek(offsets[frame] - ends[shard] + index["shards"][shard]["bytes"])
                image = decoder.decode(file.read(offsets[frame + 1] - offsets[frame]))
            row.append(center_crop_resize(image.transpose(1, 2, 0), pixels))
        rows.append(np.concatenate(row, 1))
    return np.concatenate(rows)


def _checksums(folder, shards):
    """The text of SHA256SUMS; its last line, which sha256sum passes over, is a checksum of the others."""
    sums = {name: digest_of(folder / name) for name in [*shards, "offsets.npy", "preview.png"]}
    sums["index.json"] = digest_of(folder / "index.json.part")
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    return lines + f"# {hashlib.sha256(lines.encode()).hexdigest()}  the lines above\n"


def digest_of(file):
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def counts(skipped):
    """For example "1 shorter than 3 frames, 2 unreadable"."""
    kinds = Counter(entry["problem"].split(" (")[0] for entry in skipped)
    return ", ".join(f"{count} {problem}" for problem, count in sorted(kinds.items()))


# -------------------------------------------------------------------------------------------------------- what is there


def read_index(path):
    """The index of a packed folder, a dict. Raises UserError when there is none, or of another version, or damaged."""
    if not (path / "index.json").is_file():
        if (path / JOURNAL).is_file():
            raise UserError(f"{path} is not finished: its preparation was interrupted; run that command again")
        raise UserError(f"{path} is not a folder of packed clips (it has no index.json)")
    try:
        info = json.loads((path / "index.json").read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        info = None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(f"{path / 'index.json'} is not an index of packed clips; prepare {path} again")
    if info.get("version") != VERSION:
        raise UserError(
            f"{path} has format version {info.get('version')}, this program reads {VERSION}; prepare it again"
        )
    return info
