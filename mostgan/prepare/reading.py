"""Reading one source: what can be told of it at once, its frames from any place on, their
square.
"""

import os
import re
from dataclasses import dataclass, field
from functools import partial

import av
import numpy as np

from mostgan.prepare import archives, pictures, videos
from mostgan.prepare.frames import PICTURE_RATE, Timing, on_screen

# What reading a damaged or strange file may raise.
STILLS = set(".jpg .jpeg .jpe .jfif .bmp .dib .ppm .pgm .pbm .pnm .tga .jp2 .j2k .pcx .sgi".split())
STILLS |= pictures.ANIMATED
VIDEOS = set(
    ".mp4 .m4v .mov .qt .mkv .webm .avi .mpg .mpeg .m2v .mpv .ts .mts .m2ts .vob .wmv .asf .flv "
    ".f4v .ogv .3gp .3g2"
    " .mxf .dv .rm .rmvb .nut .y4m .h264 .264 .h265 .265 .hevc .ivf .obu .mjpeg .mjpg .wtv".split()
)
UNREADABLE = (av.FFmpegError, AttributeError, *pictures.DAMAGED, *archives.DAMAGED)


@dataclass(frozen=True)
class Settings:
    """How every clip is made. crop: as in frames.square. fps: None keeps each source's.
    clip_length: None does not cut.
    """

    resolution: int
    coding: str  # "raw" or "jpeg"
    crop: str | tuple[int, int, int, int] = "center"
    fps: float | None = None
    clip_length: int | None = None


@dataclass
class Source:
    """One clip to be, or one film to be cut into clips. kind: "video", "animation", "array",
    "folder" (of pictures).
    """

    name: str
    kind: str
    root: str  # the folder or archive that it lies in
    files: list[str]  # names in the root
    problem: str | None = None  # why it cannot be used
    label: int | list[float] | None = None
    # Names of its vector and of its frames' in a file of conditions; each None without them.
    condition: tuple | None = None
    mask: "Source | None" = None  # white where a face is (FaceForensics)
    # Told by look:
    timing: Timing | None = None
    pixel_aspect: float = 1.0
    seconds: list[float] = field(default_factory=list)  # of each picture of an animation
    box: tuple | None = None  # what the mask says to crop
    facts: set = field(default_factory=set)  # what a user should know of the conversion

    def stamp(self, times=True):
        """Names and sizes, and times of change: different when the source is. Reads nothing."""
        root = archives.open_root(self.root)
        files = [[printable(name), *root.stamp(name)[: 2 if times else 1]] for name in self.files]
        return [printable(self.name), self.problem, files, self.mask and self.mask.stamp(times)]

    def look(self, settings):
        """Finds out what can be told without reading it all; sets `problem` where it cannot be
        read.
        """
        try:
            root = archives.open_root(self.root)
            if self.kind == "video":
                of_frames = self.condition is not None and self.condition[1] is not None
                searched = settings.clip_length is not None or of_frames  # whose number is checked
                searched = searched and os.path.isdir(self.root)
                file = root.video(self.files[0])
                self.timing, self.pixel_aspect = videos.video_timing(file, searched)
            elif self.kind == "animation":
                with root.open(self.files[0]) as file:
                    self.timing, self.seconds, self.facts = pictures.animation_timing(file)
            elif self.kind == "array":
                with root.open(self.files[0]) as file:
                    length = pictures.array_shape(file)[1] / PICTURE_RATE
                self.timing = Timing(PICTURE_RATE, 0.0, length, gap=0.0)
            else:
                length = len(self.files) / PICTURE_RATE
                self.timing = Timing(PICTURE_RATE, 0.0, length, gap=0.0)
            if self.mask:
                self.box = mask_box(self.mask, settings)
        except UNREADABLE as error:
            self.problem = pictures.reason(error)

    def fps(self, settings):
        return settings.fps or self.timing.fps

    def length(self, settings):
        """Frames that it will give, or None where only reading it would tell."""
        if self.timing.length is None:
            return None
        if self.kind in ("folder", "array"):  # they have no times: any rate keeps every picture
            return round(self.timing.length * self.timing.fps)
        return max(1, round(self.timing.length * self.fps(settings)))

    def frames(self, settings, first, count, errors, facts):
        """Yields (number, Shown) for frames number first … (see frames.on_screen), read from the
        nearest place before.
        """
        root, fps = archives.open_root(self.root), self.fps(settings)
        if self.kind == "video":
            time = self.timing.start + first / fps if first else None
            shown = videos.video_frames(root.video(self.files[0]), self.timing, time, errors)
        elif self.kind == "animation":
            shown = pictures.animation_frames(root.open(self.files[0]), self.seconds, errors, facts)
        elif self.kind == "array":
            shown = pictures.array_frames(root.open(self.files[0]), fps, first, errors)
        else:
            opens = {name: partial(root.open, name) for name in self.files}
            whole = self.box is None and settings.crop in ("center", "none")
            passes = settings.resolution if settings.coding == "jpeg" and whole else None
            shown = pictures.folder_frames(opens, fps, first, passes, errors, facts)
        return on_screen(shown, fps, self.timing.start, first, count)

    def framing(self, settings, facts):
        """A function that makes a Shown.image uint8 [R, R, 3]."""
        crop = self.box or settings.crop
        if self.kind == "video":
            return videos.VideoFraming(crop, settings.resolution, self.pixel_aspect, facts)
        return pictures.PictureFraming(crop, settings.resolution)


def mask_box(mask, settings):
    """The smallest square (x, y, side, side) that holds the white of every frame of a mask, as far
    as the frame goes.

    One box for the clip, so that the crop neither shakes nor cuts. Raises ValueError where the mask
    is black throughout.
    """
    mask.look(Settings(settings.resolution, "raw"))
    if mask.problem:
        raise ValueError(f"its mask {mask.name}: {mask.problem}")
    rows, columns = set(), set()
    size = None
    for _, shown in mask.frames(Settings(0, "raw"), 0, None, {}, set()):
        if mask.kind == "video":
            image = shown.image.to_ndarray(format="gray")
        else:
            image = np.asarray(shown.image.convert("L"))
        rows.update(np.flatnonzero((image > 127).any(1)).tolist())
        columns.update(np.flatnonzero((image > 127).any(0)).tolist())
        size = image.shape
    if not rows:
        raise ValueError(f"its mask {mask.name} is black throughout")
    x, y = min(columns), min(rows)
    width, height = max(columns) + 1 - x, max(rows) + 1 - y
    side = min(max(width, height), *size)
    x, y = x + (width - side) // 2, y + (height - side) // 2
    place = min(max(x, 0), size[1] - side), min(max(y, 0), size[0] - side)
    return *place, side, side, size[1], size[0]


# -------------------------------------------------------------------------------------------- names


def printable(name):
    """A name as text that can be printed and stored: control characters and bytes that are no UTF-8
    as \\x1b, \\xff.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: ascii(match[0])[1:-1], text)


NUMBER = r"(?<![\d.])\d+\.\d+(?![\d.])|\d+"  # 7 or 0.25, but the numbers of 2020.10.05 apart


def natural(name):
    """Sort key in which frame2 comes before frame10, and 0.15 before 0.2."""
    parts = re.split(f"({NUMBER})", stem(name))
    key = []
    for text, number in zip(parts[::2], [*parts[1::2], ""]):
        whole, _, fraction = number.partition(".")
        key.append((text, int(whole or -1), fraction))
    return key, suffix(name)


def stem(name):
    return os.path.splitext(name)[0]


def suffix(name):
    return os.path.splitext(name)[1].lower()
