"""The labels of clips: their class, by folders or by a table, or a vector of numbers, by a table.

A table is a `dataset.json` as the earlier codebases have it, {"labels": [[name, label], …]}, or a
CSV of name,label (or name,number,number,… for vectors). It names clips, or frames of them, in many
ways: with or without suffix, with backslashes, in other case, below other folders.
"""

import csv
import functools
import json
import os
import unicodedata
from pathlib import Path

import numpy as np

from mostgan.config import UserError
from mostgan.prepare.reading import STILLS, VIDEOS, natural, printable, suffix

SUFFIXES = VIDEOS | STILLS | {".npy"}
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
    most clips: as they are, or else without suffixes, folders and case. A clip that several rows
    name, with different values, has none. UserError where no clip has one.
    """
    whole = {_composed(source.name): number for number, source in enumerate(sources)}
    best, best_rows, differ = _look_up([(_composed(name), None) for name, _ in rows], rows, whole)
    own = [(_bare(name), n) for n, source in enumerate(sources) for name in _names_of(source)]
    named = [(_bare(name), _folder(name)) for name, _ in rows]
    for of_row, of_own in _ways(max(key.count("/") for key, _ in (*own, *named))):
        if len(best) == len(sources):
            break
        ours = _unique((of_own(key), number) for key, number in own)
        looked = _look_up([(of_row(key), of_row(folder)) for key, folder in named], rows, ours)
        if len(looked[0]) > len(best) or not best and len(looked[2]) > len(differ):
            best, best_rows, differ = looked
    told, twice = printable(str(where)), [sources[index].name for index in sorted(differ)]
    if twice and not best:
        raise UserError(f"{told} has several entries for {printable(twice[0])}, which differ")
    if not best:
        example = f"a clip is {printable(sources[0].name)}, an entry is {printable(rows[0][0])}"
        raise UserError(f"{told} has no entry for any of {len(sources)} clips: {example}")
    if twice:
        notes.add(f"clips with several entries in {told}", "they differ", *twice)
    others = [name for number, (name, _) in enumerate(rows) if number not in best_rows]
    if others:
        names = ", ".join(printable(name) or "one without a name" for name in others[:SHOWN])
        notes.add(f"entries of {told} that match no clip", f"such as {names}", *others)
    return best


def _ways(depth):
    """Yields the ways of comparing bare names, as what is compared of a row's and of a source's:
    all; without up to so many of the first folders, of either; in any case.
    """
    for lower in (False, True):
        whole = functools.partial(_shorten, lower=lower)
        yield whole, whole
        for dropped in range(1, depth + 1):
            yield functools.partial(_shorten, dropped=dropped, lower=lower), whole
            yield whole, functools.partial(_shorten, dropped=dropped, lower=lower)


def _names_of(source):
    """Names that a table may have for a source: its own, and where it is a folder, those of its
    pictures and their folder.
    """
    names = {source.name}
    if source.kind == "folder":
        inside = source.name if "/" in source.files[0] else ""
        names.add("/".join(filter(None, (inside, os.path.basename(source.files[0])))))
    return names


def _bare(name):
    """A name without the suffix of a video, a picture or an array."""
    name = _composed(name).replace("\\", "/").removeprefix("./").strip("/")
    return os.path.splitext(name)[0] if suffix(name) in SUFFIXES else name


def _folder(name):
    """The bare name of the folder that a picture is in, whose row counts for it; or None."""
    return _bare(os.path.dirname(name.replace("\\", "/"))) if suffix(name) in STILLS else None


def _shorten(name, dropped=0, lower=False):
    """A name without so many of its first folders, or None if it has no more than those."""
    name = "/".join((name or "").split("/")[dropped:])
    return (name.lower() if lower else name) or None


def _composed(name):
    """A name with é as one letter: some file systems have it as e and an accent."""
    return unicodedata.normalize("NFC", name)


def _unique(pairs):
    """{key: value} of the keys that stand for one value only."""
    found, twice = {}, set()
    for key, value in pairs:
        if key is not None and found.setdefault(key, value) != value:
            twice.add(key)
    return {key: value for key, value in found.items() if key not in twice}


def _look_up(keys, rows, ours):
    """({index of source: label}, the numbers of the rows that name a source, the sources whose rows
    differ). keys: of each row what is looked up in `ours`, and else the same of a frame's folder.
    """
    found, used, differ = {}, set(), set()
    for number, ((key, folder), (_, label)) in enumerate(zip(keys, rows)):
        source = ours.get(key, ours.get(folder))
        if source is None:
            continue
        used.add(number)
        if found.setdefault(source, label) != label:
            differ.add(source)
    found = {source: label for source, label in found.items() if source not in differ}
    return found, used, differ


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
