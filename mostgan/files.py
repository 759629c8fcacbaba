"""Files and folders that are written whole or not at all, and checksums."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path):
    """Yields a binary file that takes the name `path` when the block ends well, synced to the disk
    before.

    If the block raises, or the process dies, nothing of this name has changed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path):
    """Yields a new folder that takes the name `path` when the block ends well, its files synced to
    the disk before. An older folder of this name goes away then, and not earlier.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    older = path.with_name(f".{path.name}.{os.getpid()}.old.part")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if path.exists():
            path.rename(older)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def write_whole(path, data):
    """Writes bytes or text (as UTF-8) to `path`, whole or not at all."""
    with whole_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def is_unfinished(name):
    """Whether a file's name is one that `whole_file` gives to a file that it has not finished."""
    return name.startswith(".") and name.endswith(".part")


def read_json(path):
    """The object in a JSON file, a dict; an empty one where there is no such file, or other things
    in it.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def sha256_of(path):
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
