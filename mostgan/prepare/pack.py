"""Making a packed folder: jobs that read stretches of the sources side by side, a file for each clip, the index at the end.

A packed folder holds
    NAME.safetensors    one clip: `frames` uint8 [n, 3, R, R], or `jpeg` uint8 [bytes] with `offsets` int64 [n + 1], where
                        frame i is the JPEG jpeg[offsets[i] : offsets[i + 1]]; as metadata, under the key `clip`, a JSON
                        object with name, source, label, fps, start and time (of its first frame in its source), …
    labels.safetensors  `labels` float32 [clips, C], where the labels are vectors
    preview.png         first, middle and last frame of some clips
    index.json          written last: without it, the folder is not finished
and, while it is made, `plan.json`: what it is made of. Clip k of a source has the frames number k · length … of the source,
so it depends on no other clip, and a run that goes on after an interruption makes those that are not there.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
import PIL
import safetensors.numpy
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from mostgan.config import UserError
from mostgan.files import sha256_of, whole_file, write_whole
from mostgan.prepare.pictures import encode_jpeg, reason
from mostgan.prepare.sources import UNREADABLE, Notes, natural, printable, stem

FORMAT, VERSION = "mostgan-clips", 3  # as mostgan/data.py reads it
MIN_FRAMES = 3  # what training takes of a clip
RAW_UP_TO = 128  # pixels a side: opening a small JPEG costs more than reading it raw
COLUMNS = ("file", "name", "source", "label", "fps", "start", "time", "frames", "damaged", "sha256")
PREVIEW_CLIPS, PREVIEW_PIXELS = 12, 128


# ---------------------------------------------------------------------------------------------- one clip's file


@contextlib.contextmanager
def clip_file(path, resolution, coding, about):
    """Writes one clip as its frames come: yields a function that takes one, uint8 [R, R, 3] or the bytes of a JPEG.

    about: the metadata, a dict, to which `frames` is added; it may change until the block ends. Nothing but the frame at
    hand is in memory. The file appears, whole, when the block ends well.
    """
    sizes, room = [], 1024 + 2 * len(json.dumps(json.dumps(about)))
    with whole_file(path) as file:
        file.write(bytes(8 + room))

        def write(frame):
            data = frame
            if isinstance(frame, np.ndarray):
                data = (
                    encode_jpeg(frame) if coding == "jpeg" else frame.transpose(2, 0, 1).tobytes()
                )
            file.write(data)
            sizes.append(len(data))

        yield write
        about["frames"], end = len(sizes), sum(sizes)
        if coding == "raw":
            tensors = {"frames": ("U8", [len(sizes), 3, resolution, resolution], 0, end)}
        else:
            file.write(bytes(-end % 8))  # so that the offsets are aligned
            end += -end % 8
            offsets = np.cumsum([0, *sizes], dtype=np.int64)
            file.write(offsets.tobytes())
            tensors = {"jpeg": ("U8", [end], 0, end)}
            tensors["offsets"] = ("I64", [len(offsets)], end, end + offsets.nbytes)
        header = {"__metadata__": {"clip": json.dumps(about)}}
        for name, (dtype, shape, begin, stop) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}
        header = json.dumps(header).encode()
        if len(header) > room:
            raise ValueError(f"the metadata of {path} need {len(header)} bytes")
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header.ljust(room))


def about_clip(path):
    """The metadata of a clip's file, or None where there is no whole one."""
    try:
        with safe_open(path, "numpy") as file:
            return json.loads(file.metadata()["clip"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


# ------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """Clips number first … first + count − 1 of a source; count None: all that are left."""

    first: int = 0
    count: int | None = None


def jobs_of(source, settings):
    """The jobs of a source. A film is cut into stretches at least twice as long as its key frames lie apart,
    for each job begins at the key frame before its first clip."""
    length, each = source.length(settings), settings.clip_length
    if each is None or length is None or length <= each or source.timing.gap is None:
        return [Job()]
    stretch = max(1, math.ceil(2 * source.timing.gap * source.fps(settings) / each))
    firsts = range(0, math.ceil(length / each), stretch)
    return [Job(first, stretch) for first in firsts[:-1]] + [Job(firsts[-1])]


def file_name(source, k):
    """The same on every machine, and different for any two clips."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", stem(source.name))[-60:].strip("-")
    digest = hashlib.sha256(source.name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{readable}-{digest}-{k:05d}.safetensors".lstrip("-")


def made_before(source, job, dst):
    """The rows of a job all of whose clips are there, or None."""
    rows, k = [], job.first
    while about := about_clip(dst / file_name(source, k)):
        rows.append(_row(source, k, about, dst))
        k += 1
        if about["last"] or k - job.first == job.count:
            return rows
    return None


def _row(source, k, about, dst):
    """What the index holds of a clip, and its facts. The checksum is of what lies on the disk."""
    name = file_name(source, k)
    return about | {"file": name, "sha256": sha256_of(dst / name)}


class _TooShort(Exception):
    """A clip has too few frames; its file shall not appear."""


class Maker:
    """Makes the clips of a job that are not there yet. rows: of all its clips, for the index. problems: (time, reason)."""

    def __init__(self, source, job, settings, dst):
        self.source, self.job, self.settings, self.dst = source, job, settings, Path(dst)
        self.length = settings.clip_length or sys.maxsize
        self.rows, self.problems, self.there = [], [], {}
        self.errors, self.facts = {}, set()

    def run(self):
        """(rows, problems). A film that breaks off is taken up again behind the clip in which that happened."""
        first, end = self.job.first, self._end()
        while True:
            clip = self._read_on(first)
            first = clip + 1
            if end is None or first >= end:
                return self.rows, self.problems

    def _end(self):
        """The clip before which the job ends, as far as that is known and there are places to go on from."""
        if self.source.timing.gap is None:
            return None
        if self.job.count is not None:
            return self.job.first + self.job.count
        return math.ceil(self.source.length(self.settings) / self.length)

    def _read_on(self, first):
        """Makes clips from number `first` on, as far as the source can be read without a break; returns the last one's
        number."""
        count = None
        if self.job.count is not None:
            count = (self.job.first + self.job.count - first) * self.length
        images = self._images(first * self.length if first else 0, count)
        upcoming, clip = next(images, None), first
        while upcoming is not None:
            clip = upcoming[0] // self.length
            upcoming = self._make_clip(clip, upcoming, images)
        return clip

    def _images(self, first, count):
        """Yields (number, image) for frames number first …; image: uint8 [R, R, 3], the bytes of a JPEG, or None where
        the clip is there already. Ends where the source cannot be read on, and takes note of that."""
        framing, held, image, number = (
            self.source.framing(self.settings, self.facts),
            None,
            None,
            first,
        )
        try:
            for number, shown in self.source.frames(
                self.settings, first, count, self.errors, self.facts
            ):
                if self._before(number // self.length) is not None:
                    yield number, None
                    continue
                if shown is not held:  # else the same frame stays on screen
                    held = shown
                    image = shown.image if isinstance(shown.image, bytes) else framing(shown.image)
                yield number, image
        except UNREADABLE as error:
            self.problems.append((self._time(number), reason(error)))

    def _before(self, clip):
        """The metadata of a clip that an earlier run made, or None."""
        if clip not in self.there:
            self.there[clip] = about_clip(self.dst / file_name(self.source, clip))
        return self.there[clip]

    def _time(self, number):
        return self.source.timing.start + number / self.source.fps(self.settings)

    def _make_clip(self, clip, upcoming, images):
        """Writes one clip, whose first frame is `upcoming`; returns the first one behind it, or None at the end."""
        about, first = self._about(clip, upcoming[0]), upcoming[0]
        path = self.dst / file_name(self.source, clip)
        count = 0
        with contextlib.ExitStack() as stack:
            write = None
            if self._before(clip) is None:
                stack.enter_context(contextlib.suppress(_TooShort))
                write = stack.enter_context(
                    clip_file(path, self.settings.resolution, self.settings.coding, about)
                )
            while upcoming is not None and upcoming[0] // self.length == clip:
                if write:
                    write(upcoming[1])
                count += 1
                upcoming = next(images, None)
            last = upcoming is None and self.job.count is None
            about["last"], about["damaged"] = last, self._damage(first, first + count, last)
            about["facts"] = sorted(self.facts | self.source.facts)
            self.facts.clear()
            if write and count < MIN_FRAMES:
                raise _TooShort
        if count >= MIN_FRAMES:
            self.rows.append(_row(self.source, clip, self._before(clip) or about, self.dst))
        return upcoming

    def _about(self, clip, number):
        source, cut = self.source, self.settings.clip_length is not None
        return {
            "name": printable(source.name) + (f"#{clip}" if cut and self._is_cut(clip) else ""),
            "source": printable(source.files[0] if len(source.files) == 1 else source.name),
            "label": source.label,
            "fps": source.fps(self.settings),
            "start": number,
            "time": round(self._time(number), 6),
        }

    def _is_cut(self, clip):
        length = self.source.length(self.settings)
        return clip > 0 or length is None or length > self.length

    def _damage(self, first, stop, last):
        """How many damaged packets or pictures were reported between two frames of the source."""
        begin, end = self._time(first), math.inf if last else self._time(stop)
        begin = -math.inf if first == 0 else begin - 1e-6
        return sum(time is None or begin <= time < end - 1e-6 for time in self.errors)


def make(source, job, settings, dst):
    """(rows, problems) of a job: see Maker. What a worker process calls."""
    return Maker(source, job, settings, dst).run()


def look(source, settings):
    """The source, having looked at what it is (see Source.look). What a worker process calls."""
    source.look(settings)
    return source


# ---------------------------------------------------------------------------------------------------- workers


def cores():
    """How many processes can work at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class _Here:
    """What stands for a pool of processes where one is enough."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@contextlib.contextmanager
def _workers(jobs):
    """A pool of spawned processes that end with this one, however it ends. (A fork would copy locks that threads hold.)"""
    if jobs == 1:
        yield _Here()
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, spawn, _begin_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a process of the preparation died (killed, or short of memory); the same command goes on where it stopped"
        ) from None
    finally:
        if sys.exc_info()[0] is not None:
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _begin_worker():
    """Ctrl-C is for the first process alone; and when that is killed, its workers would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


# ----------------------------------------------------------------------------------------------------- packing


def pack(sources, dst, settings, notes=None, about=None, strict=False, jobs=None):
    """Packs sources into the folder `dst` and returns its index (a dict). Goes on where an interrupted run stopped.

    sources: objects like sources.Source. notes: what is known already of files left out. about: more entries of the
    index. jobs: processes; None: one for each core. Sources that cannot be used are left out, with a note; strict makes
    that, and any damage, an error. Raises UserError for that, when no clip is left, when dst holds something else or
    cannot be written.
    """
    dst, notes = Path(dst), notes or Notes()
    if not 4 <= settings.resolution <= 4096:
        raise UserError(
            f"a resolution of {settings.resolution} pixels is not possible: from 4 to 4096"
        )
    if settings.clip_length is not None and settings.clip_length < MIN_FRAMES:
        raise UserError(
            f"clips of {settings.clip_length} frames are too short: training takes {MIN_FRAMES} of a clip"
        )
    try:
        with _locked(dst):
            plan = _plan(sources, settings)
            if index := _finished(dst, plan):
                return index
            _take_up(dst, plan, sources)
            jobs = min(
                jobs or cores(), len(sources) if settings.clip_length is None else sys.maxsize
            )
            with _workers(max(1, jobs)) as pool:
                rows = _make_all(pool, sources, dst, settings, notes, strict)
            return _finish(dst, rows, plan, settings, notes, about or {})
    except OSError as error:
        raise UserError(
            f"cannot write {printable(str(dst))}: {error.strerror or error}; the same command goes on where it stopped"
        ) from error


@contextlib.contextmanager
def _locked(dst):
    """Makes the folder dst, if it is not there, and keeps other processes from preparing it."""
    new = not dst.exists()
    if not new and not dst.is_dir():
        raise UserError(f"{printable(str(dst))} is a file; choose another place")
    dst.mkdir(parents=True, exist_ok=True)
    handle = os.open(dst, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"another process is preparing {printable(str(dst))}; wait until it has finished"
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)
        if new and not any(dst.iterdir()):
            dst.rmdir()


def _plan(sources, settings):
    """What a folder is made of: {"made by": versions and settings, "sources": {file name of a source: its fingerprint}}."""
    # Another FFmpeg or Pillow may give other frames: what it began, this one does not go on with.
    made_by = [VERSION, av.__version__, PIL.__version__, asdict(settings)]
    stamps = {}
    for source in sources:
        stamp = json.dumps([source.stamp(), source.label, source.problem])
        stamps[_prefix(file_name(source, 0))] = hashlib.sha256(stamp.encode()).hexdigest()
    return {"made by": made_by, "sources": stamps}


def _prefix(file):
    return file.rpartition("-")[0]


def digest_of(plan):
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _finished(dst, plan):
    """The index of a folder that was finished from the same plan, or None. UserError if it holds anything else."""
    if (dst / "index.json").exists():
        index = _read_json(dst / "index.json")
        if index and index.get("made_from") == digest_of(plan):
            return index
        raise UserError(
            f"{printable(str(dst))} exists already and holds clips of another source or with other settings; "
            "remove it or choose another place"
        )
    others = [name for name in os.listdir(dst) if not name.endswith((".part", ".unpacked"))]
    if others and not (dst / "plan.json").exists():
        raise UserError(
            f"{printable(str(dst))} exists already and is no packed folder; choose another place"
        )
    return None


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _take_up(dst, plan, sources):
    """Removes what an earlier run left of other settings, or of sources that have changed since."""
    before = _read_json(dst / "plan.json") or {}
    same = before.get("made by") == json.loads(json.dumps(plan["made by"]))
    kept = {
        prefix
        for prefix, stamp in plan["sources"].items()
        if same and before["sources"].get(prefix) == stamp
    }
    for name in os.listdir(dst):
        if name.endswith(".part") or name.endswith(".safetensors") and _prefix(name) not in kept:
            os.unlink(dst / name)
    write_whole(dst / "plan.json", json.dumps(plan))
    if any(name.endswith(".safetensors") for name in os.listdir(dst)):
        print(f"going on with {printable(str(dst))}", file=sys.stderr)


def _make_all(pool, sources, dst, settings, notes, strict):
    """The rows of all clips, those that an earlier run left and those that are made now."""

    def skip(source, problem):
        if strict:
            raise UserError(
                f"{printable(source.name)}: {problem} (without --strict it would be left out)"
            )
        notes.add("left out", problem, source.name)

    looked = [pool.submit(look, source, settings) for source in sources if not source.problem]
    ready = [source for source in sources if source.problem] + [
        future.result() for future in looked
    ]
    rows, running, made = [], {}, {}
    for source in ready:
        if source.problem:
            skip(source, source.problem)
            continue
        made[source.name] = []
        for job in jobs_of(source, settings):
            before = made_before(source, job, dst)
            if before is not None:
                made[source.name] += before
            else:
                running[pool.submit(make, source, job, settings, str(dst))] = source
    bar = tqdm(as_completed(running), total=len(running), desc="packing", unit="job", disable=None)
    found = {name: [] for name in made}
    for future in bar:
        clips, problems = future.result()
        made[running[future].name] += clips
        found[running[future].name] += problems
    for source in ready:
        if source.problem:
            continue
        clips, problems = made[source.name], sorted(found[source.name])
        if not clips:
            skip(source, problems[0][1] if problems else f"shorter than {MIN_FRAMES} frames")
        for time, problem in problems if clips else ():
            if strict:
                raise UserError(
                    f"{printable(source.name)}: {problem} at {time:.1f} s (without --strict it is used so far)"
                )
            notes.add("could not be read on", problem, f"{source.name} at {time:.1f} s")
        rows += clips
    if not rows:
        raise UserError(f"none of {len(sources)} clips can be used: {_reasons(notes)}")
    if strict and (damaged := [row for row in rows if row["damaged"]]):
        raise UserError(f"{damaged[0]['name']}: damaged at about {damaged[0]['time']:.1f} s")
    return sorted(
        rows, key=lambda row: (natural(row["name"].partition("#")[0]), row["start"], row["file"])
    )


def _reasons(notes):
    rows = [row for row in notes.table() if row["what"] == "left out"]
    return "; ".join(f"{row['count']} {row['why']}" for row in rows[:5])


def _finish(dst, rows, plan, settings, notes, about):
    """Writes what is left to write, the index last, and removes what belongs to no clip. Returns the index."""
    for row in rows:
        if row["damaged"]:
            notes.add(
                "damaged",
                "what can be read of these clips is used",
                f"{row['name']} ({row['damaged']} times, from {row['time']:.1f} s)",
            )
        for fact in row["facts"]:
            notes.add("converted", fact, row["name"])
    files = {}
    if isinstance(rows[0]["label"], list):
        labels = np.array([row["label"] for row in rows], np.float32)
        write_whole(dst / "labels.safetensors", safetensors.numpy.save({"labels": labels}))
        files["labels.safetensors"] = sha256_of(dst / "labels.safetensors")
    columns = {column: [row[column] for row in rows] for column in COLUMNS}
    if rows[0]["label"] is None or files:
        columns["label"] = None
    _write_preview(dst, columns)
    files["preview.png"] = sha256_of(dst / "preview.png")
    index = {
        "format": FORMAT,
        "version": VERSION,
        "resolution": settings.resolution,
        "coding": settings.coding,
    }
    index |= {
        "settings": asdict(settings),
        **about,
        "made_from": digest_of(plan),
        "notes": notes.table(),
    }
    index |= {
        "fingerprint": fingerprint(settings.resolution, columns, files),
        "files": files,
        "clips": columns,
    }
    write_whole(dst / "index.json", json.dumps(index, indent=1) + "\n")
    kept = {*columns["file"], *files, "index.json"}
    for name in os.listdir(dst):
        if name not in kept and name.endswith((".safetensors", ".part", ".unpacked", "plan.json")):
            os.unlink(dst / name)
    return index


def fingerprint(resolution, columns, files):
    """A checksum of what the clips are, in hexadecimal; not of where they lie."""
    rows = [columns[name] for name in COLUMNS]
    return hashlib.sha256(
        json.dumps([resolution, rows, files.get("labels.safetensors")]).encode()
    ).hexdigest()


def _write_preview(dst, columns):
    """A picture of the first, middle and last frame of some clips, a row for each four of them."""
    from mostgan.data import (
        read_clip,
    )  # not above: it brings PyTorch, which the worker processes need not load

    count = len(columns["file"])
    tiles = []
    for clip in np.linspace(0, count - 1, min(count, PREVIEW_CLIPS)).astype(int):
        frames = columns["frames"][clip]
        images = read_clip(dst / columns["file"][clip], [0, frames // 2, frames - 1])
        tiles.append([Image.fromarray(image.transpose(1, 2, 0)) for image in images])
    side = min(PREVIEW_PIXELS, tiles[0][0].width)
    picture = Image.new("RGB", (3 * side * min(4, len(tiles)), side * -(-len(tiles) // 4)))
    for number, images in enumerate(tiles):
        for k, image in enumerate(images):
            place = (3 * (number % 4) + k) * side, number // 4 * side
            picture.paste(image.resize((side, side), Image.LANCZOS), place)
    with whole_file(dst / "preview.png") as file:
        picture.save(file, "PNG")
