"""video_writer.py: mp4, gif, webp, npy and PNG folders with every frame and true colours, whole or
not at all.
"""

import io
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation
from PIL import Image, ImageSequence

from mostgan.config import UserError
from mostgan.video_writer import BackgroundWriter, VideoWriter, grid, write_png

COLORS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
    (128, 128, 128),
    (200, 30, 90),
]


def solid(height, width, frames_each=2):
    return np.stack(
        [
            np.full((height, width, 3), color, np.uint8)
            for color in COLORS
            for _ in range(frames_each)
        ]
    )


def smooth(n=8, size=64, seed=0):
    """Smooth moving frames [n,size,size,3]."""
    phase = np.random.default_rng(seed).uniform(0, 6, (3, 2))
    y, x = np.mgrid[:size, :size] / size
    channels = [
        np.sin(5 * x + a + np.arange(n)[:, None, None] / 3) * np.cos(4 * y + b) for a, b in phase
    ]
    return (np.stack(channels, -1) * 120 + 128).astype(np.uint8)


def error_to(frames, expected):
    return np.abs(np.stack(frames).astype(int) - expected).max()


def read_frames(file):
    """Yields every frame of a file as uint8 [H,W,3]: an mp4's by FFmpeg, those of pictures by
    Pillow.
    """
    if str(file).endswith(".mp4"):
        exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        with av.open(str(file)) as video:
            for frame in video.decode(video=0):
                yield frame.reformat(format="rgb24", interpolation=exact).to_ndarray()
    else:
        with Image.open(file) as image:
            for picture in ImageSequence.Iterator(image):
                yield np.asarray(picture.convert("RGB"))


def frame_rate(path):
    with av.open(str(path)) as video:
        return float(video.streams.video[0].average_rate)


@pytest.mark.parametrize("size", [(64, 64), (47, 33), (2, 2)])
@pytest.mark.parametrize("fps", [25, 29.97, 7.5])
def test_mp4_has_every_frame_and_true_colors(tmp_path, size, fps):
    frames = solid(*size, 3)
    with VideoWriter(tmp_path / "new" / "a.mp4", fps) as video:
        for chunk in np.array_split(frames, 4):
            video.write(chunk)
    decoded = np.stack(list(read_frames(tmp_path / "new" / "a.mp4")))
    assert decoded.shape[:3] == (len(frames), size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert error_to(decoded[:, : size[0], : size[1]], frames) <= 2
    assert frame_rate(tmp_path / "new" / "a.mp4") == pytest.approx(fps, rel=1e-3)
    with av.open(str(tmp_path / "new" / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.pix_fmt) == (1, 1, "yuv420p")


@pytest.mark.parametrize("count", [1, 2, 61])
def test_mp4_frame_count(tmp_path, count):
    with VideoWriter(tmp_path / "a.mp4", 25) as video:
        video.write(smooth(count))
    assert len(list(read_frames(tmp_path / "a.mp4"))) == count


@pytest.mark.parametrize("fps", [0.01, 1000])
def test_mp4_of_the_slowest_and_fastest_rates_plays(tmp_path, fps):
    with VideoWriter(tmp_path / "a.mp4", fps) as video:
        video.write(smooth(3))
    assert len(list(read_frames(tmp_path / "a.mp4"))) == 3 and frame_rate(
        tmp_path / "a.mp4"
    ) == pytest.approx(fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.duration == pytest.approx(3e6 / fps, rel=0.01)  # in microseconds


def test_mp4_quality(tmp_path):
    frames = smooth(20)
    with VideoWriter(tmp_path / "a.mp4", 25) as video:
        video.write(torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()))  # channels first, torch
    error = np.mean((np.stack(list(read_frames(tmp_path / "a.mp4"))).astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > 38


@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_gif(tmp_path, size):
    frames = np.concatenate([solid(*size), solid(*size)[::-1]])
    with VideoWriter(tmp_path / "a.gif", 25) as video:
        video.write(frames)
    assert error_to(list(read_frames(tmp_path / "a.gif")), frames) <= 2
    assert frame_rate(tmp_path / "a.gif") == 25


def test_png_folder_is_exact_and_replaced_by_a_second_run(tmp_path):
    for seed, count in ((0, 5), (1, 3)):
        frames = np.random.default_rng(seed).integers(0, 256, (count, 20, 31, 3), dtype=np.uint8)
        with VideoWriter(tmp_path / "frames", 25) as video:
            video.write(frames)
        files = sorted((tmp_path / "frames").iterdir())
        assert [file.name for file in files] == [f"{i:06d}.png" for i in range(count)]
        assert error_to([next(read_frames(file)) for file in files], frames) == 0


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.npy", "frames"])
def test_an_exception_leaves_nothing_new(tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(tmp_path / name, 25) as video:
            video.write(smooth())
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with VideoWriter(tmp_path / name, 25) as video:
        video.write(smooth(4))
    with pytest.raises(ValueError, match="are"):
        with VideoWriter(tmp_path / name, 25) as video:
            video.write(smooth(2))
            video.write(smooth(2, size=32))  # of another size
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(frames_in(tmp_path / name)) == 4


@pytest.mark.parametrize("name", ["UP.MP4", "Up.Gif", "UP.WEBP", "UP.NPY"])
def test_suffixes_may_be_in_upper_case(tmp_path, name):
    with VideoWriter(tmp_path / name, 25, comment="how it was made") as video:
        video.write(smooth(3))
    (tmp_path / name).rename(tmp_path / name.lower())
    assert len(frames_in(tmp_path / name.lower())) == 3
    assert sorted(path.name for path in tmp_path.glob("U*")) == (
        ["UP.NPY.json"] if name == "UP.NPY" else []
    )


def test_writer_errors_are_the_users_to_mend(tmp_path):
    for name, fps in (("a.gif", 51), ("a.webp", 1001), ("a.mp4", 1001), ("A.GIF", 51)):
        with pytest.raises(UserError, match="at most"):
            VideoWriter(tmp_path / name, fps)
    with pytest.raises(UserError, match="crf is 52"):
        VideoWriter(tmp_path / "a.mp4", 25, crf=52)
    with pytest.raises(UserError, match=r"\.xyz"):
        VideoWriter(tmp_path / "a.xyz", 25)
    with pytest.raises(UserError, match="positive"):
        VideoWriter(tmp_path / "a.mp4", 0)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("keep me")
    with pytest.raises(UserError, match="folder"):
        VideoWriter(tmp_path / "folder", 25)
    with pytest.raises(UserError, match="no frames"):
        with VideoWriter(tmp_path / "a.mp4", 25):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        with VideoWriter(tmp_path / "file" / "a.mp4", 25) as video:
            video.write(smooth(1))


@pytest.mark.parametrize("name, largest", [("a.mp4", 16384), ("a.webp", 16383), ("a.gif", 65535)])
def test_the_largest_pictures(tmp_path, name, largest):
    for size in ((largest, 1), (2, largest)):
        with VideoWriter(tmp_path / name, 25) as video:
            video.check_size(*size)
            video.write(np.zeros((1, *size, 3), np.uint8))
        assert len(frames_in(tmp_path / name)) == 1
        (tmp_path / name).unlink()
    for size in ((largest + 1, 1), (2, largest + 1)):
        with pytest.raises(
            UserError, match=f"at most {largest} pixels a side.* {size[0]} high and {size[1]} wide"
        ):
            with VideoWriter(tmp_path / name, 25) as video:
                video.write(np.zeros((1, *size, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
    VideoWriter(tmp_path / "a.npy", 25).check_size(100_000, 100_000)


def test_an_npy_never_lacks_its_sidecar(tmp_path, monkeypatch):
    """Names appear in order, sidecar first; a sidecar that cannot be written leaves an older npy as
    it was.
    """
    named, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: (named.append(Path(new).name), replace(old, new))
    )
    path = tmp_path / "a.npy"
    with VideoWriter(path, 25, comment="first") as video:
        video.write(smooth(2))
    assert named == ["a.npy.json", "a.npy"] and comment_in(path) == "first"

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        with VideoWriter(path, 25, comment="second") as video:
            video.write(smooth(3))
    assert (
        len(np.load(path)) == 2
        and comment_in(path) == "first"
        and len(list(tmp_path.iterdir())) == 2
    )
    (tmp_path / "b.npy.json").mkdir()
    with pytest.raises(UserError, match="b.npy.json is a folder"):
        VideoWriter(tmp_path / "b.npy", 25, comment="third")


def test_write_png_and_grid(tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 8, 10), dtype=np.uint8)
    sheet = grid(clips, rows=2, cols=3)
    assert sheet.shape == (2, 3, 16, 30)
    assert (sheet[1, :, 8:, 10:20] == clips[4, 1]).all() and (sheet[:, :, 8:, 20:] == 0).all()
    assert (grid(torch.from_numpy(clips), 2, 3).numpy() == sheet).all()
    with pytest.raises(ValueError):
        grid(clips, 2, 2)
    write_png(tmp_path / "new" / "a.png", torch.from_numpy(sheet[0]))
    assert (next(read_frames(tmp_path / "new" / "a.png")).transpose(2, 0, 1) == sheet[0]).all()


def webp_frames(path):
    """An animated WebP, which FFmpeg does not read: frames (uint8 [H,W,3]), their milliseconds, and
    other chunks.
    """
    data, frames, durations, others = path.read_bytes(), [], [], {}
    assert (
        data[:4] + data[8:12] == b"RIFFWEBP" and struct.unpack("<I", data[4:8])[0] == len(data) - 8
    )
    at = 12
    while at < len(data):
        kind, size = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])[0]
        chunk = data[at + 8 : at + 8 + size]
        if kind in (b"ANMF", b"VP8 "):
            still = chunk[16:] if kind == b"ANMF" else data[at : at + 8 + size]
            still = b"RIFF" + struct.pack("<I", len(still) + 4) + b"WEBP" + still
            frames.append(next(read_frames(io.BytesIO(still))))
            durations.append(int.from_bytes(chunk[12:15], "little"))
        else:
            others[kind] = chunk
        at += 8 + size + size % 2
    return frames, durations, others


def frames_in(path):
    if path.is_dir():
        return [next(read_frames(file)) for file in sorted(path.iterdir())]
    if path.suffix == ".npy":
        return list(np.load(path))
    return webp_frames(path)[0] if path.suffix == ".webp" else list(read_frames(path))


def comment_in(path):
    """The comment of a file, found as a user's other programs would find it."""
    if path.is_dir():
        first = sorted(path.iterdir())[0].read_bytes()
        at = first.index(b"tEXtComment\0")
        return first[at + 12 : at + 4 + struct.unpack(">I", first[at - 4 : at])[0]].decode()
    if path.suffix == ".npy":
        return Path(f"{path}.json").read_text().rstrip("\n")
    if path.suffix == ".webp":
        xmp = ElementTree.fromstring(webp_frames(path)[2][b"XMP "])
        return xmp.find(".//{http://purl.org/dc/elements/1.1/}description").text
    if path.suffix == ".gif":
        data, text = path.read_bytes(), b""
        at = data.rindex(b"\x21\xfe") + 2
        while data[at]:
            text, at = text + data[at + 1 : at + 1 + data[at]], at + 1 + data[at]
        assert data[at:] == b"\x00\x3b"
        return text.decode()
    with av.open(str(path)) as container:
        return container.metadata["comment"]


@pytest.mark.parametrize("count", [1, 2, 45])
@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.npy", "frames"])
def test_every_format_has_every_frame_true_colors_and_the_comment(tmp_path, name, count):
    frames = solid(48, 64, 7)[:count]  # most frames are like the one before: none may be merged
    comment = json.dumps({"of": "α < β & 'γ'", "long": "x" * 600})
    with VideoWriter(tmp_path / name, 25, comment=comment) as video:
        for chunk in np.array_split(frames, min(count, 4)):
            video.write(chunk)
    written = frames_in(tmp_path / name)
    assert len(written) == count and error_to(written, frames) <= (
        0 if name in ("a.npy", "frames") else 2
    )
    assert comment_in(tmp_path / name) == comment


@pytest.mark.parametrize("fps", [25, 30, 12.5])
def test_webp_keeps_time(tmp_path, fps):
    with VideoWriter(tmp_path / "a.webp", fps) as video:
        video.write(smooth(30))
    frames, durations, others = webp_frames(tmp_path / "a.webp")
    assert abs(sum(durations) - 30_000 / fps) <= 1 and max(durations) - min(durations) <= 1
    assert others[b"ANIM"][4:6] == b"\0\0"  # without end
    error = np.mean((np.stack(frames).astype(float) - smooth(30)) ** 2)
    assert 10 * np.log10(255**2 / error) > 35


@pytest.mark.parametrize(
    "name", ["a.gif", "a.npy"]
)  # not mp4: x264's code for small frames varies from run to run
def test_a_background_writer_writes_the_same_and_does_not_run_ahead(tmp_path, name):
    chunks = np.array_split(smooth(40), 10)
    with VideoWriter(tmp_path / name, 25) as video:
        for chunk in chunks:
            video.write(chunk)
    alone = (tmp_path / name).read_bytes()
    with BackgroundWriter(VideoWriter(tmp_path / name, 25)) as video:
        for chunk in chunks:
            video.write(chunk)
            assert video.queue.qsize() <= 2
    assert (tmp_path / name).read_bytes() == alone and video.seconds > 0


def test_errors_of_the_background_come_forward_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="are"):
        with BackgroundWriter(VideoWriter(tmp_path / "a.mp4", 25)) as video:
            video.write(smooth(2))
            for _ in range(
                20
            ):  # more than it could hold: it does not wait for a thread that has ended
                video.write(smooth(2, size=32))
    with pytest.raises(UserError, match="no frames"):
        with BackgroundWriter(VideoWriter(tmp_path / "a.mp4", 25)):
            pass
    with pytest.raises(KeyboardInterrupt):
        with BackgroundWriter(VideoWriter(tmp_path / "a.mp4", 25)) as video:
            video.write(smooth(2))
            raise KeyboardInterrupt
    assert not video.thread.is_alive() and list(tmp_path.iterdir()) == []


def test_encoding_overlaps_rendering(tmp_path):
    """Slow writes and slow renders, one second each in turn, take not much more than one second."""
    video = VideoWriter(tmp_path / "a.npy", 25)
    write, started = video.write, time.perf_counter()
    video.write = lambda frames: (time.sleep(0.05), write(frames))
    with BackgroundWriter(video) as background:
        for _ in range(20):
            time.sleep(0.05)
            background.write(smooth(1))
    assert background.seconds > 0.95 and time.perf_counter() - started < 1.7


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files does what a full disk does: a write fails, here midway or at the
    end of a file.
    """
    program = """
import resource, signal
import numpy as np
from mostgan.config import UserError
from mostgan.video_writer import BackgroundWriter, VideoWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = np.random.default_rng(0).integers(0, 256, (60, 96, 96, 3), dtype=np.uint8)
for name in ("a.mp4", "a.gif", "a.webp", "a.npy", "frames"):
    try:
        with BackgroundWriter(VideoWriter(name, 25)) as video:
            for frame in noise:
                video.write(frame[None])
        print("written")
    except UserError as error:
        print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and all(
        line.startswith("cannot write ") and "large" in line for line in lines
    )
    assert list(tmp_path.iterdir()) == []
