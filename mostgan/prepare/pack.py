"""Making a packed folder: worker processes make the clips, each a file of its own, and the index
comes last.

A packed folder holds
    NAME.safetensors    one clip: `frames` uint8 [n, 3, R, R], or `jpeg` uint8 [bytes] and `offsets`
                        int64 [n + 1], where frame i is the JPEG jpeg[offsets[i] : offsets[i + 1]];
                        as metadata, under the key `clip`, a JSON object with name, source, label,
                        fps, start and time (of its first frame in its source), …
    labels.safetensors  `labels` float32 [clips, C], where the labels are vectors
    frame_conditions.safetensors  `frames` float32 [frames of all clips, E], where each has one
    preview.png         first, middle and last frame of some clips
    index.json          written last: without it, the folder is not finished
and, while it is made, `plan.json`: what it is made of. A run that goes on after an interruption
makes the clips that are not there.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import PIL
import safetensors.numpy
from PIL import Image
from tqdm import tqdm

from mostgan.config import UserError
from mostgan.files import is_unfinished, read_json, sha256_of, whole_file, write_whole
from mostgan.prepare.archives import UNPACKED
from mostgan.prepare.clips import (
    MIN_FRAMES,
    about_clip,
    file_name,
    jobs_of,
    made_before,
    make,
)
from mostgan.prepare.reading import printable
from mostgan.prepare.sources import Notes
from mostgan.program import cores

FORMAT, VERSION = "mostgan-clips", 3  # as mostgan/data.py reads it
RAW_UP_TO = 128  # pixels a side: opening a small JPEG costs more than reading it raw
COLUMNS = ("file", "name", "source", "label", "fps", "start", "time", "frames", "damaged", "sha256")
PREVIEW_CLIPS, PREVIEW_PIXELS = 12, 128


# ------------------------------------------------------------------------------------------ workers


def look(source, settings):
    """The source, having looked at what it is (see Source.look). What a worker process calls."""
    source.look(settings)
    return source


class _Here:
    """What stands for a pool of processes where one is enough."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@contextlib.contextmanager
def _workers(jobs):
    """A pool of spawned processes that end with this one, however it ends. (A fork would copy locks
    that threads hold.)
    """
    if jobs == 1:
        yield _Here()
        return
    pool = _Pool(jobs, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        yield pool
    except BrokenProcessPool:
        died = "a process of the preparation died (killed, or short of memory)"
        hint = "a script that calls this needs `if __name__ == '__main__':` around it"
        raise UserError(f"{died}; the same command goes on where it stopped ({hint})") from None
    finally:
        if sys.exc_info()[0] is not None:
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown(cancel_futures=True)


class _Pool(ProcessPoolExecutor):
    """A pool whose processes take no notice of Ctrl-C, from their first moment on: it is for the
    process that hands them their jobs. Any submit may start one of them.
    """

    def submit(self, function, *args):
        if threading.current_thread() is not threading.main_thread():
            return super().submit(function, *args)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a new process inherits
        try:
            return super().submit(function, *args)
        finally:
            signal.signal(signal.SIGINT, before)


def _end_with_parent():
    """What a worker does at its start: when the first process is killed, it would wait for ever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ------------------------------------------------------------------------------------------ packing


def pack(sources, dst, settings, **options):
    """As pack_here, into a folder that is made if need be and kept from other processes."""
    with locked(Path(dst)):
        return pack_here(sources, dst, settings, **options)


def pack_here(
    sources, dst, settings, notes=None, about=None, strict=False, jobs=None, conditions=None
):
    """Packs sources into the locked folder `dst` and returns its index (a dict). Goes on where an
    interrupted run stopped.

    sources: objects like sources.Source. notes: what is known already of files left out. about:
    more entries of the index. jobs: processes; None: one for each core. conditions: a
    conditions.Conditions, which the sources were told. Sources that cannot be used are left out,
    with a note; strict makes that, and any damage, an error. Raises UserError for that, when no
    clip is left, when dst holds other clips or cannot be written.
    """
    dst, notes = Path(dst), notes or Notes()
    if not 4 <= settings.resolution <= 4096:
        raise UserError(f"--resolution {settings.resolution} is not possible: from 4 to 4096")
    if settings.clip_length is not None and settings.clip_length < MIN_FRAMES:
        least = f"training takes {MIN_FRAMES} frames of a clip"
        raise UserError(f"--clip-length {settings.clip_length} is too short: {least}")
    about, jobs = about or {}, jobs or cores()
    if settings.clip_length is None:
        jobs = min(jobs, len(sources))
    try:
        plan, made_from = _plan(sources, settings), _made_from(sources, settings, about)
        if index := _finished(dst, made_from, plan):
            return index
        _take_up(dst, plan)
        with _workers(jobs) as pool:
            rows = _make_all(pool, sources, dst, settings, notes, conditions)
        _judge(rows, notes, strict, f"{about.get('source', dst)}, {len(sources)} clips")
        return _finish(dst, rows, made_from, settings, notes, about, conditions)
    except OSError as error:
        reason = f"cannot write {printable(str(dst))}: {error.strerror or error}"
        raise UserError(f"{reason}; the same command goes on where it stopped") from error


@contextlib.contextmanager
def locked(dst):
    """Makes the folder dst, if it is not there, and keeps other processes from preparing it.

    Raises UserError where it cannot be made, or holds anything but what was packed.
    """
    told = printable(str(dst))
    if dst.exists() and not dst.is_dir():
        raise UserError(f"{told} is a file; choose another place")
    try:
        dst.mkdir(parents=True, exist_ok=True)
        handle = os.open(dst, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot make {told}: {error.strerror}") from None
    try:
        with contextlib.suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = f"another process is preparing {told}; wait until it has finished"
                raise UserError(other) from None
        if any(not _is_temporary(name) for name in os.listdir(dst)) and not _is_ours(dst):
            raise UserError(f"{told} exists already and is no packed folder; choose another place")
        yield
    finally:
        os.close(handle)


def _is_ours(dst):
    """Whether a folder is packed, or was begun to be, so that files of it may be removed."""
    index, plan = read_json(dst / "index.json"), read_json(dst / "plan.json")
    return index.get("format") == FORMAT or {"made by", "sources"} <= plan.keys()


def _is_temporary(name):
    return is_unfinished(name) or name.startswith(".") and name.endswith(UNPACKED)


def _plan(sources, settings):
    """What a folder is made of: versions and settings, and of each source (by how its files' names
    begin) a fingerprint.

    Another FFmpeg or Pillow may give other frames: what it began, this one does not go on with.
    """
    made_by = [VERSION, av.__version__, PIL.__version__, asdict(settings)]
    prints = {
        _prefix(file_name(source, 0)): _digest(source.stamp(), source.label) for source in sources
    }
    return {"made by": json.loads(json.dumps(made_by)), "sources": prints}


def _prefix(file):
    return file.rpartition("-")[0]


def _digest(*values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _made_from(sources, settings, about):
    """A fingerprint of the sources' names and sizes and of the settings. Not of times: copies of
    files give the same bytes.
    """
    stamps = [[source.stamp(times=False), source.label] for source in sources]
    return _digest(VERSION, asdict(settings), stamps, about.get("labels"))


def _finished(dst, made_from, plan):
    """The index of a folder that was finished from the same sources, or None. UserError if it was
    finished from others.
    """
    if (dst / "index.json").exists():
        index = read_json(dst / "index.json")
        if index.get("made_from") != made_from:
            told = f"{printable(str(dst))} exists already and holds clips of another source"
            told += " or with other settings"
            raise UserError(f"{told}; remove it or choose another place")
        if index.get("checksum") == checksum_of(index):
            wrong = [*wrong_files(dst, index["files"])]
            wrong += [file for file in index["clips"]["file"] if about_clip(dst / file) is None]
            if not wrong:
                return index
        else:  # nothing tells which clips are whole
            wrong = [name for name in os.listdir(dst) if name.endswith(".safetensors")]
        # In this order: if it is interrupted, the index tells again that files are missing.
        write_whole(dst / "plan.json", json.dumps(plan))
        for file in wrong:
            (dst / file).unlink(missing_ok=True)
        os.unlink(dst / "index.json")
    return None


def wrong_files(dst, sums):
    """{name of a file: what is wrong with it}, of those that are not as they were written. sums:
    {name of a file: its SHA-256}. Reads every byte.
    """
    wrong = {}
    for file, digest in sums.items():
        try:
            if sha256_of(dst / file) != digest:
                wrong[file] = "is damaged"
        except FileNotFoundError:
            wrong[file] = "is missing"
        except OSError as error:
            wrong[file] = f"cannot be read: {error.strerror}"
    return wrong


def _take_up(dst, plan):
    """Removes what an earlier run left of other settings, or of sources that have changed since."""
    before, kept = read_json(dst / "plan.json"), set()
    if before.get("made by") == plan["made by"]:
        kept = {prefix for prefix, _ in before["sources"].items() & plan["sources"].items()}
    for name in os.listdir(dst):
        if is_unfinished(name) or name.endswith(".safetensors") and _prefix(name) not in kept:
            os.unlink(dst / name)
    write_whole(dst / "plan.json", json.dumps(plan))
    if any(name.endswith(".safetensors") for name in os.listdir(dst)):
        print(f"going on with {printable(str(dst))}", file=sys.stderr)


def _make_all(pool, sources, dst, settings, notes, conditions):
    """The rows of all clips, those that an earlier run left and those that are made now."""
    looked = [None if s.problem else pool.submit(look, s, settings) for s in sources]
    sources = [future.result() if future else s for future, s in zip(looked, sources)]
    made, running = [([], []) for _ in sources], {}  # rows; damage that lies in none of the clips
    for number, source in enumerate(sources):
        for job in () if source.problem else jobs_of(source, settings):
            rows = made_before(source, job, dst)
            if rows is None:
                running[pool.submit(make, source, job, settings, str(dst))] = number
            else:
                made[number][0].extend(rows)
    bar = tqdm(as_completed(running), total=len(running), desc="packing", unit="job", disable=None)
    for future in bar:
        for told, more in zip(made[running[future]], future.result()):
            told.extend(more)
    for source, (rows, lost) in zip(sources, made):
        rows.sort(key=lambda row: row["start"])
        _tell(source, rows, lost, notes)
        if conditions:
            broken = bool(lost) or any(row["damaged"] for row in rows)
            conditions.place(source, rows, settings, broken)
    return [row for rows, _ in made for row in rows]


def _tell(source, rows, lost, notes):
    """Notes what of a source was left out, damaged, or converted as a user should know."""
    if not rows:
        problem = source.problem or "; ".join(lost[:3]) or f"shorter than {MIN_FRAMES} frames"
        few = not source.problem and source.kind == "folder" and len(source.files) < MIN_FRAMES
        notes.add("left out", problem, *(source.files if few else [source.name]))
    elif lost:
        notes.add("damaged, clips are missing there", lost[0], source.name)
    for row in rows:
        if row["damaged"]:
            told = f"{row['name']}: {row['damaged']} times, {', '.join(row['damage'])}"
            notes.add("damaged", "what can be read of these clips is used", told)
        for fact in row["facts"]:
            notes.add("converted", fact, row["name"])


def _judge(rows, notes, strict, what):
    """UserError where no clip is left, or strict admits nothing left out or damaged."""
    if strict and (told := notes.lines("left out", "damaged")):
        else_ = "without --strict it would be used as far as it goes, or left out"
        raise UserError(f"{told[0]} ({else_})")
    if not rows:
        told = "; ".join(notes.lines("left out")[:3])
        raise UserError(f"{what}: none can be used ({told})")


def _finish(dst, rows, made_from, settings, notes, about, conditions):
    """Writes what is left to write, the index last, and removes what belongs to no clip. Returns
    the index.
    """
    files = conditions.write(dst, rows) if conditions else {}
    if isinstance(rows[0]["label"], list):
        labels = np.array([row["label"] for row in rows], np.float32)
        write_whole(dst / "labels.safetensors", safetensors.numpy.save({"labels": labels}))
        files["labels.safetensors"] = sha256_of(dst / "labels.safetensors")
    columns = {column: [row[column] for row in rows] for column in COLUMNS}
    if rows[0]["label"] is None or files:
        columns["label"] = None
    _write_preview(dst, columns, settings.resolution, settings.coding)
    files["preview.png"] = sha256_of(dst / "preview.png")
    index = {"format": FORMAT, "version": VERSION, "resolution": settings.resolution}
    index |= {"coding": settings.coding, "settings": asdict(settings), **about}
    index |= {"made_from": made_from, "notes": notes.table(), "files": files, "clips": columns}
    index["fingerprint"] = fingerprint(settings.resolution, columns, files)
    index["checksum"] = checksum_of(index)
    write_whole(dst / "index.json", json.dumps(index, indent=1))
    kept = {*columns["file"], *files, "index.json"}
    for name in os.listdir(dst):
        ours = _is_temporary(name) or name.endswith(".safetensors") or name == "plan.json"
        if ours and name not in kept:
            os.unlink(dst / name)
    return index


def fingerprint(resolution, columns, files):
    """A checksum of what the clips are, in hexadecimal; not of where they lie."""
    sums = [files[name] for name in ("frame_conditions.safetensors",) if name in files]
    columns = [columns[name] for name in COLUMNS]
    return _digest(resolution, columns, files.get("labels.safetensors"), *sums)


def checksum_of(index):
    """A checksum of all that an index holds, but for this one, in hexadecimal."""
    return _digest({name: value for name, value in index.items() if name != "checksum"})


def _write_preview(dst, columns, size, coding):
    """A picture of the first, middle and last frame of some clips, a row for each four of them."""
    # Not above: it brings PyTorch, which the worker processes need not load.
    from mostgan.data import read_clip

    count = len(columns["file"])
    tiles = []
    for clip in np.linspace(0, count - 1, min(count, PREVIEW_CLIPS)).astype(int):
        frames, images = columns["frames"][clip], np.empty((3, 3, size, size), np.uint8)
        read_clip(dst / columns["file"][clip], [0, frames // 2, frames - 1], frames, coding, images)
        tiles.append([Image.fromarray(image.transpose(1, 2, 0)) for image in images])
    side = min(PREVIEW_PIXELS, tiles[0][0].width)
    picture = Image.new("RGB", (3 * side * min(4, len(tiles)), side * -(-len(tiles) // 4)))
    for number, images in enumerate(tiles):
        for k, image in enumerate(images):
            place = (3 * (number % 4) + k) * side, number // 4 * side
            picture.paste(image.resize((side, side), Image.LANCZOS), place)
    with whole_file(dst / "preview.png") as file:
        picture.save(file, "PNG")
