"""Coding sources into files of coded frames, for packing.py: many at once, and long ones in several jobs."""

import json
import os
import threading
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from copy import copy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mostgan.sources import UNREADABLE
from mostgan.video import FrameEncoder

MIN_FRAMES = 3  # what one training sample takes from a clip
TOO_SHORT = f"shorter than {MIN_FRAMES} frames"
NOTES = ".jsonl"  # suffix of the notes beside a part
JOB_CLIPS, JOB_FRAMES = 16, 4096  # of one job, at least; of the clips, a multiple


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


class Coder:
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
    """Whether a piece is complete (see Coder.code)."""
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


def in_parallel(coder, sources, start, jobs):
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


def blocks(file, size):
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        yield block
        size -= len(block)


def crc_of(file, size):
    """(CRC-32 of the next `size` bytes of an open file, how many there were)."""
    crc, read = 0, 0
    for block in blocks(file, size):
        crc, read = zlib.crc32(block, crc), read + len(block)
    return crc, read
