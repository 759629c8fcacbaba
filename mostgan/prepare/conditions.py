"""Conditions of clips, from a safetensors file that names them: a vector per clip, and a vector per
frame of a clip (spec §13). They lie beside the packed clips, which do not depend on them.
"""

import json
import math
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from mostgan.config import UserError
from mostgan.files import sha256_of, whole_file, write_whole
from mostgan.prepare.clips import MIN_FRAMES
from mostgan.prepare.frames import ROUNDING
from mostgan.prepare.labels import leave_out, match
from mostgan.prepare.reading import printable

OF_FRAMES = "/frames"  # NAME/frames holds the vectors of NAME's frames
FORM = f"an entry is NAME [C], a clip's vector, or NAME{OF_FRAMES} [n, E], those of its frames"
FLOATS = ("F64", "F32", "F16")
LABELS, FRAME_CONDITIONS = "labels.safetensors", "frame_conditions.safetensors"


class Conditions:
    """The conditions in a safetensors file: per clip an entry NAME [C], or NAME/frames [n, E], or
    both, alike for all clips; floats. Row k of NAME/frames is of frame k of the whole clip, as it
    is at its usual rate.

    of_clips, of_frames: {name of a clip: the shape of its entry}; size: C, 0 without such entries;
    frame_size: E or 0. Raises UserError, at once, where an entry has another form, size or type,
    or numbers that are not finite.
    """

    def __init__(self, path):
        self.path, self.told = Path(path), printable(str(path))
        try:
            with safe_open(self.path, "numpy") as file:
                shapes = {key: _checked(file, key, self.told) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.told} is no safetensors file that can be read: {reason}"
            ) from None
        if not shapes:
            raise UserError(f"{self.told} holds no conditions")
        self.digest = sha256_of(self.path)
        self.of_clips = {key: shape for key, shape in shapes.items() if len(shape) == 1}
        of_frames = {key: shape for key, shape in shapes.items() if len(shape) == 2}
        self.size, self.frame_size = self._size_of(self.of_clips), self._size_of(of_frames)
        self.of_frames = {key.removesuffix(OF_FRAMES): shape for key, shape in of_frames.items()}

    def _size_of(self, shapes):
        sizes = {shape[-1]: printable(key) for key, shape in shapes.items()}
        if len(sizes) > 1:
            (a, of_a), (b, of_b) = list(sizes.items())[:2]
            told = f"{of_a} has vectors of {a} numbers, {of_b} of {b}, but all must have as many"
            raise UserError(f"{self.told}: {told}; {FORM}")
        return next(iter(sizes), 0)

    def meaning(self):
        """What the index holds of them: as label_sources returns it."""
        return {"size": self.size, "frame_size": self.frame_size, "conditions": self.digest}

    def give(self, sources, notes):
        """Tells each source its entries' names; returns those that have all that the others have.
        UserError where none has.
        """
        usable = [source for source in sources if not source.problem]
        found = []
        for entries in (self.of_clips, self.of_frames):
            rows = [(name, name) for name in entries]
            found.append(match(usable, rows, self.path, notes) if rows and usable else {})
        wanted = [names for names, size in zip(found, (self.size, self.frame_size)) if size]
        for index, source in enumerate(usable):
            if all(index in names for names in wanted):
                source.condition = tuple(names.get(index) for names in found)
        without = [source for source in usable if source.condition is None]
        if usable and len(without) == len(usable):
            raise UserError(f"{self.told}: no clip has both a vector and those of its frames")
        leave_out(usable, without, f"no condition in {self.told}", notes)
        return [source for source in sources if source.problem or source.condition is not None]

    def place(self, source, rows, settings, broken):
        """Tells each row, a clip of this source, its entries, and where its frames lie in them.
        broken: whether the source is damaged or cut off. Raises UserError as `_before` does.
        """
        if not rows:
            return
        fps = source.fps(settings)
        rate = fps if source.kind in ("folder", "array") else source.timing.fps
        before = self._before(source, rows, settings, rate, broken) if self.frame_size else 0
        for row in rows:
            row |= {"condition": source.condition, "step": rate / fps, "before": before}

    def _before(self, source, rows, settings, rate, broken):
        """How many vectors belong to damaged frames at a source's beginning, before the first that
        can be read: none where vectors count from that one. UserError where there are more or fewer
        than frames; but a broken source may have lost some at its end.
        """
        name = source.condition[1]
        count, has = self.of_frames[name][0], {}
        for before in (round(source.timing.missing * rate), 0):
            has[before] = before + _frames_of(source, rows, settings, rate, count - before)
            if has[before] == count:
                return before
        before = next(iter(has))
        if broken and has[before] < count:
            return before
        about = "" if source.timing.length is not None else "about "
        raise UserError(
            f"{self.told}: {printable(name + OF_FRAMES)} has {count} rows, but "
            f"{printable(source.name)} has {about}{has[before]} frames, at its usual rate of "
            f"{source.timing.fps:g} frames/s"
        )

    def write(self, dst, rows):
        """Writes the conditions of the clips, in their order: {name of the file: its SHA-256}.
        UserError where they are not those that were read at first.
        """
        if not self.path.is_file() or sha256_of(self.path) != self.digest:
            told = f"{self.told} has changed since packing began"
            raise UserError(f"{told}; the same command takes it anew, and keeps the clips")
        with safe_open(self.path, "numpy") as file:
            if self.size:
                labels = [file.get_tensor(row["condition"][0]) for row in rows]
                data = safetensors.numpy.save({"labels": np.array(labels, np.float32)})
                write_whole(dst / LABELS, data)
            if self.frame_size:
                with whole_file(dst / FRAME_CONDITIONS) as made:
                    made.write(_header([sum(row["frames"] for row in rows), self.frame_size]))
                    for row in rows:
                        made.write(_of_clip(file, row).tobytes())
        written = {LABELS: self.size, FRAME_CONDITIONS: self.frame_size}
        return {name: sha256_of(dst / name) for name, size in written.items() if size}


def _checked(file, key, told):
    """The shape of an entry; UserError where it is none of a condition."""
    kind, shape = file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()
    name, right = printable(key), len(shape) == 1 or len(shape) == 2 and key.endswith(OF_FRAMES)
    if not right or 0 in shape:
        told += f": {name} has the shape {shape}"
        raise UserError(f"{told}; {FORM}")
    if kind not in FLOATS:
        raise UserError(f"{told}: {name} is {kind}, but must be one of {', '.join(FLOATS)}")
    with np.errstate(over="ignore"):
        if not np.isfinite(file.get_tensor(key).astype(np.float32)).all():
            raise UserError(f"{told}: {name} holds numbers that are not finite")
    return shape


def _frames_of(source, rows, settings, rate, expected):
    """How many frames a source has, at its usual rate. Where only what was read tells, and that
    does not contradict it, the expected number.
    """
    if source.timing.length is not None:
        return round(source.timing.length * source.timing.fps)
    fps, end = source.fps(settings), rows[-1]["start"] + rows[-1]["frames"]
    ends = math.ceil((expected / rate - ROUNDING) * fps)
    spare = MIN_FRAMES if settings.clip_length else 1  # a last clip may have been too short
    return expected if 0 <= ends - end < spare else round(end * rate / fps)


def _header(shape):
    """The first bytes of a safetensors file with the one tensor `frames`, float32."""
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
    header = json.dumps({"frames": tensor}).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header


def _of_clip(file, row):
    """The vectors of a packed clip's frames: those of the moments at which they are on screen."""
    from mostgan.motion import condition_at  # not above: it brings PyTorch, see pack._write_preview

    whole = file.get_slice(row["condition"][1] + OF_FRAMES)
    t = row["before"] + (row["start"] + np.arange(row["frames"])) * row["step"]
    count = whole.get_shape()[0]
    first, stop = min(int(t[0]), count - 1), min(int(t[-1]) + 2, count)
    return condition_at(whole[first:stop].astype(np.float32), t - first)
