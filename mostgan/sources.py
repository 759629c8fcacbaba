"""Finding clips: videos, folders of frames, and zips of either, with their labels and masks, in any nesting.
Reading one: the frames at the right times, the right part of each.
"""

import csv
import hashlib
import json
import lzma
import os
import re
import struct
import zipfile
import zlib
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from mostgan.config import UserError
from mostgan.video import center_box, crop_resize, decode_frames, frame_rate, packet_times, read_frames, to_rgb

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
NOT_MEDIA = {".txt", ".json", ".csv", ".tsv", ".md", ".html", ".xml", ".yaml", ".yml", ".nfo", ".srt", ".vtt", ".log"}
# What reading a damaged or strange file may raise.
UNREADABLE = (av.FFmpegError, OSError, ValueError, RuntimeError, EOFError, MemoryError, OverflowError, KeyError,
              zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)  # fmt: skip
JOURNAL = "packing.jsonl"  # lies in a packed folder while it is being made (see packing.py)

IMAGE_FPS = 25.0  # what folders of frames are taken to have, unless --fps says otherwise
ROUNDING = 1e-3  # seconds by which containers round times (Matroska counts in milliseconds)
LONGEST_HOLD = 60.0  # seconds that one frame may stay on screen; a longer gap is a damaged timestamp
HIGHEST_RATE = 240.0  # frames per second; gaps that claim more are damaged timestamps
MEMBER_BYTES = 1 << 30  # what one member of a zip may unpack to
BOMB_BYTES, BOMB_RATIO = 1 << 25, 100  # media hardly compress: a larger member that shrinks more is no picture


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Framing:
    """What to take of every clip. crop: "center", "none" (the whole frame, squeezed into the square) or a box
    (x, y, width, height) in pixels of the source. fps: resample in time to this rate; None keeps the source's."""

    crop: str | tuple[int, int, int, int] = "center"
    fps: float | None = None


@dataclass
class Source:
    """One clip to be: a video, or the images of one folder, in a folder or in an opened zip."""

    name: str
    root: Path
    files: list[str]  # relative to the root, or member names of the archive
    archive: zipfile.ZipFile | None = None
    label: int | None = None
    framing: Framing = field(default_factory=Framing)
    mask: "Source | None" = None  # white where the face is, frame for frame
    problem: str | None = None  # known before reading: why it cannot be used
    fps: float | None = None  # set while reading
    place: tuple | None = None  # likewise: where the frame that came last is found again; None if only from the start
    timing: tuple | None = None  # of a video that several threads read: what _read_timing says

    @property
    def is_video(self):
        return PurePosixPath(self.files[0]).suffix.lower() not in IMAGES

    def identity(self):
        """A text that changes when the clip or its label does, without reading it."""
        if self.archive:
            infos = [self.archive.getinfo(file) for file in self.files]
            stamps = [(info.filename, info.file_size, info.CRC) for info in infos]
        else:
            stamps = [(file, *_size_and_time(self.root / file)) for file in self.files]
        digest = hashlib.sha256(repr(stamps).encode("utf-8", "surrogateescape")).hexdigest()
        return f"{self.name} {self.label} {digest}" + (f" masked by {self.mask.identity()}" if self.mask else "")

    def frames(self, resolution, place=None):
        """Yields uint8 [resolution,resolution,3]; raises one of UNREADABLE. Sets fps and, frame by frame, place.

        place: one noted before; begins with its frame. Raises ValueError when that is not to be found.
        """
        if self.problem:
            raise ValueError(self.problem)
        box, mask_shape = widest_box(self.mask) if self.mask else (None, None)
        for frame in self.whole_frames(place):
            height, width = frame.shape[:2]
            if box is not None and mask_shape != (height, width):
                raise ValueError(f"its mask is of {mask_shape[1]}x{mask_shape[0]} pixels, it of {width}x{height}")
            if box is not None:
                here = square_around(box, height, width)
            elif self.framing.crop == "center":
                here = center_box(frame.shape)
            else:
                here = (0, 0, width, height) if self.framing.crop == "none" else self.framing.crop
            yield crop_resize(frame, here, resolution)

    def whole_frames(self, place=None):
        """Yields uint8 [H,W,3]: what is on screen at every 1/fps of a second."""
        # A place: number of the frame; of videos, too, the time of the first one (seconds) and the frame's own pts.
        begin, start, pts = place or (0, None, None)
        if self.is_video:
            yield from self._video_frames(begin, start, pts)
            return
        self.fps = self.framing.fps or IMAGE_FPS
        for number, name in enumerate(self.files[begin:], begin):
            with self._open(name) as file, closing(read_frames(file)) as images:
                image = next(images, None)
            if image is None:
                raise ValueError(f"{PurePosixPath(name).name} holds no picture")
            self.place = (number, None, None)
            yield image

    def _video_frames(self, begin, start, pts):
        with self._open(self.files[0]) as file:
            self.fps, own_rate, resample, times, end, _ = self.timing or self._read_timing(file)
            if resample and len(times) > 1 and max(np.diff(times).max(), end - times[-1]) > LONGEST_HOLD:
                raise ValueError(f"its timestamps jump by more than {LONGEST_HOLD:.0f} seconds")
            frames, reformatter = _with_order(decode_frames(file, pts)), VideoReformatter()
            if resample:
                frames = on_screen(frames, self.fps, own_rate, end, start, begin)
            for number, (frame, in_order) in enumerate(frames, begin):
                start = frame.time if start is None else start
                self.place = (number, start, frame.pts) if in_order else None
                yield to_rgb(frame, reformatter)

    def _read_timing(self, file):
        """(fps, own rate, whether that means resampling, times and end of the frames, times of the key frames)."""
        stated = frame_rate(file)
        file.seek(0)
        times, end, keys = packet_times(file)
        file.seek(0)
        own_rate, even = cadence(times, stated)
        fps = self.framing.fps or own_rate
        return fps, own_rate, not even or abs(fps - own_rate) >= 1e-5 * own_rate, times, end, keys

    def places(self, every):
        """Where frames number every - 1, 2 every - 1, … should be found, told without decoding: a list of places.

        It is empty for what is short or cannot be searched, and has to be read in one go. Decoding may show that the
        places are wrong: frames that the container lists and the decoder drops shift those behind them.
        """
        if self.problem or self.mask or (self.archive and self.is_video):  # which would be unpacked by every job
            return []
        if not self.is_video:
            return [(number - 1, None, None) for number in range(every, len(self.files), every)]
        try:
            with self._open(self.files[0]) as file:
                fps, _, resample, times, end, keys = timing = self._read_timing(file)
                length = int((end - times[0]) * fps) if resample and len(times) else len(times)
                # Between far key frames, jobs would decode much that others decode too.
                if length <= every or not len(keys) or np.diff(keys, append=end).max() > every / fps / 2:
                    return []
                with closing(decode_frames(file)) as frames:
                    start, time_base = (first := next(frames)).time, float(first.time_base)
        except (*UNREADABLE, StopIteration):
            return []  # reading it will say why
        numbers = np.arange(every, length, every) - 1
        shown = np.searchsorted(times - ROUNDING, start + numbers / fps, side="right") - 1 if resample else numbers
        self.timing = timing
        return [(int(n), start, round(times[max(i, 0)] / time_base)) for n, i in zip(numbers, shown)]

    def _open(self, file):
        # An open file, not a path: FFmpeg would take "%03d" in a path for a pattern.
        return BytesIO(read_member(self.archive, file)) if self.archive else open(self.root / file, "rb")


def cadence(times, stated):
    """(frames per second, whether they are evenly spaced) of frames shown at `times` (seconds, ascending float64 [n]).

    Even: each frame is less than half a period from where a constant rate puts it; the rate is then the stated one.
    Else the rate is that of the usual gap: 30 for a phone's 30 frames a second that left some out.
    """
    if len(times) < 3:
        return stated, True
    period = (times[-1] - times[0]) / (len(times) - 1)
    off = np.abs(times - times[0] - period * np.arange(len(times))).max()
    if off < period / 2:
        return stated, True
    return min(float(round(1 / np.median(np.diff(times)), 3)), HIGHEST_RATE), False


def _with_order(frames):
    """av.VideoFrames → (frame, whether up to here each one has a timestamp, later than the one before)."""
    in_order, before = True, None
    for frame in frames:
        in_order = in_order and frame.pts is not None and (before is None or frame.pts > before)
        before = frame.pts
        yield frame, in_order


def on_screen(frames, fps, own_rate, end, start=None, count=0):
    """Pairs (av.VideoFrame, …) → those on screen at 0, 1/fps, 2/fps … seconds after `start`, up to `end`.

    start: by default when the first one is shown. count: how many came before, where the frames are those of the rest.
    """
    shown, time = None, 0.0
    for frame in frames:
        time = frame[0].time if frame[0].time is not None else time + 1 / own_rate
        start = time if start is None else start
        while shown is not None and start + count / fps < time - ROUNDING:
            yield shown
            count += 1
        shown = frame
    end = end if end > time else time + 1 / own_rate
    while shown is not None and start + count / fps < end - ROUNDING:
        yield shown
        count += 1


def widest_box(mask):
    """The box (x, y, width, height) that holds the white of every frame of a mask, and the shape (H, W) of the mask.

    One box for the clip, so that the crop neither shakes nor cuts. Raises ValueError where the mask is all black.
    """
    left, top, right, bottom = np.inf, np.inf, 0, 0
    for frame in mask.whole_frames():
        white = frame.max(2) > 127
        columns, rows = np.flatnonzero(white.any(0)), np.flatnonzero(white.any(1))
        if len(columns):
            left, right = min(left, columns[0]), max(right, columns[-1] + 1)
            top, bottom = min(top, rows[0]), max(bottom, rows[-1] + 1)
    if not right:
        raise ValueError(f"its mask {mask.name} is black throughout")
    return (int(left), int(top), int(right - left), int(bottom - top)), white.shape


def square_around(box, height, width):
    """The smallest square (x, y, side, side) around a box's centre that holds it, moved or cut to lie in the frame."""
    x, y, box_width, box_height = box
    side = min(max(box_width, box_height), height, width)
    x, y = x + (box_width - side) // 2, y + (box_height - side) // 2
    return min(max(x, 0), width - side), min(max(y, 0), height - side), side, side


# ------------------------------------------------------------------------------------------------------------- finding


def find_sources(src, labels=None, framing=None, masks=None):
    """Every clip in SRC (folder, zip or single file), in the order of their names, as a list of Source.

    labels: None takes the labels of a `dataset.json` at the top, if there is one; "folders" numbers the top folders;
    else a path to such a table, JSON or CSV. framing: see Framing. masks: a folder or zip of masks, videos or frames,
    named as their clips are, or <clip>_<anything> (FaceForensics names <clip>_<other clip>); a clip's crop is the
    square around its mask. Raises UserError when SRC is missing or holds nothing, or when labels or masks do not fit.
    """
    sources = _list(src)
    if labels == "folders":
        _label_by_folder(src, sources)
    elif labels is not None:
        _label_by_file(Path(labels), sources)
    unlabelled = [source.name for source in sources if source.label is None and not source.problem]
    if unlabelled and any(source.label is not None for source in sources):
        count = f"{len(unlabelled)} of {len(sources)}"
        raise UserError(f"{src}: {count} clips have no label in {labels or 'dataset.json'}, e.g. {unlabelled[0]}")
    for source in sources:
        source.framing = framing or source.framing
    if masks is not None:
        _find_masks(sources, masks)
    return sources


def _list(src):
    src = Path(src)
    if not src.exists():
        raise UserError(f"{src} does not exist")
    if src.is_file() and src.suffix.lower() != ".zip":
        sources = [Source(src.name, src.parent, [src.name])]
    elif src.is_file():
        sources = _in_zip(src)
    else:
        sources = _in_folder(src)
    if not sources:
        raise UserError(f"{src} holds no videos, no folders of frames and no zips of them")
    return sorted(sources, key=lambda source: _natural(source.name))


def _in_folder(src):
    files = _files(src)
    archives = [file for file in files if file.lower().endswith(".zip")]
    others = [file for file in files if not file.lower().endswith(".zip")]
    sources = _group(others, src.resolve().name, root=src)
    if (src / "dataset.json").is_file():
        _label_by_table(src / "dataset.json", (src / "dataset.json").read_bytes(), "", sources)
    for file in archives:
        for source in _in_zip(src / file):
            sources.append(replace(source, name=f"{file}/{source.name}" if source.archive else file))
    return sources


def _files(src):
    """Paths of all files below the folder src, relative to it, but hidden ones."""
    files, seen = [], set()
    for folder, subfolders, names in os.walk(src, followlinks=True):
        here = os.path.realpath(folder)
        # Links may lead in circles; and our own packed folders may lie among the videos that they were made from.
        subfolders[:] = [d for d in sorted(subfolders) if not d.startswith(".") and not d.endswith(".clips")]
        if here in seen or JOURNAL in names or {"index.json", "offsets.npy"} <= set(names):
            subfolders[:] = []
            continue
        seen.add(here)
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            if path.is_file() or not path.exists():  # no pipes, which never end; but broken links
                files.append(path.relative_to(src).as_posix())
    return files


def _in_zip(path):
    try:
        archive = zipfile.ZipFile(path)
    except UNREADABLE:
        # As if it were a video: it will be skipped, and named, as the unreadable file that it is.
        return [Source(path.name, path.parent, [path.name])]
    files = [info.filename for info in archive.infolist() if not info.is_dir()]
    sources = _group(files, path.stem, root=path, archive=archive)
    tables = sorted((f for f in files if PurePosixPath(f).name == "dataset.json"), key=lambda f: f.count("/"))
    if tables:
        try:
            text = read_member(archive, tables[0])
        except UNREADABLE as error:
            raise UserError(f"{path}/{tables[0]} cannot be read: {error}") from error
        _label_by_table(f"{path}/{tables[0]}", text, tables[0][: -len("dataset.json")], sources)
    return sources


def read_member(archive, name):
    """The bytes of one member of an opened zip. Raises ValueError for one that unpacks to too much; UNREADABLE."""
    info = archive.getinfo(name)
    if info.file_size > MEMBER_BYTES:
        raise ValueError(f"it unpacks to {info.file_size / 1e9:.1f} GB, too much to read within a zip; unpack the zip")
    if info.file_size > BOMB_BYTES and info.file_size > BOMB_RATIO * info.compress_size:
        raise ValueError(f"it unpacks to more than {BOMB_RATIO} times its size, as no picture does")
    return archive.read(info)


def _group(files, root_name, root, archive=None):
    """File names → one Source per video and one per folder that holds images, ordered by their numbers."""
    sources, folders = [], {}
    for file in files:
        path = PurePosixPath(file)
        suffix = path.suffix.lower()
        if path.is_absolute() or PureWindowsPath(file).drive or ".." in PureWindowsPath(file).parts:
            sources.append(Source(file, root, [file], archive, problem="its name leads out of the zip"))
            continue
        if suffix in NOT_MEDIA or any(part.startswith((".", "__MACOSX")) for part in path.parts):
            continue
        if suffix in IMAGES:
            folders.setdefault(path.parent.as_posix(), []).append(file)
        else:
            sources.append(Source(file, root, [file], archive))
    for folder, images in folders.items():
        sources.append(Source(root_name if folder == "." else folder, root, sorted(images, key=_natural), archive))
    return sources


def _natural(text):
    """Sort key in which frame2 comes before frame10."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _label_by_table(where, text, prefix, sources):
    """Labels from dataset.json: {"labels": {clip: label}} or {"labels": [[clip, label], …]}."""
    try:
        table = json.loads(text).get("labels") or []
        pairs = [(str(clip), label) for clip, label in (table.items() if isinstance(table, dict) else table)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where} is not of the form {{'labels': [[clip, number], ...]}}") from None
    _label_by_pairs(where, pairs, prefix, sources)


def _label_by_file(path, sources):
    """Labels from a JSON file as above, or from lines `clip,label` (.csv, or .txt with a space between the two)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"labels: cannot read {path} ({getattr(error, 'strerror', None) or 'not text'}); "
                        "give a file, or `folders`") from error  # fmt: skip
    if path.suffix.lower() == ".json":
        _label_by_table(path, text, "", sources)
        return
    rows = list(csv.reader(text.splitlines(), delimiter="," if path.suffix.lower() == ".csv" else " "))
    try:
        pairs = [(row[0], int(row[1])) for row in rows if row]
    except (IndexError, ValueError):
        raise UserError(f"{path} is not of the form clip,number on every line") from None
    _label_by_pairs(path, pairs, "", sources)


def _label_by_pairs(where, pairs, prefix, sources):
    """A clip is named by its folder, by its file (with or without suffix), or by any one of its frames."""
    labels = {}
    for clip, label in pairs:
        if type(label) is not int or label < 0:
            raise UserError(f"{where}: the label of {clip} is {label!r}, not a whole number from 0 up")
        path = PurePosixPath(clip)
        labels[path.parent.as_posix() if path.suffix.lower() in IMAGES else path.as_posix()] = label
    for source in sources:
        name = source.name.removeprefix(prefix)
        source.label = labels.get(name, labels.get(os.path.splitext(name)[0]))


def _label_by_folder(src, sources):
    if any("/" not in source.name for source in sources):
        raise UserError(f"{src}: labels by folders need every clip in a folder named after its class")
    classes = sorted({source.name.split("/")[0] for source in sources}, key=_natural)
    for source in sources:
        source.label = classes.index(source.name.split("/")[0])


def _find_masks(sources, masks):
    """Gives each source the mask of its path (any suffix), else of its name, else the first named <name>_<anything>."""
    found = {}
    for mask in reversed(_list(masks)):
        stem = PurePosixPath(_stem(mask.name)).name
        beginnings = [stem[: i + 1] + "*" for i, letter in enumerate(stem) if letter == "_"]
        found |= dict.fromkeys([_stem(mask.name), stem, *beginnings], mask)
    for source in sources:
        stem = PurePosixPath(_stem(source.name)).name
        source.mask = found.get(_stem(source.name)) or found.get(stem) or found.get(stem + "_*")
        if source.mask is None:
            source.problem = source.problem or "no mask"
    if all(source.mask is None for source in sources):
        raise UserError(f"{masks} holds no mask for any clip, e.g. none named {stem} or {stem}_...")


def _stem(name):
    return os.path.splitext(name)[0]


def _size_and_time(path):
    try:
        stat = path.stat()
    except OSError:
        return -1, -1  # a link that leads nowhere; reading it will say so
    return stat.st_size, stat.st_mtime_ns


def fingerprint(src):
    """A hash over the names, sizes and modification times of SRC's files: changes when the data does, unread."""
    src, digest = Path(src), hashlib.sha256()
    for file in [""] if src.is_file() else _files(src):
        size, time = _size_and_time(src / file)
        digest.update(f"{file}\0{size}\0{time}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
