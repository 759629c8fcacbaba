"""What videos and pictures have in common: when a frame is on screen, and which square is taken.

A reader yields `Shown` frames in the order of their times. `on_screen` picks those that are on
screen at 0, 1/fps, 2/fps … seconds, so that frames left out, repeated, or shown for longer come out
at an even rate.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

ROUNDING = 1e-3  # seconds by which containers round times: Matroska counts milliseconds
HIGHEST_RATE = 240.0  # frames per second; smaller gaps between frames are damaged timestamps
PICTURE_RATE = 25.0  # frames per second that folders of pictures are taken to have
LONGEST_HOLD = 60.0  # seconds that one frame may stay on screen; more is a damaged timestamp


class Shown(NamedTuple):
    """A picture and when it is on screen, in seconds. image: an av.VideoFrame, a PIL image, or the
    bytes of a JPEG.
    """

    time: float
    duration: float
    image: Any


@dataclass(frozen=True)
class Timing:
    """What is known of a source's times before it is read. All in seconds, but for fps.

    start: when its first frame is shown. length: None where only reading it all would tell. gap:
    the longest distance between two frames from which decoding can start; None where nothing can be
    searched for. missing: what is before `start`, and damaged.
    """

    fps: float
    start: float = 0.0
    length: float | None = None
    gap: float | None = None
    missing: float = 0.0


def usual_rate(times, stated=None, rounding=ROUNDING):
    """Frames per second of frames that are shown at `times`: the usual gap counts, longer ones are
    multiples of it.

    So neither rounded times, nor frames that were left out, nor one long pause changes the rate,
    nor does a rate that the file states and its frames do not have. `stated` is taken where there
    are too few times to tell, and where it agrees with them.
    """
    gaps = np.diff(np.unique([time for time in times if time is not None]))
    gaps = gaps[(gaps > 0.5 / HIGHEST_RATE) & (gaps < LONGEST_HOLD)]
    if len(gaps) < 2:
        return min(float(stated or PICTURE_RATE), HIGHEST_RATE)
    # A mean: gaps of 20 and 30 ms in turn are 40 frames/s.
    usual = gaps[gaps < 1.75 * np.median(gaps)].mean()
    kept = gaps[gaps < 4.5 * usual]
    rate = np.maximum(1, np.round(kept / usual)).sum() / kept.sum()
    slack = max(1e-4, 1.5 * rounding / kept.sum()) * rate
    ntsc = round(rate * 1.001) / 1.001  # 29.97 = 30 / 1.001
    for candidate in (round(rate), ntsc, float(stated or 0)):
        if candidate and abs(rate - candidate) <= slack:
            return min(float(candidate), HIGHEST_RATE)
    return min(round(float(rate), 3), HIGHEST_RATE)


def on_screen(shown, fps, start, first, count):
    """Yields (number, Shown) for the frames number first, first + 1, …, where number n is on screen
    n/fps s after `start`.

    shown: Shown frames in order, from the one that is on screen at frame number `first` or earlier.
    count: how many; None goes on to the end of the last one. Raises ValueError where a frame would
    stay for longer than a minute.
    """
    end = math.inf if count is None else first + count
    number, last = first, None
    for frame in shown:
        while last is not None and number < end and start + number / fps < frame.time - ROUNDING:
            if frame.time - last.time > LONGEST_HOLD:
                raise ValueError(f"its timestamps jump by {frame.time - last.time:.0f} seconds")
            yield number, last
            number += 1
        if number >= end:
            return
        last = frame
    stop = last.time + last.duration - ROUNDING if last is not None else -math.inf
    while number < end and start + number / fps < stop:
        yield number, last
        number += 1


def square(width, height, crop, pixel_aspect=1.0):
    """The box (x, y, width, height), in pixels of the source, that becomes the square.

    crop: "center", the largest square as it is shown; "none", everything; or a box, which may be
    followed by the width and height of the mask that it comes from. pixel_aspect: a pixel's shown
    width by its height. Raises ValueError where a box or a mask does not fit.
    """
    if crop == "none":
        return 0, 0, width, height
    if crop != "center":
        x, y, box_width, box_height, *mask = crop
        if mask and mask != [width, height]:
            raise ValueError(f"its mask has {mask[0]}x{mask[1]} pixels, it has {width}x{height}")
        if x + box_width > width or y + box_height > height:
            box = f"{box_width}x{box_height} at {x},{y}"
            raise ValueError(f"it has {width}x{height} pixels, too few for the crop {box}")
        return x, y, box_width, box_height
    side = min(width * pixel_aspect, height)
    w, h = max(1, round(side / pixel_aspect)), max(1, round(side))
    return (width - w) // 2, (height - h) // 2, w, h
