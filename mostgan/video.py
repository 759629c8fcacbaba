"""Reading video, through PyAV: frames in, square crops, and coding single frames. (video_writer.py writes.)

Images are uint8 RGB: [H,W,3] while they are single frames on their way in, [3,H,W] once packed.
"""

import os
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

# swscale's defaults trade chroma resolution and rounding for speed; these flags do not.
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
RUN_UP = 5  # seconds from where a search in a video begins to the frame that is looked for
MAX_PIXELS = 1 << 26  # of one frame: twice 8K; a file that claims more is damaged, or meant to fill the memory
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED: the file does not say which YUV matrix it was made with


# reading


def open_video(file):
    """An av container on `file` (path or seekable binary file). Raises av.FFmpegError, OSError or ValueError."""
    container = av.open(file if hasattr(file, "read") else os.fspath(file))
    context = container.streams.video[0].codec_context if container.streams.video else None
    if context is None:
        container.close()
        raise ValueError("it has no video stream that FFmpeg can decode")
    # One thread: FFmpeg's pool threads can hang a worker that exits early, and packing is parallel over clips already.
    context.thread_type, context.thread_count = "NONE", 1
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return container


def frame_rate(file):
    """Frames per second that the container states, or 25.0 where it states none."""
    with open_video(file) as container:
        stream = container.streams.video[0]
        return float(stream.average_rate or stream.guessed_rate or 25)


def packet_times(file):
    """When each frame of a video is shown and when the last one ends: (seconds, ascending float64 [n], end, keys).

    keys: those of the frames, float64 [k], from which decoding may start, says the container. Reads packets and decodes
    nothing. n is 0 where the file states no times. Raises what open_video raises.
    """
    with open_video(file) as container:
        packets = [p for p in container.demux(video=0) if p.pts is not None]
        shown = {p.pts: (float(p.pts * p.time_base), float((p.duration or 0) * p.time_base)) for p in packets}
        keys = np.array(sorted({shown[p.pts][0] for p in packets if p.is_keyframe}))
    times, durations = np.array(sorted(shown.values())).reshape(-1, 2).T
    if len(times) < 2:
        return times, float(times[-1] + durations[-1]) if len(times) else 0.0, keys
    gaps = np.diff(times)
    # MP4 states the gaps in the order of decoding; where those are not the gaps on screen, the last one is a guess.
    trusted = durations[-1] > 0 and np.abs(durations[:-1] - gaps).max() < 0.002
    return times, float(times[-1] + (durations[-1] if trusted else np.median(gaps))), keys


def decode_frames(file, pts=None):
    """Yields every frame of a video or image file as av.VideoFrame. Raises what open_video raises, also midway.

    pts: begins with the frame of this timestamp, in the stream's time base, found by seeking to a key frame before it;
    raises ValueError where that does not lead to it. The file is closed when the iterator ends or is dropped.
    """
    with open_video(file) as container:
        if pts is not None:
            stream = container.streams.video[0]
            container.seek(pts - int(RUN_UP / stream.time_base), stream=stream)
        for frame in container.decode(video=0):
            if pts is not None and (frame.pts is None or frame.pts > pts):
                break
            if pts is None or frame.pts == pts:
                yield frame
                pts = None
    if pts is not None:
        raise ValueError("seeking does not find the frame")


def read_frames(file):
    """Yields every frame of a video or image file (path or seekable binary file) as uint8 [H,W,3], turned upright."""
    reformatter = VideoReformatter()
    for frame in decode_frames(file):
        yield to_rgb(frame, reformatter)


def to_rgb(frame, reformatter=None):
    """A decoded av.VideoFrame as uint8 [H,W,3]: the right YUV matrix and range, transparency over black, upright.

    reformatter: one kept for the frames of a file saves setting up the conversion for each.
    """
    reformatter = reformatter or VideoReformatter()
    if frame.colorspace == UNSPECIFIED and not frame.format.is_rgb:
        # What players assume of untagged files: high definition is BT.709, the rest BT.601.
        frame.colorspace = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    if any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8":
        rgba = reformatter.reformat(frame, format="rgba", interpolation=EXACT, threads=1).to_ndarray().astype(np.uint16)
        rgb = ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    elif frame.format.is_rgb:
        rgb = reformatter.reformat(frame, format="rgb24", interpolation=EXACT, threads=1).to_ndarray()
    else:  # the same values as rgb24, in a third of the time: swscale is quick where it writes planes
        planar = reformatter.reformat(frame, format="gbrp", interpolation=EXACT, threads=1)
        rgb = np.empty((frame.height, frame.width, 3), np.uint8)
        _copy_planes(planar, rgb.transpose(2, 0, 1))
    quarter_turns = round(frame.rotation / 90) % 4  # metadata of phone videos; counterclockwise
    return np.rot90(rgb, quarter_turns) if quarter_turns else rgb


def _copy_planes(planar, out, order=(1, 2, 0)):
    """Copies a frame of three full planes (by default green, blue, red) into `out`, [3,H,W] in any memory order."""
    height, width = out.shape[1:]
    for channel, plane in zip(order, planar.planes):
        out[channel] = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, :width]


def crop_resize(frame, box, resolution):
    """uint8 [H,W,3] → [R,R,3], R = resolution: the box (x, y, width, height), antialiased bicubic; exact if it fits.

    Raises ValueError where the box does not lie within the frame.
    """
    x, y, width, height = box
    if x < 0 or y < 0 or width < 1 or height < 1 or x + width > frame.shape[1] or y + height > frame.shape[0]:
        raise ValueError(f"the crop {x},{y},{width},{height} exceeds its frames of {frame.shape[1]}x{frame.shape[0]}")
    part = np.ascontiguousarray(frame[y : y + height, x : x + width])
    if (width, height) == (resolution, resolution):
        return part
    planes = torch.from_numpy(part).permute(2, 0, 1)[None]  # a channels-last view
    planes = F.interpolate(planes, (resolution, resolution), mode="bicubic", antialias=True, align_corners=False)
    return np.ascontiguousarray(planes[0].permute(1, 2, 0).numpy())


def center_box(shape):
    """The largest centered square of a frame of shape (H, W, …), as (x, y, width, height)."""
    height, width = shape[:2]
    side = min(height, width)
    return (width - side) // 2, (height - side) // 2, side, side


def center_crop_resize(frame, resolution):
    """uint8 [H,W,3] → [R,R,3]: the largest centered square."""
    return crop_resize(frame, center_box(frame.shape), resolution)


# single frames


def _encoder(codec, pix_fmt, resolution, options):
    context = av.CodecContext.create(codec, "w")
    context.width = context.height = resolution
    context.pix_fmt, context.time_base, context.thread_count = pix_fmt, Fraction(1, 25), 1
    context.options = {"flags": "+bitexact", **options}
    return context


class FrameEncoder:
    """Codes square frames one by one for packing: `encode(uint8 [R,R,3]) -> bytes`.

    JPEG 4:4:4 at FFmpeg's finest quantizer (about quality 96), which keeps most frames of 256 pixels at 45 to 50 dB.
    Frames that it would keep worse (fine detail: most frames of 64 pixels), and all of them when `lossless`, are stored
    exactly, as QOI: about the size of a PNG, and it decodes several times faster. After such a frame the next few are
    stored exactly without trying: they are alike where frames come in the order of a clip, for which this is made.
    """

    MIN_PSNR = 45.0
    UNTRIED = 7

    def __init__(self, resolution, lossless=False):
        finest = {"flags": "+bitexact+qscale", "qmin": "1", "qmax": "1", "color_range": "jpeg"}
        self.jpeg = None if lossless else _encoder("mjpeg", "yuvj444p", resolution, finest)
        self.qoi = _encoder("qoi", "rgb24", resolution, {})
        self.to_yuv, self.decoder, self.untried = VideoReformatter(), FrameDecoder(resolution), 0

    def encode(self, image):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        if self.untried > 0:
            self.untried -= 1
        elif self.jpeg is not None:
            target = {"format": "yuvj444p", "dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.JPEG}
            yuv = self.to_yuv.reformat(frame, **target, threads=1)  # not EXACT: to 4:4:4 it is as exact, and quicker
            data = _only_packet(self.jpeg, yuv)
            error = np.subtract(self.decoder.decode(data), image.transpose(2, 0, 1), dtype=np.int16)
            error = error.ravel().astype(np.float32)
            if error @ error <= error.size * 255**2 / 10 ** (self.MIN_PSNR / 10):
                return data
            self.untried = self.UNTRIED
        return _only_packet(self.qoi, frame)


def _only_packet(context, frame):
    (packet,) = context.encode(frame)
    return bytes(packet)


# JPEG's Y, Cb, Cr → R, G, B; the offset undoes that of Cb and Cr and rounds. In multiples of 2⁻¹⁴, so that float32
# holds every product and sum exactly: the same frame comes out whatever the order of the sums, on any machine.
TO_RGB = torch.tensor([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]]).mul(2**14).round() / 2**14
TO_RGB_OFFSET = 0.5 - 128 * TO_RGB[:, 1:].sum(1, keepdim=True)


class FrameDecoder:
    """Decodes what FrameEncoder wrote: `decode(bytes) -> uint8 [3,R,R]`. One codec context per format, no container.

    Not to be shared between threads or processes. Raises av.FFmpegError or ValueError on damaged data.
    """

    def __init__(self, resolution):
        self.shape = (3, resolution, resolution)
        self.contexts, self.to_planes = {}, VideoReformatter()
        self.bytes = np.empty(self.shape, np.uint8)
        self.ycc, self.rgb = torch.empty(2, 3, resolution * resolution)

    def decode(self, data, out=None):
        codec = "qoi" if data[:4] == b"qoif" else "mjpeg"
        if codec not in self.contexts:
            self.contexts[codec] = av.CodecContext.create(codec, "r")
            self.contexts[codec].thread_count = 1
            self.contexts[codec].options = {"idct": "xvid"}  # as exact as the default one and a sixth quicker in all
        frames = self.contexts[codec].decode(av.Packet(data))
        if len(frames) != 1 or (frames[0].height, frames[0].width) != self.shape[1:]:
            raise ValueError(f"not a coded frame of {self.shape[1]} pixels")
        out = np.empty(self.shape, np.uint8) if out is None else out
        if frames[0].format.name == "yuvj444p":  # as swscale has it, in two thirds of its time
            _copy_planes(frames[0], self.bytes, order=(0, 1, 2))
            self.ycc.copy_(torch.from_numpy(self.bytes).flatten(1))
            torch.addmm(TO_RGB_OFFSET, TO_RGB, self.ycc, out=self.rgb).clamp_(0, 255)
            np.copyto(out, self.rgb.numpy().reshape(self.shape), casting="unsafe")
        else:
            _copy_planes(self.to_planes.reformat(frames[0], format="gbrp", interpolation=EXACT, threads=1), out)
        return out


def png(image):
    """uint8 [H,W,3] → the bytes of a PNG file."""
    context = av.CodecContext.create("png", "w")
    context.height, context.width = image.shape[:2]
    context.pix_fmt, context.time_base, context.thread_count = "rgb24", Fraction(1, 25), 1
    context.options = {"pred": "mixed"}
    return _only_packet(context, av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
