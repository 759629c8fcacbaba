"""video.py: reading upright and in true colours, resizing, single-frame coding."""

from fractions import Fraction

import av
import numpy as np
import pytest

from mostgan.video import FrameDecoder, FrameEncoder, center_crop_resize, read_frames
from mostgan.video_writer import VideoWriter

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 30, 90)]


def solid(height, width, frames_each=2):
    return np.stack([np.full((height, width, 3), color, np.uint8) for color in COLORS for _ in range(frames_each)])


def smooth(n=8, size=64, seed=0):
    """Smooth moving frames [n,size,size,3]."""
    phase = np.random.default_rng(seed).uniform(0, 6, (3, 2))
    y, x = np.mgrid[:size, :size] / size
    channels = [np.sin(5 * x + a + np.arange(n)[:, None, None] / 3) * np.cos(4 * y + b) for a, b in phase]
    return (np.stack(channels, -1) * 120 + 128).astype(np.uint8)


def encode(path, frames, pix_fmt="yuv420p", matrix=None, full_range=False, fps=25):
    """A nearly lossless test video with chosen YUV properties, independent of VideoWriter. matrix None: untagged."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "0" if "10" not in pix_fmt else "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        space = matrix or "ITU601"
        if matrix:
            stream.codec_context.colorspace = {"ITU601": 5, "ITU709": 1, "BT2020": 9}[matrix]
        if full_range:
            stream.codec_context.color_range = 2
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=space, dst_color_range=2 if full_range else 1)
            frame.colorspace = {"ITU601": 5, "ITU709": 1, "BT2020": 9}[matrix] if matrix else 2
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def error_to(frames, expected):
    return np.abs(np.stack(frames).astype(int) - expected).max()


# reading


@pytest.mark.parametrize("matrix", [None, "ITU601", "ITU709"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_colors_are_read_with_the_matrix_of_the_file(tmp_path, matrix, pix_fmt):
    encode(tmp_path / "a.mp4", solid(48, 64), pix_fmt, matrix)
    assert error_to(list(read_frames(tmp_path / "a.mp4")), solid(48, 64)) <= 2


def test_full_range_is_respected(tmp_path):
    encode(tmp_path / "a.mp4", solid(48, 64), "yuv420p", "ITU709", full_range=True)
    assert error_to(list(read_frames(tmp_path / "a.mp4")), solid(48, 64)) <= 2


def test_untagged_high_definition_is_bt709(tmp_path):
    frames = solid(720, 64, 1)
    encode(tmp_path / "tagged.mp4", frames, matrix="ITU709")
    data = (tmp_path / "tagged.mp4").read_bytes()
    # The same video with its tags taken off: the container's colr box renamed, and no tags in the stream.
    with av.open(str(tmp_path / "untagged.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 720, 64, "yuv420p"
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range=1)
            frame.colorspace = 2
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert data and error_to(list(read_frames(tmp_path / "untagged.mp4")), frames) <= 2


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_metadata_is_respected(tmp_path, turns):
    upright = np.zeros((4, 64, 96, 3), np.uint8)
    upright[:, :32, :48] = (255, 0, 0)
    upright[:, 32:, :48] = (0, 0, 255)
    # A phone stores the picture turned, and in the track header the turn to undo that (clockwise, `turns` quarters).
    with VideoWriter(tmp_path / "a.mp4", 25) as video:
        video.write(np.rot90(upright, turns, axes=(1, 2)).copy())
    identity = b"".join(v.to_bytes(4, "big", signed=True) for v in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    a, b, c, d = [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][turns - 1]
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    rotated = b"".join(v.to_bytes(4, "big", signed=True) for v in values)
    data = (tmp_path / "a.mp4").read_bytes()
    start = data.index(b"tkhd")
    (tmp_path / "a.mp4").write_bytes(data[:start] + data[start:].replace(identity, rotated, 1))
    frames = list(read_frames(tmp_path / "a.mp4"))
    assert frames[0].shape == (64, 96, 3)
    assert np.abs(np.stack(frames).astype(int) - upright)[:, 4:28, 4:44].max() <= 4
    assert np.abs(np.stack(frames).astype(int) - upright)[:, 36:60, 4:44].max() <= 4


def test_transparency_is_laid_over_black(tmp_path):
    rgba = np.full((8, 8, 4), 200, np.uint8)
    rgba[:4, :, 3], rgba[4:, :, 3] = 0, 255
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 8, 8, "rgba", Fraction(1, 25)
    (packet,) = encoder.encode(av.VideoFrame.from_ndarray(rgba, format="rgba"))
    (tmp_path / "a.png").write_bytes(bytes(packet))
    (image,) = read_frames(tmp_path / "a.png")
    assert (image[:4] == 0).all() and (image[4:] == 200).all()


def test_a_file_that_is_no_video_raises(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video" * 100)
    with pytest.raises((av.FFmpegError, ValueError)):
        list(read_frames(tmp_path / "a.mp4"))


# crop and resize


def test_a_frame_of_the_right_size_is_untouched():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert (center_crop_resize(image, 32) == image).all()


@pytest.mark.parametrize("shape", [(40, 32), (32, 41)])
def test_the_crop_is_centered(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    top, left = (shape[0] - 32) // 2, (shape[1] - 32) // 2
    assert (center_crop_resize(image, 32) == image[top : top + 32, left : left + 32]).all()


def test_resizing_is_antialiased_centered_and_keeps_colors():
    noise = np.random.default_rng(0).normal(128, 40, (128, 128, 3)).clip(0, 255).astype(np.uint8)
    assert center_crop_resize(noise, 32).std() < 0.4 * noise.std()  # without a filter: about 0.7
    flat = np.full((100, 130, 3), (13, 140, 250), np.uint8)
    assert (center_crop_resize(flat, 32) == flat[0, 0]).all()
    image = smooth(1, 128)[0]
    flipped = center_crop_resize(image[:, ::-1], 48)[:, ::-1]
    assert np.abs(flipped.astype(int) - center_crop_resize(image, 48)).max() <= 1
    ramp = np.broadcast_to(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (128, 128, 3))
    expected = np.arange(32) * 8 + 3  # the mean of each four columns of the ramp
    assert np.abs(center_crop_resize(ramp, 32)[0, 2:-2, 0].astype(int) - expected[2:-2]).max() <= 1


# single frames


@pytest.mark.parametrize("kind", ["smooth", "noise", "solid"])
@pytest.mark.parametrize("lossless", [False, True])
def test_coded_frames_keep_45_db(kind, lossless):
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    frames = {"smooth": smooth(), "noise": noise, "solid": solid(64, 64)}[kind]
    encoder, decoder = FrameEncoder(64, lossless), FrameDecoder(64)
    for image in frames:
        decoded = decoder.decode(encoder.encode(image)).transpose(1, 2, 0).astype(float)
        error = np.mean((decoded - image) ** 2)
        assert error == 0 if lossless else error <= 255**2 / 10**4.5


def test_smooth_frames_are_jpeg_and_small():
    encoder = FrameEncoder(64)
    coded = [encoder.encode(image) for image in smooth()]
    assert all(data[:2] == b"\xff\xd8" for data in coded)
    assert np.mean([len(data) for data in coded]) < 64 * 64 * 3 / 3


def test_jpeg_is_tried_again_a_few_frames_after_one_that_it_would_spoil():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    encoder, easy = FrameEncoder(64), smooth(1)[0]
    kinds = [encoder.encode(image)[:4] == b"qoif" for image in [easy, noise, *[easy] * 12]]
    assert kinds == [False] + [True] * 8 + [False] * 5


def test_damaged_data_raises():
    data = FrameEncoder(64).encode(smooth()[0])
    with pytest.raises((av.FFmpegError, ValueError)):
        FrameDecoder(64).decode(b"\0" * len(data))
    with pytest.raises(ValueError):
        FrameDecoder(32).decode(data)

