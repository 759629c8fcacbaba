"""Files that the tests of the data path make: videos by FFmpeg's encoders through PyAV, pictures by
Pillow.

Most videos here are numbered: frame k is flat and has the gray level FIRST + STEP * k, so that a
packed frame tells which frame of its source it shows, whatever coded it.
"""

import os
import resource
import sys
import time
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from unittest import mock

import av
import numpy as np
from PIL import Image

from mostgan import prepare
from mostgan.data import Clips
from mostgan.prepare import __main__ as command_line

FIRST, STEP = 16, 4
MOST_NUMBERS = 58  # FIRST + STEP * 57 is still below white in video range

av.logging.set_level(av.logging.PANIC)


# ------------------------------------------------------------------------------------------- frames


def flat(values, height=32, width=32):
    """Flat gray frames, uint8 [n, H, W, 3]."""
    return np.stack([np.full((height, width, 3), value, np.uint8) for value in values])


def numbered(n, height=32, width=32):
    """The frames number 0 … n - 1, uint8 [n, H, W, 3]."""
    assert n <= MOST_NUMBERS
    return flat(FIRST + STEP * np.arange(n), height, width)


def moving(n, height=40, width=48, seed=0):
    """Smooth frames in colour that differ from each other, uint8 [n, H, W, 3]."""
    y, x = np.mgrid[:height, :width] / 40
    a, b = np.random.default_rng(seed).uniform(0, 6, 2)
    step = np.arange(n)[:, None, None]
    wave = np.sin(4 * x + a + step / 4) * np.cos(3 * y + b) * 60
    return np.stack([wave + 100, wave * 0.5 + 60 + 4 * step % 120, 190 - wave], -1).astype(np.uint8)


def quadrants(height=48, width=64, levels=(30, 90, 150, 220)):
    """A picture whose four quarters (top left, top right, bottom left, bottom right) tell how it
    lies; [H, W, 3]."""
    image = np.zeros((height, width, 3), np.uint8)
    half, middle = height // 2, width // 2
    image[:half, :middle], image[:half, middle:] = levels[0], levels[1]
    image[half:, :middle], image[half:, middle:] = levels[2], levels[3]
    return image


def corners(image):
    """The levels in the middles of the four quarters of a packed frame [3, R, R], in the order of
    `quadrants`."""
    quarter = image.shape[1] // 4
    low, high = quarter, image.shape[1] - 1 - quarter
    return [int(image[0, y, x]) for y in (low, high) for x in (low, high)]


def disc(height, width, pixel_aspect=1.0, radius=0.35):
    """A white disc on black that is round where pixels are `pixel_aspect` times as wide as high;
    [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    y, x = y - (height - 1) / 2, (x - (width - 1) / 2) * pixel_aspect
    inside = np.hypot(x, y) < radius * min(height, width * pixel_aspect)
    return np.where(inside[..., None], np.uint8(235), np.uint8(16)).repeat(3, axis=2)


def roundness(image):
    """Width through height of the bright thing in a packed frame [3, R, R]."""
    bright = image[0] > 128
    return bright.any(0).sum() / bright.any(1).sum()


# ------------------------------------------------------------------------------------------- videos


def write_video(
    path,
    frames,
    rate=25,
    times=None,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    stream=None,
    graph=None,
    base=None,
    container=None,
):
    """Writes frames, uint8 [n, H, W, 3], at `times` (seconds; None: k / rate) and close to
    lossless.

    rate: what the file declares, whatever the times are. base: the unit of the times. stream: a
    function of the stream before the first frame. graph: FFmpeg's filters through which the frames
    go, as one string. options, container: of the encoder and of the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(rate).limit_denominator(1001)
    base = base or (1 / rate if times is None else Fraction(1, 1000))
    quality = {"crf": "4"} if codec in ("libx264", "libx265") else {"b": "6000000"}
    if codec == "libx265":
        quality["x265-params"] = "log-level=none"
    with av.open(str(path), "w", options=container or {}) as file:
        video = file.add_stream(codec, rate=rate, options=quality | (options or {}))
        video.height, video.width, video.pix_fmt = *frames[0].shape[:2], pix_fmt
        video.time_base = video.codec_context.time_base = base
        if stream:
            stream(video)
        through = _filters(graph, video) if graph else None
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(image), format="rgb24"
            ).reformat(format=pix_fmt)
            frame.pts = round((k / rate if times is None else Fraction(times[k])) / base)
            frame.time_base = base
            if through:
                through.vpush(frame)
                frame = through.vpull()
                frame.time_base = base
            file.mux(video.encode(frame))
        file.mux(video.encode(None))


def _filters(text, video):
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=video.width, height=video.height, format=video.pix_fmt, time_base=Fraction(1, 25)
    )
    nodes = [source]
    for part in text.split(","):
        name, _, arguments = part.partition("=")
        nodes.append(graph.add(name, arguments or None))
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph


def write_packets(path, packets, codec, size, times, rate=25):
    """Writes packets that are coded already (bytes) at `times` in seconds: files that no encoder
    would make."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=rate)
        video.width, video.height = size
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "rgb24"
        video.time_base = Fraction(1, 1000)
        for data, time in zip(packets, times):
            packet = av.Packet(data)
            packet.stream, packet.time_base = video, Fraction(1, 1000)
            packet.pts = packet.dts = round(time * 1000)
            packet.is_keyframe = True
            container.mux(packet)


# ----------------------------------------------------------------------------------------- pictures


def write_pictures(folder, frames, suffix=".png", name="{:03d}", **options):
    """A folder of numbered pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(frames):
        Image.fromarray(image).save(folder / (name.format(k) + suffix), **options)


def write_animation(path, frames, milliseconds, **options):
    """A GIF, WebP or PNG of numbered frames that are shown for so many milliseconds each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.fromarray(image) for image in frames]
    if path.suffix == ".webp":
        options = {"lossless": True} | options
    first.save(path, save_all=True, append_images=rest, duration=list(milliseconds), **options)


def smallest(n=3, seed=0):
    """A clip that is good, for beside the bad ones: 16 x 16 pixels."""
    return moving(n, 16, 16, seed)


# ------------------------------------------------------------------------------ packing and looking


def pack(src, dst, resolution=32, jobs=1, **settings):
    """prepare() in this process: (index, opened clips)."""
    index = prepare.prepare(src, dst, resolution, jobs=jobs, **settings)
    return index, Clips(dst)


def levels(clips, clip=0):
    """The mean level of every frame of a clip, float [n]."""
    return clips.frames(clip, range(clips.lengths[clip])).mean((1, 2, 3))


def numbers(clips, clip=0):
    """Which frame of its numbered source every frame of a clip shows."""
    found = (levels(clips, clip) - FIRST) / STEP
    assert np.abs(found - found.round()).max() < 0.45, found
    return found.round().astype(int).tolist()


def number_of(clips, name):
    """The place of the clip whose name begins with `name`."""
    (place,) = [k for k, other in enumerate(clips.names) if other.startswith(name)]
    return place


def on_screen(times, moments):
    """The independent answer: which of the frames shown from `times` on is on screen at each moment
    (seconds)."""
    return [
        max(0, int(np.searchsorted(times, moment + 1e-6, side="right")) - 1) for moment in moments
    ]


def notes_on(index, *words):
    """The notes of an index that hold all these words somewhere (in what, why or names), in any
    case."""
    found = []
    for note in index["notes"]:
        text = " ".join([note["what"], note["why"] or "", *note["names"]]).lower()
        if all(word.lower() in text for word in words):
            found.append(note)
    return found


def files_of(folder):
    """{name: bytes} of every file of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def one_core():
    """While it lasts, packing finds one core only, and so needs no workers."""
    return mock.patch.object(os, "sched_getaffinity", lambda process: {0})


def command(capfd, *arguments):
    """Runs the command in this process, without workers: (exit status, stdout, stderr)."""
    capfd.readouterr()
    with one_core(), mock.patch.object(sys, "argv", ["prepare", *map(str, arguments)]):
        try:
            command_line.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
    return status, *capfd.readouterr()


@contextmanager
def at_most(seconds, megabytes):
    """Fails if the block takes longer, or this process more memory than it has now by so much.

    Twice that much is refused by the system, so that a bomb that goes off hits this test alone.
    """

    def status(field):
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024

    limits = resource.getrlimit(resource.RLIMIT_AS)
    room = (
        status("VmSize") + 2 * megabytes + 4096
    ) * 2**20  # 4 GB: threads and libraries that are only reserved
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before, begun = status("VmHWM"), time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (int(room), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.monotonic() - begun < seconds
    assert status("VmHWM") - before < megabytes
