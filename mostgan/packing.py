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
whole, and how to find the frame after it: a later run goes on there, in the midst of the source.
"""

import fcntl
import hashlib
import json
import os
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from copy import copy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from tqdm import tqdm

from mostgan.config import UserError
from mostgan.sources import JOURNAL, UNREADABLE
from mostgan.video import FrameDecoder, FrameEncoder, center_crop_resize, png

FORMAT, VERSION = "mostgan-clips", 2
MIN_FRAMES = 3  # what one training sample takes from a clip
TOO_SHORT = f"shorter than {MIN_FRAMES} frames"
SHARD_BYTES = 1 << 30
NOTES = ".jsonl"  # suffix of the notes beside a part
JOB_CLIPS, JOB_FRAMES = 16, 4096  # of one job, at least; of the clips, a multiple
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
            coder = _Coder(dst, resolution, lossless, clip_length)
            with closing(_in_parallel(coder, sources, done, jobs)) as coded:
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


# -------------------------------------------------------------------------------------------------------------- coding


class Coded(NamedTuple):
    """One source's coded frames, cut into clips; or why there are none."""

    stem: str  # how the names of its files begin
    clips: list  # dicts: sizes (bytes of each frame), crc32, file and offset where they lie, and what Piece says
    problem: str | None


class Piece(NamedTuple):
    """Some clips in a row of one source.

    Whole clips also say how to go on behind them: the place and the checksum of the last frame, and what the encoder
    carries over. before: the checksum of the frame found at the place where the piece was to begin, or None.
    """

    clips: list
    before: int | None
    problem: str | None


class _Coder:
    """Codes sources: short ones in one job, long ones that are cut into clips in one job per some clips.

    Where a job is to begin in the midst of a video the container tells, which may be wrong. So each job reports the
    frame before its first, and `join` takes its clips only if that is the one where the job before it ended.
    """

    def __init__(self, folder, resolution, lossless, clip_length):
        self.folder, self.resolution, self.lossless, self.clip_length = folder, resolution, lossless, clip_length
        self.stop = threading.Event()
        self.pool = None  # where the jobs run; None: all in one
        self.cut = 0  # clips cut off longer sources, for the progress bar

    def __call__(self, number, source):
        """Starts coding one source: (an event to stop it, a list of (place, future Piece)). Raises OSError."""
        stem, places, given_up = f"clip-{number:07d}", [], threading.Event()
        job_clips = JOB_CLIPS * -(-JOB_FRAMES // (JOB_CLIPS * self.clip_length)) if self.clip_length else None
        if self.clip_length and self.pool and hasattr(source, "places"):
            places = source.places(job_clips * self.clip_length)
        if not places:
            return given_up, [(None, _now(self.code, stem, source, given_up))]
        begins = [None] + [{"place": place, "image": None, "untried": 0, "end": place[0] + 1} for place in places]
        names = [stem] + [f"{stem}-{k:05d}" for k in range(1, len(begins))]
        lengths = [job_clips] * len(places) + [None]
        return given_up, [
            (begin and begin["place"], self.pool.submit(self.code, name, source, given_up, begin, length))
            for name, begin, length in zip(names, begins, lengths)
        ]

    def join(self, number, source, given_up, jobs, result):
        """The Coded of the jobs that __call__ started. What does not join up is coded again, from where it does.

        result: waits for a future and returns its result.
        """
        stem, clips, problem = f"clip-{number:07d}", [], None
        for k, (place, future) in enumerate(jobs):
            piece = result(future)
            last = clips[-1] if clips else None
            if last and (piece.before != last["image"] or last["place"] is None or tuple(last["place"]) != place):
                piece, k = self._end(stem, source, given_up, jobs[k:], last), len(jobs)
            elif last and last["untried"]:  # the job did not know of it: until there is no difference any more
                name, until = f"{stem}-{k:05d}-again", piece.clips
                again = self.code(name, source, threading.Event(), last, len(until), until)
                piece = Piece(again.clips + until[len(again.clips) :], None, again.problem or piece.problem)
            clips, problem = clips + piece.clips, piece.problem
            if problem or k >= len(jobs) or not clips or len(clips[-1]["sizes"]) < (self.clip_length or 0):
                break
        given_up.set()
        wait([future for _, future in jobs if not future.cancel()])
        if not problem and sum(len(clip["sizes"]) for clip in clips) < MIN_FRAMES:
            problem = TOO_SHORT
        return Coded(stem, clips, problem)

    def _end(self, stem, source, given_up, jobs, last):
        """All that comes after the clip `last`, in one piece, instead of what the jobs give."""
        given_up.set()
        wait([future for _, future in jobs if not future.cancel()])
        return self.code(f"{stem}-end", source, threading.Event(), last)

    def code(self, name, source, given_up, begin=None, length=None, until=()):
        """Codes the Piece of a source that follows the clip `begin`, or what an earlier run left of that.

        length: in clips; by default all. until: clips coded before, from another state of the encoder; ends where that
        is the same again.
        """
        encoder, problem = FrameEncoder(self.resolution, self.lossless), None
        file, reader = self.folder / f"{name}.part", copy(source)  # fps and place are this thread's own
        begin = begin or {"place": None, "image": None, "untried": 0, "end": 0}
        key = [source.identity(), *(begin[key] for key in ("place", "image", "untried", "end"))]
        file.touch()
        with open(file, "r+b") as out:
            clips = _take_up_part(out, file.with_suffix(NOTES), key, length)
            offset, encoder.untried = out.tell(), (clips or [begin])[-1]["untried"]
            found = [clips[0]["before"]] if clips else []
            self.cut += len(clips)
            try:
                rest = () if _ends(clips, length, until) else self._rest(reader, (clips or [begin])[-1], found)
                for image in rest:
                    if not clips or len(clips[-1]["sizes"]) == self.clip_length:
                        clips.append({"sizes": [], "crc32": 0, "file": file, "offset": offset})
                    clip, data = clips[-1], encoder.encode(image)
                    out.write(data)
                    offset += len(data)
                    clip["sizes"].append(len(data))
                    clip["crc32"] = zlib.crc32(data, clip["crc32"])
                    if len(clip["sizes"]) == self.clip_length:
                        out.flush()
                        end = begin["end"] + len(clips) * self.clip_length
                        place = getattr(reader, "place", None)  # procedural clips have none
                        clip |= {"untried": encoder.untried, "place": place, "image": _crc_of_image(image), "end": end}
                        _note(file.with_suffix(NOTES), clip | {"key": key, "before": found[0] if found else None})
                        self.cut += 1
                        if _ends(clips, length, until):
                            break
                    if self.stop.is_set() or given_up.is_set():
                        break
            except _Unreadable as error:
                problem = f"unreadable ({error})"
        source.fps = reader.fps if reader.fps is not None else source.fps
        return Piece(clips, found[0] if found else None, problem)

    def _rest(self, source, last, found):
        """Yields the frames after the clip `last`; puts the checksum of that's last frame in `found`.

        It looks for that frame and takes what follows, if it finds the very same one, pixel for pixel; else (files
        without timestamps, or without key frames where they claim them) it reads from the start. Where the checksum of
        the frame is not known yet, it does not: raises _Unreadable if there is none at that place.
        """
        if last["place"] is not None:
            with closing(_readable(source.frames(self.resolution, last["place"]))) as frames:
                try:
                    image = next(frames, None)
                except _Unreadable:
                    image = None
                image_crc = None if image is None else _crc_of_image(image)
                if last["image"] is None and image is None:
                    raise _Unreadable("no frame at the place looked for")
                if image is not None and last["image"] in (None, image_crc):
                    found[:] = found or [image_crc]
                    yield from frames
                    return
        for number, image in enumerate(_readable(source.frames(self.resolution)), -last["end"]):
            if number >= 0:
                yield image
            elif self.stop.is_set():
                return


def _now(function, *arguments):
    """The Future of what is called here and now."""
    future = Future()
    future.set_result(function(*arguments))
    return future


def _ends(clips, length, until):
    """Whether a piece is complete (see _Coder.code)."""
    if clips and len(clips) <= len(until) and clips[-1]["untried"] == until[len(clips) - 1].get("untried"):
        return True
    return length is not None and len(clips) == length


def _note(notes, clip):
    with open(notes, "ab") as file:
        file.write(json.dumps(clip | {"file": None}).encode() + b"\n")


def _crc_of_image(image):
    return zlib.crc32(np.ascontiguousarray(image))


def _take_up_part(part, notes, key, length):
    """The notes of up to `length` clips at the start of a part (an open file), if of this key, as far as it holds them.

    Cuts off the rest of both and leaves the part open at its end.
    """
    done, good, size = [], 0, 0  # notes, bytes of them, bytes of the part
    for line in notes.read_bytes().splitlines(keepends=True) if notes.exists() else ():
        try:
            clip = json.loads(line)
        except ValueError:
            break  # the kill came while it was written
        count = sum(clip["sizes"])
        if len(done) == length or not line.endswith(b"\n") or clip["key"] != json.loads(json.dumps(key)):
            break
        if crc_of(part, count) != (clip["crc32"], count):
            break
        done.append(clip | {"file": Path(part.name), "offset": size})
        good, size = good + len(line), size + count
    if notes.exists():
        os.truncate(notes, good)
    part.truncate(size)
    part.seek(size)
    return done


class _Unreadable(Exception):
    pass


def _readable(frames):
    """The frames; failures to read become _Unreadable, to tell them from failures to write."""
    try:
        yield from frames
    except UNREADABLE as error:
        text = str(getattr(error, "strerror", None) or error or type(error).__name__)
        raise _Unreadable(" ".join(text.split())) from error


def _in_parallel(coder, sources, start, jobs):
    """Yields (source, Coded) for sources[start:] in their order, with a progress bar; some are coded ahead.

    Threads suffice: decoding, scaling and coding all run outside Python's lock.
    """
    jobs, torch_threads = jobs or len(os.sched_getaffinity(0)), torch.get_num_threads()
    pool = ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,))
    todo, pending = iter(range(start, len(sources))), deque()
    bar = tqdm(desc="preparing", total=len(sources), initial=start, unit="clip", mininterval=0.5)
    coder.pool, result = pool if jobs > 1 else None, partial(_result, coder, bar)
    try:
        # Few enough that memory and disk stay small, enough that one long video does not keep the other cores waiting.
        for number in islice(todo, 16 * jobs):
            pending.append((number, pool.submit(coder, number, sources[number])))
        while pending:
            number, future = pending.popleft()
            yield sources[number], coder.join(number, sources[number], *result(future), result)
            bar.update()
            for number in islice(todo, 1):
                pending.append((number, pool.submit(coder, number, sources[number])))
    finally:
        coder.stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()
        torch.set_num_threads(torch_threads)


def _result(coder, bar, future):
    while not wait([future], 1).done:
        if coder.cut:
            bar.set_postfix_str(f"{coder.cut} cut from longer ones")
    return future.result()


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
            for block in _blocks(part, size):
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


def _blocks(file, size):
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        yield block
        size -= len(block)


def crc_of(file, size):
    """(CRC-32 of the next `size` bytes of an open file, how many there were)."""
    crc, read = 0, 0
    for block in _blocks(file, size):
        crc, read = zlib.crc32(block, crc), read + len(block)
    return crc, read


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
