"""Frames → mp4, gif, webp, npy or a folder of PNGs; single pictures; clips side by side.

PyAV writes mp4, NumPy writes npy, and Pillow writes the rest. Frames are uint8 RGB.

Memory does not grow with the number of frames, but for an mp4's index (some 100 bytes a frame) and
for a webp's encoded frames, which Pillow holds until the end. Pillow also wants every frame of a
webp before it encodes the first: they wait, uncompressed, in a temporary file beside the result.
"""

import math
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import GifImagePlugin, Image, PngImagePlugin

from mostgan.config import UserError
from mostgan.files import whole_file, whole_folder, write_whole

# swscale's defaults trade chroma resolution and rounding for speed; these flags do not.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)


class VideoWriter:
    """Writes frames to `path` as they come, in a thread of its own. The suffix decides the format:
    .mp4, .gif, .webp, .npy (an array [frames, H, W, 3]), or none for a folder of PNGs.

        with VideoWriter("sky.mp4", fps=25) as video:
            video.write(frames)  # uint8 [n, H, W, 3] or [n, 3, H, W], numpy or torch

    The result appears under its name only when the block ends well; after an exception, an older
    file is still what it was. crf: quality of an mp4, from 0 (best) to 51; an mp4's odd side is
    made even by repeating its last row or column. comment: text that is kept in the file: an mp4's
    comment tag, a gif's comment, a webp's XMP description, the text "Comment" of every PNG; for an
    npy, in <path>.json. A gif or webp repeats for ever. In a webp, frames that equal the one before
    them are one frame that is shown for longer.

    seconds: how long the thread has been encoding. Raises UserError where the file cannot be
    written, from the constructor, from `write`, or at the end of the block.
    """

    def __init__(self, path, fps, crf=17, comment=""):
        self.path, self.crf, self.comment = Path(path), crf, comment
        self.fps = Fraction(fps).limit_denominator(100_000)
        self.format = FORMATS.get(self.path.suffix.lower())
        if self.format is None:
            raise UserError(
                f"{path}: cannot write '{self.path.suffix}'; use .mp4, .gif, .webp, .npy, or none "
                "(a folder of PNGs)"
            )
        if self.fps <= 0:
            raise UserError(f"{path}: frames per second must be positive, not {fps}")
        slowest, fastest = self.format.rates
        if not slowest <= float(self.fps) <= fastest:
            raise UserError(
                f"{path}: {self.format.name} has at least {slowest} and at most {fastest} frames "
                f"per second, not {float(fps):.10g}"
            )
        if not 0 <= crf <= 51:
            raise UserError(f"{path}: crf is {crf}, but must be from 0 (best) to 51")
        self.sidecar = Path(f"{path}.json") if self.format.write == _write_npy and comment else None
        for place in filter(None, (self.path, self.sidecar)):
            if _in_the_way(place, folder_of_frames=self.format.write == _write_pngs):
                raise UserError(
                    f"{place} is there already and holds other things; choose another name"
                )
        self.shape, self.thread, self.error, self.seconds = None, None, None, 0.0
        # Chunks of frames that wait to be written: few, so that memory is bounded.
        self.queue = queue.Queue(maxsize=2)

    def check_size(self, height, width):
        """Raises UserError if the format has no pictures of so many pixels. `write` checks it too,
        but a caller may want to know before it renders the first frame.
        """
        if max(height, width) > self.format.largest:
            raise UserError(
                f"{self.path}: {self.format.name} has at most {self.format.largest} pixels a side, "
                f"and the picture would be {height} high and {width} wide; show fewer clips, or "
                "write .npy or PNGs"
            )

    def __enter__(self):
        return self

    def write(self, frames):
        """Appends uint8 [n,H,W,3] or [n,3,H,W]; every frame has the size of the first. Returns
        before they are written, so the caller must not change them afterwards.
        """
        frames = frames.detach().cpu().numpy() if torch.is_tensor(frames) else np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or 3 not in frames.shape[1::2]:
            raise ValueError(
                f"expected uint8 [n,H,W,3] or [n,3,H,W], got {frames.dtype} {list(frames.shape)}"
            )
        if frames.shape[3] != 3:
            frames = frames.transpose(0, 2, 3, 1)
        if self.shape not in (None, frames.shape[1:]):
            raise ValueError(f"frames of {frames.shape[1:]}, but the first are {self.shape}")
        if self.thread is None and len(frames):
            self.check_size(*frames.shape[1:3])
            self.shape = frames.shape[1:]
            self.thread = threading.Thread(target=self._encode, daemon=True)
            self.thread.start()
        if len(frames):
            self._put(frames)
        if self.error is not None:
            raise self.error

    def __exit__(self, kind, error, trace):
        if self.thread is None and kind is None:
            raise UserError(f"{self.path}: there were no frames to write")
        if self.thread is None:
            return
        try:
            self._put(error)
            self.thread.join()
        except BaseException as second:  # a Ctrl-C while waiting: still let the thread clean up
            self._put(second)
            self.thread.join()
            raise
        if kind is None and self.error is not None:
            raise self.error

    def _put(self, item):
        """The queue holds chunks of frames; then None at the end, or an exception to give up."""
        while self.error is None:  # an encoder that has failed takes nothing any more
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                pass

    def _images(self):
        """Yields the frames from the queue, uint8 [H,W,3], to the function that writes them."""
        while True:
            waiting = time.perf_counter()
            item = self.queue.get()
            self.seconds -= time.perf_counter() - waiting
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield from map(np.ascontiguousarray, item)

    def _encode(self):
        """The thread."""
        started = time.perf_counter()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = whole_folder if self.format.write == _write_pngs else whole_file
            with whole(self.path) as target:
                self.format.write(target, self._images(), self)
                if self.sidecar is not None:  # first: an npy that is there says how it was made
                    write_whole(self.sidecar, self.comment + "\n")
        except (OSError, av.FFmpegError) as error:
            self.error = UserError(f"cannot write {self.path}: {error.strerror or error}")
        except BaseException as error:
            self.error = error
        self.seconds += time.perf_counter() - started


def _write_mp4(file, images, video):
    height, width = video.shape[:2]
    pad = (0, height % 2), (0, width % 2), (0, 0)
    options = {"movflags": "+faststart"}
    # By its name, since FFmpeg opens the file again to move the index to the front.
    with av.open(file.name, "w", format="mp4", options=options) as container:
        container.metadata["comment"] = video.comment
        options = {"crf": str(video.crf)}
        stream = container.add_stream("libx264", rate=video.fps, options=options)
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        # Convert with the matrix that we tag: players otherwise guess, and colours shift.
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.pad(image, pad, mode="edge"), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                interpolation=EXACT,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                dst_color_primaries=ColorPrimaries.BT709,
                dst_color_trc=ColorTrc.BT709,
            )
            frame.pts, frame.time_base = i, 1 / video.fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_gif(file, images, video):
    """Each frame has a palette of its own, since a shared one would need every frame before the
    first could be written. Frame by frame with getheader and getdata: Image.save takes an iterator
    too, but holds all of its frames until the last has come.
    """
    for i, image in enumerate(images):
        image = Image.fromarray(image)
        palette = image.quantize(256, method=Image.Quantize.FASTOCTREE)
        image = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        if i == 0:
            info = {"loop": 0, "comment": video.comment.encode()}  # 0: without end
            file.writelines(GifImagePlugin.getheader(image, info=info)[0])
        duration = 10 * _ticks(i, video.fps, 100)
        frame = GifImagePlugin.getdata(image, duration=duration, include_color_table=True)
        file.writelines(frame)
    file.write(b";")  # the end of a gif


def _write_webp(file, images, video):
    height, width = video.shape[:2]
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description>'
        f"{escape(video.comment)}</dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"
    )
    with tempfile.TemporaryFile(dir=Path(file.name).parent) as waiting:
        for image in images:
            waiting.write(np.pad(image, ((0, 0), (0, 0), (0, 1))).data)
        waiting.flush()
        # Pictures of four bytes a pixel, "RGBX", which Pillow reads where they lie in the file.
        frames = np.memmap(waiting, mode="r").reshape(-1, height, width, 4)
        layout = "raw", "RGBX", 0, 1
        first, *others = (Image.frombuffer("RGBX", (width, height), f, *layout) for f in frames)
        first.save(
            file,
            "WEBP",
            save_all=True,
            append_images=others,
            duration=[_ticks(i, video.fps, 1000) for i in range(len(frames))],
            loop=0,  # without end
            quality=95,
            method=4,
            kmax=1,  # every frame whole: no frame shows what is left of those before it
            xmp=xmp.encode() if video.comment else b"",
        )


def _write_npy(file, images, video):
    """The header is written again at the end, when the number of frames is known."""

    def write_header(count):
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *video.shape)}
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)  # leaves room for `count` to grow

    count = 0
    write_header(count)
    for image in images:
        file.write(image.data)
        count += 1
    write_header(count)


def _write_pngs(folder, images, video):
    text = PngImagePlugin.PngInfo()
    if video.comment:
        text.add_text("Comment", video.comment)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png", compress_level=4, pnginfo=text)


def _ticks(i, fps, per_second):
    """How long frame i lasts, in whole ticks: its own start and end are rounded, so that errors do
    not add up.
    """
    return round((i + 1) * per_second / fps) - round(i * per_second / fps)


class Format(NamedTuple):
    name: str
    write: Callable  # (file or folder, iterator of uint8 [H,W,3], the VideoWriter)
    largest: float = math.inf  # pixels a side
    rates: tuple[float, float] = (0, math.inf)  # slowest and fastest, in frames per second


# An mp4's largest side is x264's limit; one of several thousand frames a second is written without
# an error, but decodes to no frame. A gif counts time in 1/100 s, up to 655 s, and players slow it
# down where a frame has less than 2 of them. A webp counts milliseconds.
FORMATS = {
    ".mp4": Format("an mp4", _write_mp4, 16384, (0.002, 1000)),
    ".gif": Format("a gif", _write_gif, 65535, (0.002, 50)),
    ".webp": Format("a webp", _write_webp, 16383, (0.002, 1000)),
    ".npy": Format("an npy", _write_npy),
    "": Format("a folder of PNGs", _write_pngs),
}


def write_png(path, image):
    """Writes uint8 [3,H,W] or [H,W,3] (numpy or torch) to `path`, whole or not at all."""
    image = image.detach().cpu().numpy() if torch.is_tensor(image) else np.asarray(image)
    image = image if image.shape[-1] == 3 else image.transpose(1, 2, 0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG", compress_level=4)


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


def film_strips(clips, moments):
    """uint8 [n,T,3,H,W] → one picture [3, n·H, m·W]: a row for each clip, with m = min(moments, T)
    of its frames, evenly from the first to the last.
    """
    length = clips.shape[1]
    chosen = np.linspace(0, length - 1, min(moments, length)).round().astype(int).tolist()
    frames = clips[:, chosen]  # [n, m, 3, H, W]
    return grid(frames.reshape(-1, 1, *frames.shape[2:]), len(clips), len(chosen))[0]


def _in_the_way(path, folder_of_frames):
    """Whether there is something at `path` that a file, or a folder of frames, must not replace."""
    if folder_of_frames and path.is_dir():
        return not all(file.suffix == ".png" and file.stem.isdigit() for file in path.iterdir())
    return path.exists() if folder_of_frames else path.is_dir()
