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
        self.of_clips = {key: shape for key, shape in shapes.items() if len(shape) == 1}
        of_frames = {key: shape for key, shape in shapes.items() if len(shape) == 2}
        self.size, self.frame_size = self._size_of(self.of_clips), self._size_of(of_frames)
        self.of_frames = {key.removesuffix(OF_FRAMES): shape for key, shape in of_frames.items()}

    def _size_of(self, shapes):
        sizes = {shape[-1]: printable(key) for key, shape in shapes.items()}
        if len(sizes) > 1:
            (a, of_a), (b, of_b) = list(sizes.items())[:2]
            told = f"{of_a} has vectors of {a} numbers, {of_b} of {b}"
            raise UserError(f"{self.told}: {told}, but all must have as many")
        return next(iter(sizes), 0)

    def meaning(self):
        """What the index holds of them: as label_sources returns it."""
        return {
            "size": self.size,
            "frame_size": self.frame_size,
            "conditions": sha256_of(self.path),
        }

    def give(self, sources, notes):
        """Tells each source its entry's name; returns those that have all that the others have."""
        usable = [source for source in sources if not source.problem]
        rows = [(name, name) for name in self.of_clips | self.of_frames]
        found = match(usable, rows, self.path, notes) if usable else {}
        wanted = [entries for entries in (self.of_clips, self.of_frames) if entries]
        for index, name in found.items():
            if all(name in entries for entries in wanted):
                usable[index].condition = name
        without = [source for source in usable if source.condition is None]
        leave_out(usable, without, f"no condition in {self.told}", notes)
        return [source for source in sources if source.problem or source.condition is not None]

    def place(self, source, rows, settings):
        """Tells each row, a clip of this source, its entry, and how far apart its frames lie in it.
        Raises UserError where the entry is of another number of frames, unless the source is
        damaged and has fewer.
        """
        if not rows:
            return
        fps = source.fps(settings)
        rate = fps if source.kind in ("folder", "array") else source.timing.fps
        for row in rows:
            row |= {"condition": source.condition, "step": rate / fps}
        if not self.frame_size:
            return
        count = self.of_frames[source.condition][0]
        length, end = source.timing.length, rows[-1]["start"] + rows[-1]["frames"]
        has = round(length * source.timing.fps) if length is not None else None
        if has is None:  # only what was read tells, but for a last clip that was too short
            ends = math.ceil((count / rate - ROUNDING) * fps)
            spare = MIN_FRAMES if settings.clip_length else 1
            has = count if 0 <= ends - end < spare else round(end * rate / fps)
        cut_off = count > has and any(row["damaged"] for row in rows)  # what is left is in time
        if count != has and not cut_off:
            key, name = printable(source.condition + OF_FRAMES), printable(source.name)
            raise UserError(
                f"{self.told}: {key} has {count} rows, but {name} has {has} frames, at its usual "
                f"rate of {source.timing.fps:g} frames/s"
            )

    def write(self, dst, rows):
        """Writes the conditions of the clips, in their order: {name of the file: its SHA-256}."""
        with safe_open(self.path, "numpy") as file:
            if self.size:
                labels = [file.get_tensor(row["condition"]) for row in rows]
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
        raise UserError(f"{told}, but an entry is NAME [C] or NAME{OF_FRAMES} [n, E]")
    if kind not in FLOATS:
        raise UserError(f"{told}: {name} is {kind}, but must be one of {', '.join(FLOATS)}")
    with np.errstate(over="ignore"):
        if not np.isfinite(file.get_tensor(key).astype(np.float32)).all():
            raise UserError(f"{told}: {name} holds numbers that are not finite")
    return shape


def _header(shape):
    """The first bytes of a safetensors file with the one tensor `frames`, float32."""
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
    header = json.dumps({"frames": tensor}).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header


def _of_clip(file, row):
    """The vectors of a packed clip's frames: those of the moments at which they are on screen."""
    from mostgan.motion import condition_at  # not above: it brings PyTorch, see pack._write_preview

    whole = file.get_slice(row["condition"] + OF_FRAMES)
    t, count = (row["start"] + np.arange(row["frames"])) * row["step"], whole.get_shape()[0]
    first, stop = min(int(t[0]), count - 1), min(int(t[-1]) + 2, count)
    return condition_at(whole[first:stop].astype(np.float32), t - first)
