"""Writing video, through PyAV: mp4, gif, webp, npy, folders of PNGs; in a thread of its own if
wanted; grids of clips.

Frames are uint8 RGB. Every format is written as the frames come, in constant memory (but for an
mp4's index: some 100 bytes a frame), and holds exactly the frames that it was given.
"""

import io
import math
import os
import queue
import shutil
import struct
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path
from xml.sax.saxutils import escape

import av
import numpy as np
import torch
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)
from PIL import Image

from mostgan.config import UserError

# swscale's defaults trade chroma resolution and rounding for speed; these flags do not.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)


class VideoWriter:
    """Writes frames to `path` as they come; the suffix decides: .mp4, .gif, .webp, .npy, none: a
    folder of PNGs.

        with VideoWriter("sky.mp4", fps=25) as video:
            video.write(frames)  # uint8 [n, H, W, 3] or [n, 3, H, W], numpy or torch

    Upper case will do. The result appears under its name only when the block ends well; an
    exception leaves an older file as it was. crf: H.264 quality, 0 (best) to 51. An odd side is
    made even by repeating its last row or column (mp4 only). comment: text kept in the file: mp4's
    comment tag, gif's comment block, webp's XMP, a tEXt chunk in every PNG; beside an npy, in
    <path>.json. Raises UserError where the file cannot be written.
    """

    def __init__(self, path, fps, crf=17, comment=""):
        self.path, self.fps = Path(path), Fraction(fps).limit_denominator(100_000)
        self.crf, self.comment = crf, comment
        self.suffix = self.path.suffix.lower()
        if self.suffix not in SINKS:
            raise UserError(
                f"{path}: cannot write '{self.path.suffix}'; use .mp4, .gif, .webp, .npy, or none "
                "(a folder of PNGs)"
            )
        if self.fps <= 0:
            raise UserError(f"{path}: frames per second must be positive, not {fps}")
        if not 0 <= crf <= 51:
            raise UserError(f"{path}: crf is {crf}, but must be from 0 (best) to 51")
        if self.fps > FASTEST.get(self.suffix, math.inf):
            raise UserError(
                f"{path}: {_a(self.suffix)} has at most {FASTEST[self.suffix]} frames per second, "
                f"not {float(fps):.10g}"
            )
        in_the_way = self.path.is_dir() and not (
            self.suffix == "" and _holds_only_frames(self.path)
        )
        if in_the_way or (self.suffix == "" and self.path.is_file()):
            raise UserError(f"{path} is there already and holds other things; choose another name")
        self.sidecar = Path(f"{path}.json") if self.suffix == ".npy" and comment else None
        if self.sidecar is not None and self.sidecar.is_dir():
            raise UserError(
                f"{self.sidecar} is a folder, but {path} needs a file of that name; choose another "
                "name"
            )
        self.temporary = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        self.temporary_sidecar = self.temporary.with_name(f"{self.temporary.name}.json")
        self.sink, self.shape, self.count = None, None, 0

    def check_size(self, height, width):
        """Raises UserError if the format has no pictures of so many pixels; `write` asks too, but
        that may be late.
        """
        largest = LARGEST.get(self.suffix, math.inf)
        if max(height, width) > largest:
            raise UserError(
                f"{self.path}: {_a(self.suffix)} has at most {largest} pixels a side, and the "
                "picture "
                f"would be {height} high and {width} wide; show fewer clips, or write .npy or PNGs"
            )

    def __enter__(self):
        return self

    def write(self, frames):
        """Appends uint8 [n,H,W,3] or [n,3,H,W]; every frame has the size of the first."""
        frames = frames.detach().cpu().numpy() if torch.is_tensor(frames) else np.asarray(frames)
        if (
            frames.dtype != np.uint8
            or frames.ndim != 4
            or 3 not in (frames.shape[1], frames.shape[3])
        ):
            raise ValueError(
                f"expected uint8 [n,H,W,3] or [n,3,H,W], got {frames.dtype} {list(frames.shape)}"
            )
        if frames.shape[3] != 3:
            frames = frames.transpose(0, 2, 3, 1)
        for image in frames:
            if self.shape not in (None, image.shape):
                raise ValueError(
                    f"frame {self.count} is {image.shape}, the ones before are {self.shape}"
                )
            try:
                if self.sink is None:
                    self.check_size(*image.shape[:2])
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self.shape = image.shape
                    sink = SINKS[self.suffix]
                    self.sink = sink(
                        self.temporary, self.shape[:2], self.fps, self.crf, self.comment
                    )
                self.sink.write(np.ascontiguousarray(image))
            except (OSError, av.FFmpegError) as error:
                raise self._cannot(error) from error
            self.count += 1

    def _cannot(self, error):
        return UserError(f"cannot write {self.path}: {error.strerror or error}")

    def __exit__(self, kind, error, trace):
        try:
            if self.sink is not None:
                try:
                    self.sink.close()
                    if kind is None:
                        self._appear()
                except (OSError, av.FFmpegError) as unwritten:
                    if kind is None:
                        raise self._cannot(unwritten) from unwritten
            elif kind is None:
                raise UserError(f"{self.path}: there were no frames to write")
        finally:
            _remove(self.temporary)
            _remove(self.temporary_sidecar)

    def _appear(self):
        """Gives the finished files their names, the sidecar first: an npy that is there says how it
        was made.
        """
        if self.sidecar is not None:
            self.temporary_sidecar.write_text(self.comment + "\n", encoding="utf-8")
            os.replace(self.temporary_sidecar, self.sidecar)
        _replace(self.temporary, self.path)


class BackgroundWriter:
    """A VideoWriter in a thread of its own, which encodes while the next frames are made.

        with BackgroundWriter(VideoWriter("sky.mp4", fps=25)) as video:
            video.write(frames)

    `write` returns at once, or waits while `ahead` chunks of frames lie unwritten: memory stays
    bounded. What goes wrong in the thread is raised by the next `write`, or at the end. seconds:
    spent encoding, the file's end included.
    """

    def __init__(self, video, ahead=2):
        self.video, self.queue, self.seconds, self.error = video, queue.Queue(ahead), 0.0, None
        self.thread = threading.Thread(target=self._encode, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def write(self, frames):
        self._put(frames)
        if self.error is not None:
            raise self.error

    def _put(self, item):
        while self.error is None:  # an encoder that has failed takes nothing any more
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                pass

    def _encode(self):
        """The thread: only it touches the VideoWriter. The queue holds frames, then None; an
        exception: give up.
        """
        try:
            with self.video:
                while (item := self.queue.get()) is not None:
                    if isinstance(item, BaseException):
                        raise item
                    started = time.perf_counter()
                    self.video.write(item)
                    self.seconds += time.perf_counter() - started
                started = time.perf_counter()
            self.seconds += time.perf_counter() - started
        except BaseException as error:
            self.error = error

    def __exit__(self, kind, error, trace):
        try:
            self._put(error)  # None: all is written
            self.thread.join()
        except BaseException as second:  # a Ctrl-C while waiting: still let the thread clean up
            self._put(second)
            self.thread.join()
            raise
        if kind is None and self.error is not None:
            raise self.error


class _Mp4:
    def __init__(self, path, size, fps, crf, comment):
        height, width = size
        self.pad = ((0, height % 2), (0, width % 2), (0, 0))
        self.container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self.container.metadata["comment"] = comment
        self.stream = self.container.add_stream("libx264", rate=fps, options={"crf": str(crf)})
        self.stream.width, self.stream.height, self.stream.pix_fmt = (
            width + width % 2,
            height + height % 2,
            "yuv420p",
        )
        # Convert with the matrix that we tag: players otherwise guess, and colours shift.
        context = self.stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self.reformatter, self.count = VideoReformatter(), 0

    def write(self, image):
        if any(self.pad[0] + self.pad[1]):
            image = np.pad(image, self.pad, mode="edge")
        frame = self.reformatter.reformat(
            av.VideoFrame.from_ndarray(image, format="rgb24"),
            format="yuv420p",
            interpolation=EXACT,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            dst_color_primaries=ColorPrimaries.BT709,
            dst_color_trc=ColorTrc.BT709,
        )
        frame.pts, frame.time_base = self.count, 1 / self.stream.codec_context.framerate
        self.count += 1
        self.container.mux(self.stream.encode(frame))

    def close(self):
        with self.container:
            self.container.mux(self.stream.encode(None))


class _Gif:
    """Each frame gets a palette of its own: a shared one would need every frame before the first
    could be written.
    """

    def __init__(self, path, size, fps, crf, comment):
        height, width = size
        self.path, self.comment = path, comment.encode()
        self.container = av.open(str(path), "w", format="gif", options={"loop": "0"})
        # No flags: FFmpeg's savings on unchanged areas compare palette indices, which mean other
        # colours in each frame.
        self.stream = self.container.add_stream("gif", rate=fps, options={"gifflags": "0"})
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "pal8"
        self.graph, self.time_base, self.count = av.filter.Graph(), 1 / fps, 0
        source = self.graph.add_buffer(
            width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / fps
        )
        split = self.graph.add("split")
        palette = self.graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
        use, sink = (
            self.graph.add("paletteuse", "new=1:dither=sierra2_4a"),
            self.graph.add("buffersink"),
        )
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(palette, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        self.graph.configure()

    def write(self, image):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = self.count, self.time_base
        self.count += 1
        self.graph.push(frame)
        self._drain()

    def _drain(self):
        while True:
            try:
                frame = self.graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            self.container.mux(self.stream.encode(frame))

    def close(self):
        with self.container:
            self.graph.push(None)
            self._drain()
            self.container.mux(self.stream.encode(None))
        if (
            self.comment
        ):  # FFmpeg writes none: a comment extension, in front of the last byte, the trailer
            blocks = [self.comment[i : i + 255] for i in range(0, len(self.comment), 255)]
            with open(self.path, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(
                    b"\x21\xfe" + b"".join(bytes([len(b)]) + b for b in blocks) + b"\x00\x3b"
                )


class _Webp:
    """Frames coded one by one: FFmpeg's libwebp_anim would hold them all, and merge those that are
    alike.
    """

    def __init__(self, path, size, fps, crf, comment):
        self.path, self.comment, self.size = path, comment, size
        self.container = av.open(str(path), "w", format="webp", options={"loop": "0"})
        self.stream = self.container.add_stream("libwebp", rate=fps, options={"quality": "95"})
        self.stream.height, self.stream.width = size
        self.stream.pix_fmt = "bgra"  # libwebp's own conversion to YUV: WebP fixes its matrix
        self.reformatter, self.time_base, self.count = VideoReformatter(), 1 / fps, 0

    def write(self, image):
        frame = self.reformatter.reformat(
            av.VideoFrame.from_ndarray(image, format="rgb24"), format="bgra"
        )
        frame.pts, frame.time_base = self.count, self.time_base
        self.count += 1
        self.container.mux(self.stream.encode(frame))

    def close(self):
        with self.container:
            self.container.mux(self.stream.encode(None))
        if self.comment:
            self._add_comment()

    def _add_comment(self):
        """FFmpeg writes none: an XMP chunk at the end, and its flag in the VP8X header, which a
        still image lacks.
        """
        xmp = (
            f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            f'<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description>{escape(self.comment)}'
            f"</dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"
        ).encode()
        with open(self.path, "r+b") as file:
            header = file.read(30)
            if header[12:16] != b"VP8X":
                height, width = self.size
                still = header[12:] + file.read()
                header = b"VP8X" + struct.pack("<II", 10, 0) + struct.pack("<I", width - 1)[:3]
                header = b"RIFF\0\0\0\0WEBP" + header + struct.pack("<I", height - 1)[:3]
                file.seek(0)
                file.write(header + still)
            file.seek(0, os.SEEK_END)
            file.write(b"XMP " + struct.pack("<I", len(xmp)) + xmp + b"\0" * (len(xmp) % 2))
            size = file.tell()
            file.seek(20)
            file.write(bytes([header[20] | 4]))
            file.seek(4)
            file.write(struct.pack("<I", size - 8))


class _Npy:
    """One array, [frames, H, W, 3]. Its header is written again at the end, when the number of
    frames is known.
    """

    def __init__(self, path, size, fps, crf, comment):
        self.file, self.size, self.count = open(path, "w+b"), size, 0
        self._header()

    def _header(self):
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.size, 3)}
        np.lib.format.write_array_header_1_0(
            self.file, header
        )  # leaves room for the first number to grow

    def write(self, image):
        self.file.write(image.data)
        self.count += 1

    def close(self):
        with self.file:
            self.file.seek(0)
            self._header()


class _PngFolder:
    def __init__(self, path, size, fps, crf, comment):
        self.path, self.count = path, 0
        text = b"tEXtComment\0" + comment.encode("latin-1", "replace")
        self.chunk = (
            struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
            if comment
            else b""
        )
        path.mkdir()

    def write(self, image):
        data = png(image)
        (self.path / f"{self.count:06d}.png").write_bytes(
            data[:33] + self.chunk + data[33:]
        )  # 33: after IHDR
        self.count += 1

    def close(self):
        pass


SINKS = {".mp4": _Mp4, ".gif": _Gif, ".webp": _Webp, ".npy": _Npy, "": _PngFolder}
# Frames per second. A gif counts time in 1/100 s (players slow down below 2 of them), a webp in ms;
# an mp4 of several thousand is written without an error, but is of no duration and decodes to no
# frame.
FASTEST = {".gif": 50, ".webp": 1000, ".mp4": 1000}
LARGEST = {".gif": 65535, ".webp": 16383, ".mp4": 16384}  # pixels a side; of mp4s, x264's limit


def png(image):
    """uint8 [H,W,3] → the bytes of a PNG file."""
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(data, "PNG", compress_level=4)
    return data.getvalue()


def write_png(path, image):
    """Writes uint8 [3,H,W] or [H,W,3] (numpy or torch) to `path`, whole or not at all."""
    image = image.detach().cpu().numpy() if torch.is_tensor(image) else np.asarray(image)
    path, image = Path(path), image if image.shape[-1] == 3 else image.transpose(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        temporary.write_bytes(png(image))
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def grid(clips, rows, cols):
    """Tiles clips, row by row: uint8 [n,T,3,H,W] → [T,3,rows·H,cols·W], numpy or torch; missing
    clips are black.
    """
    n, t, c, h, w = clips.shape
    if n > rows * cols:
        raise ValueError(f"{n} clips do not fit into {rows} x {cols}")
    zeros = torch.zeros if torch.is_tensor(clips) else np.zeros
    out = zeros((t, c, rows * h, cols * w), dtype=clips.dtype)
    for i in range(n):
        y, x = i // cols * h, i % cols * w
        out[:, :, y : y + h, x : x + w] = clips[i]
    return out


def _a(suffix):
    return f"an {suffix[1:]}" if suffix == ".mp4" else f"a {suffix[1:]}"


def _holds_only_frames(folder):
    return all(f.suffix == ".png" and f.stem.isdigit() for f in folder.iterdir())


def _replace(temporary, path):
    """Renames a file or folder into place, over an older one."""
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()
