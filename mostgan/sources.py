"""Finding clips: videos, folders of frames, and zips of either, with their labels, in any nesting."""

import hashlib
import json
import os
import re
import zipfile
import zlib
from contextlib import closing
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath

import av

from mostgan.config import UserError
from mostgan.video import center_crop_resize, frame_rate, read_frames

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
NOT_MEDIA = {".txt", ".json", ".csv", ".tsv", ".md", ".html", ".xml", ".yaml", ".yml", ".nfo", ".srt", ".vtt", ".log"}
# What reading a damaged or strange file may raise.
UNREADABLE = (av.FFmpegError, OSError, ValueError, RuntimeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass
class Source:
    """One clip to be: a video, or the images of one folder, in a folder or in an opened zip."""

    name: str
    root: Path
    files: list[str]  # relative to the root, or member names of the archive
    archive: zipfile.ZipFile | None = None
    label: int | None = None
    fps: float | None = None  # set while reading

    @property
    def is_video(self):
        return PurePosixPath(self.files[0]).suffix.lower() not in IMAGES

    def open(self, file):
        return BytesIO(self.archive.read(file)) if self.archive else open(self.root / file, "rb")

    def frames(self, resolution):
        """Yields uint8 [resolution,resolution,3]; raises one of UNREADABLE. Sets fps (25 for images)."""
        if self.is_video:
            with self.open(self.files[0]) as file:
                self.fps = frame_rate(file)
                file.seek(0)
                for frame in read_frames(file):
                    yield center_crop_resize(frame, resolution)
            return
        self.fps = 25.0
        for name in self.files:
            with self.open(name) as file:  # an open file, not a path: FFmpeg would take "%03d" in a path for a pattern
                with closing(read_frames(file)) as frames:
                    yield center_crop_resize(next(frames), resolution)


def find_sources(src, labels=None):
    """Every clip in SRC (folder, zip or single file), in the order of their names, as a list of Source.

    labels: None takes the labels of a `dataset.json` at the top, if there is one; "folders" numbers the top folders.
    Raises UserError when SRC is missing or holds nothing, or when labels do not fit.
    """
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
    sources.sort(key=lambda source: _natural(source.name))
    if labels == "folders":
        _label_by_folder(src, sources)
    elif labels is not None:
        raise UserError(f"labels '{labels}' is not known; use 'folders', or put a dataset.json beside the clips")
    unlabelled = [source.name for source in sources if source.label is None]
    if unlabelled and len(unlabelled) < len(sources):
        raise UserError(
            f"{src}: {len(unlabelled)} of {len(sources)} clips have no label in dataset.json, e.g. {unlabelled[0]}"
        )
    return sources


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
        # Links may lead in circles; and our own packed folders may lie beside the videos that they were made from.
        subfolders[:] = [d for d in sorted(subfolders) if not d.startswith(".") and not d.endswith(".clips")]
        if here in seen:
            subfolders[:] = []
            continue
        seen.add(here)
        files += [Path(folder, name).relative_to(src).as_posix() for name in sorted(names) if not name.startswith(".")]
    return files


def _in_zip(path):
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError):
        # As if it were a video: it will be skipped, and named, as the unreadable file that it is.
        return [Source(path.name, path.parent, [path.name])]
    files = [info.filename for info in archive.infolist() if not info.is_dir()]
    sources = _group(files, path.stem, root=path, archive=archive)
    tables = sorted((f for f in files if PurePosixPath(f).name == "dataset.json"), key=lambda f: f.count("/"))
    if tables:
        _label_by_table(f"{path}/{tables[0]}", archive.read(tables[0]), tables[0][: -len("dataset.json")], sources)
    return sources


def _group(files, root_name, root, archive=None):
    """File names → one Source per video and one per folder that holds images, ordered by their numbers."""
    sources, folders = [], {}
    for file in files:
        path = PurePosixPath(file)
        suffix = path.suffix.lower()
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
    """Labels from dataset.json: {"labels": {clip: label}} or {"labels": [[clip, label], …]}; a clip is named by its
    folder, by its file (with or without suffix), or by any one of its frames."""
    try:
        table = json.loads(text).get("labels") or []
        pairs = [(str(clip), label) for clip, label in (table.items() if isinstance(table, dict) else table)]
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{where} is not of the form {{'labels': [[clip, number], ...]}}") from None
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


def fingerprint(src):
    """A hash over the names, sizes and modification times of SRC's files: changes when the data does, unread."""
    src, digest = Path(src), hashlib.sha256()
    for file in [""] if src.is_file() else _files(src):
        path = src / file
        stat = path.stat() if path.exists() else path.lstat()  # a link that leads nowhere has only the latter
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
