"""The files of a folder, a zip or a tar, listed and opened in one way. Archives are read in place.

A file's name is its path below the root, with slashes, whatever the system or the program that
packed it.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from functools import lru_cache
from pathlib import PurePosixPath, PureWindowsPath

from mostgan.files import whole_file

ARCHIVES = tuple(".zip .tar .tgz .tar.gz .tbz2 .tar.bz2 .txz .tar.xz".split())
OTHER_ARCHIVES = tuple(".7z .rar .gz .bz2 .xz .zst .lz4 .tar.zst".split())  # named, not read
DAMAGED = (OSError, EOFError, ValueError, RuntimeError, MemoryError, KeyError)
DAMAGED += (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
HELD_BYTES = 64 << 20  # largest member of a zip in memory; others go into a temporary file
LARGEST_MEMBER = 4 << 30  # bytes that a packed member may unpack to
MOST_PACKED = 100  # times that media may shrink: what shrinks more is meant to fill the disk
# How compressed files begin, whatever their names say.
OPENERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
UNPACKED = ".unpacked"  # how the names of unpacked tars end
READ_BY_US = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)


def is_archive(name):
    return name.lower().endswith(ARCHIVES)


class Folder:
    """The files of a folder, nested folders included."""

    def __init__(self, path):
        self.path = path

    def names(self, leave_out=None):
        """Paths of all files but those in folders of our own clips and in the folder `leave_out` (a
        real path).
        """
        names, seen, closed = [], {leave_out}, []
        for folder, subfolders, files in os.walk(
            self.path, onerror=closed.append, followlinks=True
        ):
            here = os.path.realpath(folder)
            # Links may lead in circles; and clips that we packed may lie among the videos that they
            # were made from.
            ours = (
                folder.endswith(".clips")
                or "index.json" in files
                and ("offsets.npy" in files or any(file.endswith(".safetensors") for file in files))
            )
            if here in seen or (ours and folder != self.path):
                subfolders.clear()
                continue
            seen.add(here)
            names += [os.path.join(folder, file) for file in files]
        names += [error.filename for error in closed]  # `problem` says what they are
        return [os.path.relpath(name, self.path).replace(os.sep, "/") for name in names]

    def problem(self, name):
        path = os.path.join(self.path, name)
        if os.path.isdir(path):
            return "a folder that cannot be opened"
        if os.path.exists(path) and not os.path.isfile(path):
            return "it is no file"  # a pipe would never end
        return None

    def stamp(self, name):
        try:
            status = os.stat(os.path.join(self.path, name))
        except OSError:
            return [-1, -1]  # a link that leads nowhere
        return [status.st_size, status.st_mtime_ns]

    def open(self, name):
        return open(os.path.join(self.path, name), "rb")

    def video(self, name):
        """What videos.open_video takes: a path where there is one."""
        return os.path.join(self.path, name)


class Archive:
    """What zips and tars have in common. members: {name: what the library knows of it}."""

    cut = None  # why the rest of it could not be read

    def __init__(self, members):
        # Windows programs have written backslashes; nobody means one inside a name unless there are
        # slashes too.
        windows = not any("/" in name for name in members)
        self.members = {}
        for name, member in members.items():
            name = name.replace("\\", "/") if windows else name
            self.members[name.removeprefix("./")] = member

    def names(self):
        return list(self.members)

    def problem(self, name):
        """Why a member cannot be used, as far as that can be told without reading it, or None."""
        path = PurePosixPath(name)
        if path.is_absolute() or PureWindowsPath(name).drive or ".." in PureWindowsPath(name).parts:
            return "its name leads out of the archive"
        return self.cannot_read(self.members[name])

    def video(self, name):
        return self.open(name)


class Zip(Archive):
    def __init__(self, path):
        self.file = zipfile.ZipFile(path)
        super().__init__(
            {info.filename: info for info in self.file.infolist() if not info.is_dir()}
        )

    def stamp(self, name):
        return [self.members[name].file_size, self.members[name].CRC]

    def cannot_read(self, info):
        if info.flag_bits & 1:
            return "it needs a password"
        if info.compress_type not in READ_BY_US:
            method = f"a method that is not read (number {info.compress_type})"
            return f"it is compressed by {method}; pack it with deflate"
        if info.file_size > min(LARGEST_MEMBER, MOST_PACKED * max(info.compress_size, 1 << 18)):
            size = f"{info.file_size / 1e6:.0f} MB"
            return f"it unpacks to {size}, too much; unpack the archive first"
        return None

    def open(self, name):
        info = self.members[name]
        if problem := self.cannot_read(info):
            raise ValueError(problem)
        if info.file_size <= HELD_BYTES:
            return io.BytesIO(self.file.read(info))
        file = tempfile.TemporaryFile()
        with self.file.open(info) as packed:
            shutil.copyfileobj(packed, file)
        file.seek(0)
        return file


class Tar(Archive):
    """An uncompressed tar; `unpacked` makes one of a compressed tar."""

    def __init__(self, path):
        self.file, members = tarfile.open(path, "r:"), {}
        try:
            for info in self.file:
                if info.isfile():
                    members[info.name] = info
        except DAMAGED as error:
            self.cut = str(error)
        super().__init__(members)

    def stamp(self, name):
        return [self.members[name].size, int(self.members[name].mtime)]

    def cannot_read(self, info):
        return None

    def open(self, name):
        return self.file.extractfile(self.members[name])


def unpacked(path, scratch):
    """A compressed tar → the path of the same tar uncompressed, in the folder `scratch`, which is
    faster to read out of order. Returns other paths as they are. Raises ValueError where it unpacks
    to far more than it should; OSError.
    """
    with open(path, "rb") as file:
        opener = OPENERS.get(file.read(2))
    if opener is None:
        return path
    limit = MOST_PACKED * os.path.getsize(path) + (1 << 30)
    # Not its name: another folder may hold an archive of the same one.
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    out = os.path.join(scratch, f".{digest}{UNPACKED}")
    with opener(path) as packed, whole_file(out) as file:
        while data := _readable(packed):
            file.write(data)
            if file.tell() > limit:
                raise ValueError(f"it unpacks to more than {MOST_PACKED} times its size")
    return out


def _readable(packed):
    """The next megabyte of a compressed file, b"" at its end, or where the rest is damaged: what is
    before can be used.
    """
    try:
        return packed.read(1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        return b""
    except OSError as error:
        if error.errno:  # of the disk, not of the data
            raise
        return b""


def open_root(path):
    """The Folder, Zip or Tar at `path`; an archive is opened once in each process. Raises what
    DAMAGED lists.
    """
    path = str(path)
    if os.path.isdir(path):
        return Folder(path)
    return _open_archive(path, os.stat(path).st_mtime_ns, os.getpid())


@lru_cache(maxsize=8)
def _open_archive(path, _changed, _process):
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    return Zip(path) if is_zip else Tar(path)
