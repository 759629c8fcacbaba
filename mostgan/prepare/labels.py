"""The labels of clips: their class, by folders or by a table, or a vector of numbers, by a table.

A table is a `dataset.json` as the earlier codebases have it, {"labels": [[name, label], …]}, or a
CSV of name,label (or name,number,number,… for vectors). It names clips, or frames of them, in many
ways: with or without suffix, with backslashes, in other case, below other folders.
"""

import csv
import json
import os
from pathlib import Path

import numpy as np

from mostgan.config import UserError
from mostgan.prepare.reading import STILLS, VIDEOS, natural, printable, suffix

SHOWN = 3  # names that tell what did not match


def label_sources(sources, tables, how, notes):
    """Gives the sources their labels; returns those that have one, and what the labels mean.

    how: "folders", the path of a table, or None: the `tables` that find_sources found, if any. What
    they mean: None where there are none, {"classes": names} where label i is the class names[i], or
    {"size": C} where labels are vectors of C floats. Raises UserError where nothing fits.
    """
    usable = [source for source in sources if not source.problem]
    if how == "folders":
        found, where = _by_folder(usable), "the folders"
    else:
        rows, where = _rows_of(tables, how)
        if rows is None or not usable:
            return sources, None
        found = match(usable, rows, where, notes)
    if classes := _classes(found.values()):
        names, number_of = classes
        labels = {index: number_of[_class_name(value)] for index, value in found.items()}
        meaning = {"classes": names}
    else:
        labels = {index: _vector(value, where) for index, value in found.items()}
        sizes = {len(vector) for vector in labels.values()}
        if len(sizes) > 1:
            told = f"its vectors have {min(sizes)} to {max(sizes)} numbers, not all as many"
            raise UserError(f"{printable(str(where))}: {told}")
        meaning = {"size": sizes.pop()}
    for index, label in labels.items():
        usable[index].label = label
    without = [source for source in usable if source.label is None]
    leave_out(usable, without, f"no label in {printable(str(where))}", notes)
    return [source for source in sources if source.problem or source.label is not None], meaning


def leave_out(sources, without, why, notes):
    """Notes which of the sources are left out: those without what the others have."""
    if without:
        names = ", ".join(printable(source.name) for source in without[:SHOWN])
        has = f"{len(sources) - len(without)} of {len(sources)} clips have one, not {names}"
        notes.add(f"{why}, left out", has, *(source.name for source in without))


def _by_folder(sources):
    """{index of source: name of the first folder that is not around everything}."""
    parts, depth = [source.name.split("/") for source in sources], 0
    while all(len(p) > depth + 2 for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    loose = [source.name for source, part in zip(sources, parts) if len(part) < depth + 2]
    if loose:
        what = f"{len(loose)} clips lie in no folder of a class, e.g. {printable(loose[0])}"
        raise UserError(f"--labels folders: {what}")
    return {number: part[depth] for number, part in enumerate(parts)}


# ------------------------------------------------------------------------------------------- tables


def _rows_of(tables, how):
    """([(name, label)] or None, where they are from). how: a file, or None for the tables found
    beside the clips.
    """
    if how is None:
        rows = []
        for where, prefix, data in tables:
            rows += [(prefix + name, label) for name, label in _read_json(data, where) or ()]
        return rows or None, ", ".join(where for where, _, _ in tables)
    try:
        data = Path(how).read_bytes()
    except OSError as error:
        raise UserError(
            f"--labels {how}: {error.strerror}; give a table, or the word folders"
        ) from None
    read = _read_json if suffix(str(how)) == ".json" else _read_lines
    rows = read(data, how)
    if not rows:
        raise UserError(f"{how} holds no labels")
    return rows, how


def _read_json(data, where):
    try:
        labels = json.loads(data.decode("utf-8-sig"))["labels"]
        if labels is None:
            return None
        rows = labels.items() if isinstance(labels, dict) else labels
        rows = [(str(name), label) for name, label in rows]
        if not all(isinstance(label, (int, float, str, list)) for _, label in rows):
            raise ValueError("a label that is none")
        return rows
    except (ValueError, KeyError, TypeError, RecursionError):
        form = '{"labels": [["name", label], ...]}'
        raise UserError(f"{printable(str(where))} is not of the form {form}") from None


def _read_lines(data, where):
    """CSV with commas, semicolons or tabs, or lines of a name, a space and a label; a header is
    passed over.
    """
    try:
        lines = [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{printable(str(where))} is no text in UTF-8") from None
    separator = next((mark for mark in ",;\t" if lines and mark in lines[0]), None)
    if separator:
        rows = csv.reader(lines, delimiter=separator)
    else:
        rows = [line.rsplit(maxsplit=1) for line in lines]
    cells = [[cell.strip() for cell in row] for row in rows]
    if any(len(row) < 2 for row in cells):
        raise UserError(f"{printable(str(where))} is not of the form name,label on every line")
    numbers = [_numbers(row[1:]) for row in cells]
    if len(cells) > 1 and numbers[0] is None and all(row is not None for row in numbers[1:]):
        cells, numbers = cells[1:], numbers[1:]
    if all(row is not None for row in numbers):
        pairs = zip(cells, numbers)
        return [(row[0], values[0] if len(values) == 1 else values) for row, values in pairs]
    return [(row[0], row[1]) for row in cells]


def _numbers(cells):
    """Texts as whole numbers where all of them are, else as floats; None if they are none.

    Python would take 2020_01 for a number, too.
    """
    if any("_" in cell for cell in cells):
        return None
    for kind in (int, float):
        try:
            return [kind(cell) for cell in cells]
        except ValueError:
            pass
    return None


# ----------------------------------------------------------------------------------------- matching


def match(sources, rows, where, notes):
    """{index of source: its value} of rows (name, value), by the way of comparing names that finds
    most clips. UserError where none does.
    """
    own = [{key: number for key in _keys_of(source)} for number, source in enumerate(sources)]
    own = [(key, number) for keys in own for key, number in keys.items()]
    best, best_rows = {}, set()
    depth = max(key.count("/") for key, _ in own) + 1
    row_depth = max(name.replace("\\", "/").count("/") for name, _ in rows) + 1
    for lower in (False, True):
        for dropped in range(max(depth, row_depth)):
            for from_row in (True,) if dropped == 0 else (True, False):
                ours = _unique(
                    (_shorten(key, 0 if from_row else dropped, lower), number)
                    for key, number in own
                )
                found, used = _look_up(rows, ours, dropped if from_row else 0, lower)
                if len(found) > len(best):
                    best, best_rows = found, used
        if len(best) == len(sources):
            break
    if not best:
        example = f"a clip is {printable(sources[0].name)}, an entry is {printable(rows[0][0])}"
        raise UserError(
            f"{printable(str(where))} has no entry for any of {len(sources)} clips: {example}"
        )
    others = [name for number, (name, _) in enumerate(rows) if number not in best_rows]
    if others:
        names = ", ".join(printable(name) for name in others[:SHOWN])
        notes.add(
            f"entries of {printable(str(where))} that match no clip", f"such as {names}", *others
        )
    return best


def _keys_of(source):
    """Names that a table may have for a source: its own, and where it is a folder, those of its
    pictures and their folder.
    """
    yield _bare(source.name)
    if source.kind == "folder":
        inside = source.name if "/" in source.files[0] else ""
        yield "/".join(filter(None, (inside, _bare(os.path.basename(source.files[0])))))


def _bare(name):
    """A name without the suffix of a video, a picture or an array."""
    name = name.replace("\\", "/").removeprefix("./").strip("/")
    return os.path.splitext(name)[0] if suffix(name) in VIDEOS | STILLS | {".npy"} else name


def _shorten(name, dropped, lower):
    """A name without so many of its first folders, or None if it has no more than those."""
    parts = name.split("/")
    name = "/".join(parts[dropped:]) or None
    return name.lower() if lower and name else name


def _unique(pairs):
    """{key: value} of the keys that stand for one value only."""
    found, twice = {}, set()
    for key, value in pairs:
        if key is not None and found.setdefault(key, value) != value:
            twice.add(key)
    return {key: value for key, value in found.items() if key not in twice}


def _look_up(rows, ours, dropped, lower):
    """({index of source: label}, the numbers of the rows that name a source). A frame's row counts
    for its folder.
    """
    found, used, differ = {}, set(), set()
    for number, (name, label) in enumerate(rows):
        bare = _bare(name)
        source = ours.get(_shorten(bare, dropped, lower))
        if source is None and suffix(name) in STILLS:
            source = ours.get(_shorten(os.path.dirname(bare), dropped, lower))
        if source is None:
            continue
        used.add(number)
        if found.setdefault(source, label) != label:
            differ.add(source)
    return {source: label for source, label in found.items() if source not in differ}, used


# ---------------------------------------------------------------------------------- what they mean


def _classes(values):
    """(names of the classes in order, {name: number}), or None where the values are vectors."""
    if any(isinstance(value, (list, tuple)) for value in values):
        return None
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        return None
    numbers = all(isinstance(value, (int, float)) for value in values)
    names = sorted({_class_name(value) for value in values}, key=int if numbers else natural)
    return names, {name: number for number, name in enumerate(names)}


def _class_name(value):
    return str(int(value)) if isinstance(value, (int, float)) else value


def _vector(value, where):
    """A label as a list of floats that float32 can hold."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    largest = float(np.finfo(np.float32).max)
    if not numbers or not all(isinstance(n, (int, float)) and abs(n) <= largest for n in numbers):
        told = f"a label is a class or a list of finite numbers, not {value!r}"
        raise UserError(f"{printable(str(where))}: {told}")
    return [float(number) for number in numbers]
