"""Making clips: the file of one, and the jobs, stretches of a source, that workers make clips of.

Clip k of a source has the frames number k · length … (k + 1) · length − 1 of the source, counted by
time from its start, so that it depends on no other clip: a damaged stretch costs the clips that it
touches, and an interruption those in work.
"""

import contextlib
import hashlib
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from mostgan.files import sha256_of, whole_file
from mostgan.prepare.pictures import encode_jpeg, reason
from mostgan.prepare.reading import UNREADABLE, printable, stem

MIN_FRAMES = 3  # what training takes of a clip
JOB_FRAMES = 1000  # least of a job: shorter ones spend more on opening the film and getting there
MOST_JOBS = 256  # of one source: each is told the names of all its files
TOLD = 3  # reports of damage that a clip's metadata hold; the others are counted


@contextlib.contextmanager
def clip_file(path, resolution, coding, about):
    """Writes one clip as its frames come: yields a function that takes one, uint8 [R, R, 3] or the
    bytes of a JPEG.

    about: the metadata, a dict, to which `frames` is added; it may change until the block ends.
    Only the frame at hand is in memory. The file appears, whole, when the block ends well.
    """
    sizes, room = [], 4096 + 2 * len(json.dumps(json.dumps(about)))
    with whole_file(path) as file:
        file.write(bytes(8 + room))

        def write(frame):
            if isinstance(frame, np.ndarray):
                raw = coding == "raw"
                frame = frame.transpose(2, 0, 1).tobytes() if raw else encode_jpeg(frame)
            file.write(frame)
            sizes.append(len(frame))

        yield write
        about["frames"], end = len(sizes), sum(sizes)
        if coding == "raw":
            tensors = {"frames": ("U8", [len(sizes), 3, resolution, resolution], 0, end)}
        else:
            offsets = np.cumsum([0, *sizes], dtype=np.int64)
            padding = -end % 8  # so that the offsets are aligned
            file.write(bytes(padding) + offsets.tobytes())
            end += padding
            tensors = {"jpeg": ("U8", [end], 0, end)}
            tensors["offsets"] = ("I64", [len(offsets)], end, end + offsets.nbytes)
        header = {"__metadata__": {"clip": json.dumps(about)}}
        for name, (dtype, shape, begin, stop) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}
        file.seek(0)
        file.write(room.to_bytes(8, "little") + json.dumps(header).encode().ljust(room))


def about_clip(path):
    """The metadata of a clip's file, or None where there is no whole one."""
    try:
        with safe_open(path, "numpy") as file:
            return json.loads(file.metadata()["clip"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def file_name(source, k):
    """The name of clip k's file: the same on every machine, and different for any two clips."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", stem(source.name))[-60:].strip("-")
    digest = hashlib.sha256(source.name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{readable}-{digest}-{k:05d}.safetensors".lstrip("-")


def row_of(source, k, about, dst):
    """What the index holds of clip k. The checksum is of what lies on the disk."""
    name = file_name(source, k)
    return about | {"file": name, "sha256": sha256_of(dst / name)}


# --------------------------------------------------------------------------------------------- jobs


class Job(NamedTuple):
    """Clips number first … first + count − 1 of a source; count None: all that are left."""

    first: int = 0
    count: int | None = None


def jobs_of(source, settings):
    """The jobs of a source. A film is cut into stretches, at least twice as long as its key frames
    lie apart, for each job decodes from the key frame before its first clip.
    """
    length, each = source.length(settings), settings.clip_length
    if each is None or length is None or length <= each or source.timing.gap is None:
        return [Job()]
    frames = max(2 * source.timing.gap * source.fps(settings), JOB_FRAMES, length / MOST_JOBS)
    stretch = math.ceil(frames / each)
    firsts = range(0, math.ceil(length / each), stretch)
    return [Job(first, stretch) for first in firsts[:-1]] + [Job(firsts[-1])]


def made_before(source, job, dst):
    """The rows of a job all of whose clips are there, or None."""
    rows, k = [], job.first
    while about := about_clip(dst / file_name(source, k)):
        rows.append(row_of(source, k, about, dst))
        k += 1
        if about["last"] or k - job.first == job.count:
            return rows
    return None


def make(source, job, settings, dst):
    """Makes the clips of a job that are not there: (rows of all its clips, damage that lies in none
    of them, a list).
    """
    return _Maker(source, job, settings, dst).run()


class _TooShort(Exception):
    """A clip has too few frames: its file shall not appear."""


class _Maker:
    def __init__(self, source, job, settings, dst):
        self.source, self.job, self.settings, self.dst = source, job, settings, Path(dst)
        self.length = settings.clip_length or sys.maxsize
        self.rows, self.there = [], {}
        self.facts = set()  # what a user should know of the clip in work
        self.errors, self.claimed = {}, set()  # {time: damage}; the times that lie in clips

    def run(self):
        first, end = self.job.first, self._end()
        while True:
            first = self._read_on(first) + 1
            if end is None or first >= end:  # else it broke off; what lies behind can be sought
                break
        begin = self._time(self.job.first) if self.job.first else -math.inf
        stop = math.inf if self.job.count is None else self._time(self.job.first + self.job.count)
        lost = [time for time in self.errors if time is None or begin <= time < stop]
        return self.rows, self._told(set(lost) - self.claimed)

    def _end(self):
        """The clip before which the job ends, where a break need not end it; else None."""
        if self.source.timing.gap is None:
            return None
        if self.job.count is not None:
            return self.job.first + self.job.count
        return math.ceil(self.source.length(self.settings) / self.length)

    def _read_on(self, first):
        """Makes clips from number `first` on, as far as the source can be read without a break: the
        last one's number.
        """
        count = self.job.count and (self.job.first + self.job.count - first) * self.length
        images = self._images(first * self.length if first else 0, count)
        upcoming, clip = next(images, None), first
        while upcoming is not None:
            clip = upcoming[0] // self.length
            upcoming = self._make_clip(clip, upcoming, images)
        return clip

    def _images(self, first, count):
        """Yields (number, image) for frames number first …; image: uint8 [R, R, 3], the bytes of a
        JPEG, or None where the clip is there already. Ends where the source cannot be read on.
        """
        framing = self.source.framing(self.settings, self.facts)
        held, image, number = None, None, first
        try:
            frames = self.source.frames(self.settings, first, count, self.errors, self.facts)
            for number, shown in frames:
                if self._before(number // self.length) is not None:
                    yield number, None
                    continue
                if shown is not held:  # else the same frame stays on screen
                    held = shown
                    image = shown.image if isinstance(shown.image, bytes) else framing(shown.image)
                yield number, image
        except UNREADABLE as error:
            self.errors.setdefault(self._time(number), reason(error))

    def _before(self, clip):
        """The metadata of a clip that an earlier run made, or None."""
        if clip not in self.there:
            self.there[clip] = about_clip(self.dst / file_name(self.source, clip))
        return self.there[clip]

    def _make_clip(self, clip, upcoming, images):
        """Writes one clip, whose first frame is `upcoming`; returns the first one behind it, or
        None at the end.
        """
        about, first, count = self._about(clip, upcoming[0]), upcoming[0], 0
        path = self.dst / file_name(self.source, clip)
        with contextlib.ExitStack() as stack:
            write = None
            if self._before(clip) is None:
                stack.enter_context(contextlib.suppress(_TooShort))
                coding = self.settings.coding
                write = clip_file(path, self.settings.resolution, coding, about)
                write = stack.enter_context(write)
            while upcoming is not None and upcoming[0] // self.length == clip:
                if write:
                    write(upcoming[1])
                count += 1
                upcoming = next(images, None)
            about["last"] = upcoming is None and self.job.count is None
            damage = self._damage(first, first + count, upcoming is None)
            about["damaged"], about["damage"] = len(damage), self._told(damage)[:TOLD]
            about["facts"] = sorted(self.facts | self.source.facts)
            self.facts.clear()
            if count < MIN_FRAMES:
                raise _TooShort
        if count >= MIN_FRAMES:
            self.claimed |= damage
            self.rows.append(row_of(self.source, clip, self._before(clip) or about, self.dst))
        return upcoming

    def _about(self, clip, number):
        source, length = self.source, self.source.length(self.settings)
        is_cut = self.settings.clip_length and (clip > 0 or length is None or length > self.length)
        return {
            "name": printable(source.name) + (f"#{clip}" if is_cut else ""),
            "source": printable(source.files[0] if len(source.files) == 1 else source.name),
            "label": source.label,
            "fps": source.fps(self.settings),
            "start": number,
            "time": round(self._time(number), 6),
        }

    def _time(self, number):
        return self.source.timing.start + number / self.source.fps(self.settings)

    def _damage(self, first, stop, ends):
        """The times of the errors that lie between two frames of the source. ends: no frame comes
        behind them.
        """
        begin = self._time(first) - 1e-6 if first else -math.inf
        end = math.inf if ends else self._time(stop) - 1e-6
        return {time for time in self.errors if time is None or begin <= time < end}

    def _told(self, times):
        """What is damaged at these times, as a list of texts."""
        order = sorted(times, key=lambda time: -math.inf if time is None else time)
        places = ["" if time is None else f" at {time:.2f} s" for time in order]
        return [printable(self.errors[time] + place) for time, place in zip(order, places)]
