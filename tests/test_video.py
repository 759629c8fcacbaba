"""video.py: mp4, gif, webp, npy and PNG folders, read back by programs that did not write them:
every frame at its time and upright, true colours, the comment, and files that are whole or not
there.

FFmpeg (PyAV) reads what Pillow wrote. It cannot read an animated webp, but its single pictures.
"""

import io
import json
import os
import signal
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
from PIL import Image

from mostgan.config import UserError
from mostgan.files import is_unfinished
from mostgan.video import VideoWriter, film_strips, grid, write_png

ROOT = Path(__file__).parent.parent
NAMES = ["a.mp4", "a.gif", "a.webp", "a.npy", "frames"]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLORS = [RED, GREEN, BLUE, WHITE, (0, 0, 0), (128, 128, 128), (200, 30, 90)]


# ------------------------------------------------------------------------------- made and read


def solid(height, width, frames_each=2):
    """Frames of one colour, [7 · frames_each, height, width, 3]."""
    frames = np.empty((len(COLORS), frames_each, height, width, 3), np.uint8)
    frames[:] = np.array(COLORS)[:, None, None, None]
    return frames.reshape(-1, height, width, 3)


def smooth(n=8, size=64):
    """Smooth moving frames, [n, size, size, 3]. No two are alike."""
    phase = np.random.default_rng(0).uniform(0, 6, (3, 2))
    y, x = np.mgrid[:size, :size] / size
    channels = [
        np.sin(5 * x + a + np.arange(n)[:, None, None] / 3) * np.cos(4 * y + b) for a, b in phase
    ]
    return (np.stack(channels, -1) * 120 + 128).astype(np.uint8)


def noise(n=5, height=20, width=31):
    return np.random.default_rng(1).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def write(path, frames, fps=25, **options):
    with VideoWriter(path, fps, **options) as video:
        video.write(frames)
    return path


def decoded(file):
    """Every frame that FFmpeg finds in a file, with its start and its length in seconds."""
    exact = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    with av.open(file if isinstance(file, io.BytesIO) else str(file)) as container:
        for frame in container.decode(video=0):
            assert not frame.format.name.startswith("ya")
            image = frame.reformat(format="rgb24", interpolation=exact).to_ndarray()
            yield image, float(frame.time or 0), float((frame.duration or 0) * frame.time_base)


def webp_chunks(data):
    """[(kind, content)] of the chunks of a RIFF file's body."""
    chunks, at = [], 0
    while at < len(data):
        kind, size = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])[0]
        chunks.append((kind, data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return chunks


def webp(path):
    """A webp: its frames (FFmpeg decodes them one by one), their milliseconds, its other chunks."""
    data, frames, durations, others = path.read_bytes(), [], [], {}
    assert data[:4] + data[8:12] == b"RIFFWEBP"
    assert struct.unpack("<I", data[4:8])[0] == len(data) - 8
    for kind, chunk in webp_chunks(data[12:]):
        if kind not in (b"ANMF", b"VP8 "):
            others[kind] = chunk
            continue
        if kind == b"ANMF":
            durations.append(int.from_bytes(chunk[12:15], "little"))
            assert chunk[:6] == bytes(6)  # the frame begins at the picture's corner
            ((kind, chunk),) = webp_chunks(chunk[16:])  # one chunk: no ALPH beside it
            assert kind == b"VP8 "
        still = b"WEBPVP8 " + struct.pack("<I", len(chunk)) + chunk + bytes(len(chunk) % 2)
        still = io.BytesIO(b"RIFF" + struct.pack("<I", len(still)) + still)
        frames.append(next(decoded(still))[0])
    return frames, durations, others


def frames_in(path):
    """All frames of a file or folder, uint8 [H,W,3]."""
    if path.is_dir():
        return [next(decoded(file))[0] for file in sorted(path.iterdir())]
    if path.suffix == ".npy":
        return list(np.load(path))
    return webp(path)[0] if path.suffix == ".webp" else [image for image, *_ in decoded(path)]


def comment_in(path):
    """The comment of a file, as a user's other programs would find it."""
    if path.is_dir():
        with av.open(str(sorted(path.iterdir())[0])) as container:
            text = next(container.decode(video=0)).metadata
        # FFmpeg does not know the chunks for text that is not Latin-1 (iTXt).
        return text.get("Comment") or Image.open(sorted(path.iterdir())[0]).text["Comment"]
    if path.suffix == ".npy":
        return Path(f"{path}.json").read_text(encoding="utf-8").rstrip("\n")
    if path.suffix == ".webp":
        xmp = ElementTree.fromstring(webp(path)[2][b"XMP "])
        return xmp.find(".//{http://purl.org/dc/elements/1.1/}description").text
    if path.suffix == ".gif":
        data, text = path.read_bytes(), b""
        at = data.index(b"\x21\xfe") + 2
        while data[at]:
            text, at = text + data[at + 1 : at + 1 + data[at]], at + 1 + data[at]
        return text.decode()
    with av.open(str(path)) as container:
        return container.metadata["comment"]


def error_to(frames, expected):
    return np.abs(np.stack(frames).astype(int) - expected).max()


def psnr(frames, expected):
    return 10 * np.log10(255**2 / np.mean((np.stack(frames).astype(float) - expected) ** 2))


# ------------------------------------------------------------------------------- colours, frames


@pytest.mark.parametrize("count", [1, 2, 45])
@pytest.mark.parametrize("name", NAMES)
def test_every_frame_true_colors_and_the_comment(tmp_path, name, count):
    # Colours come in pairs of like frames, but for webp, where those would be one longer frame.
    frames = solid(48, 64, 1 if name == "a.webp" else 2)
    frames = np.concatenate([frames] * 7)[:count]
    comment = json.dumps({"of": "α < β & 'γ'", "long": "x" * 600})
    with VideoWriter(tmp_path / name, 25, comment=comment) as video:
        for chunk in np.array_split(frames, min(count, 4)):
            video.write(chunk)
    written = frames_in(tmp_path / name)
    assert len(written) == count
    assert error_to(written, frames) <= (0 if name in ("a.npy", "frames") else 2)
    assert comment_in(tmp_path / name) == comment


@pytest.mark.parametrize("name", NAMES)
def test_a_comment_of_other_alphabets(tmp_path, name):
    path = write(tmp_path / name, smooth(2), comment='Völker, 流れ, <b> & "c"')
    assert comment_in(path) == 'Völker, 流れ, <b> & "c"'


@pytest.mark.parametrize("name", ["a.npy", "frames"])
def test_lossless_formats_keep_every_bit(tmp_path, name):
    assert error_to(frames_in(write(tmp_path / name, noise())), noise()) == 0


@pytest.mark.parametrize("name, least", [("a.mp4", 38), ("a.webp", 35), ("a.gif", 24)])
def test_lossy_formats_come_close(tmp_path, name, least):
    channels_first = torch.from_numpy(smooth(20).transpose(0, 3, 1, 2).copy())
    written = np.stack(frames_in(write(tmp_path / name, channels_first)))
    assert psnr(written, smooth(20)) > least
    if name == "a.gif":  # 256 colours, but right on the average of a few pixels: dithered
        means = [f.reshape(-1, 8, 8, 8, 8, 3).mean(axis=(2, 4)) for f in (written, smooth(20))]
        assert psnr(*means) > 40
    greys = np.empty((3, 64, 256, 3), np.uint8)
    greys[:] = np.arange(256)[:, None]
    written = np.stack(frames_in(write(tmp_path / name, greys))).astype(float)
    assert abs(np.mean(written - greys)) < 0.2  # rounded neither always up nor always down
    assert error_to(written, greys) <= (16 if name == "a.gif" else 2)


def test_no_format_has_transparent_pixels(tmp_path):
    write(tmp_path / "frames", noise())
    assert Image.open(tmp_path / "frames" / "000000.png").mode == "RGB"
    frames = np.repeat(noise(1), 3, axis=0)  # where nothing moves, encoders like to be transparent
    frames[:, 0, 0] = [[0], [100], [200]]
    with Image.open(write(tmp_path / "a.gif", frames)) as image:
        for i in range(3):
            image.seek(i)
            assert "transparency" not in image.info
    flags = webp(write(tmp_path / "a.webp", frames))[2][b"VP8X"][0]
    assert flags & 0b0001_0000 == 0  # the alpha flag


@pytest.mark.parametrize("size", [(64, 64), (47, 33), (2, 2), (1, 3)])
@pytest.mark.parametrize("fps", [25, 29.97, 7.5])
def test_mp4_of_odd_sizes(tmp_path, size, fps):
    height, width = size
    path = write(tmp_path / "new" / "a.mp4", solid(height, width, 3), fps)
    written = np.stack(frames_in(path))
    assert written.shape == (21, height + height % 2, width + width % 2, 3)
    edges = (0, 0), (0, height % 2), (0, width % 2), (0, 0)
    assert error_to(written, np.pad(solid(height, width, 3), edges, mode="edge")) <= 2
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.pix_fmt) == (1, 1, "yuv420p")
        assert (context.color_primaries, context.color_trc) == (1, 1)  # all of them BT.709


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.npy", "frames"])
def test_other_formats_keep_an_odd_size(tmp_path, name):
    assert frames_in(write(tmp_path / name, smooth(2)[:, :33, :47]))[1].shape == (33, 47, 3)


def test_crf_is_the_quality_of_an_mp4(tmp_path):
    sizes = [
        write(tmp_path / f"{crf}.mp4", smooth(), crf=crf).stat().st_size for crf in (0, 17, 40)
    ]
    assert sizes[0] > 2 * sizes[1] and sizes[1] > 1.2 * sizes[2]


def test_an_mp4_can_be_played_while_it_loads(tmp_path):
    data = write(tmp_path / "a.mp4", smooth()).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("name", ["UP.MP4", "Up.Gif", "UP.WEBP", "UP.NPY"])
def test_suffixes_may_be_in_upper_case(tmp_path, name):
    write(tmp_path / name, smooth(3), comment="how it was made")
    (tmp_path / name).rename(tmp_path / name.lower())
    assert len(frames_in(tmp_path / name.lower())) == 3
    left = ["UP.NPY.json"] if name == "UP.NPY" else []
    assert sorted(path.name for path in tmp_path.glob("U*")) == left


# --------------------------------------------------------------------------------------- timing


@pytest.mark.parametrize("fps", [50, 30, 29.97, 25, 12.5, 7, 0.002])
def test_a_gif_keeps_time_frame_by_frame(tmp_path, fps):
    path = write(tmp_path / "a.gif", smooth(100, 16), fps)
    frames = list(decoded(path))
    assert len(frames) == 100
    for i, (_, start, length) in enumerate(frames):
        assert start == pytest.approx(i / fps, abs=0.0051)  # rounded to 1/100 s, without drift
        assert start + length == pytest.approx((i + 1) / fps, abs=0.0051)
    assert b"NETSCAPE2.0\x03\x01\0\0\0" in path.read_bytes()  # without end


@pytest.mark.parametrize("fps", [1000, 60, 30, 29.97, 25, 7, 0.002])
def test_a_webp_keeps_time_frame_by_frame(tmp_path, fps):
    frames, durations, others = webp(write(tmp_path / "a.webp", smooth(100, 16), fps))
    assert len(frames) == len(durations) == 100
    ends = np.cumsum(durations)
    assert np.abs(ends - np.arange(1, 101) * 1000 / fps).max() <= 0.51  # milliseconds
    assert others[b"ANIM"][4:6] == b"\0\0"  # without end


def test_a_webp_shows_like_frames_as_one_for_longer(tmp_path):
    frames = np.repeat(smooth(4), [1, 3, 1, 2], axis=0)
    written, durations, _ = webp(write(tmp_path / "a.webp", frames, 25))
    assert len(written) == 4 and durations == [40, 120, 40, 80]


@pytest.mark.parametrize("fps", [1000, 60, 29.97, 0.002])
def test_an_mp4_keeps_time_frame_by_frame(tmp_path, fps):
    path = write(tmp_path / "a.mp4", smooth(60, 16), fps)
    starts = [start for _, start, _ in decoded(path)]
    assert starts == pytest.approx([i / fps for i in range(60)], rel=1e-4)
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-4)
        assert container.duration == pytest.approx(60e6 / fps, rel=0.01)  # in microseconds


# ------------------------------------------------------------------------------ grids, pictures


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_is_upright_and_row_by_row(tmp_path, name):
    """Two rows of three: R G B above W black grey; and in each clip, a mark at the upper left."""
    clips = np.zeros((6, 2, 3, 32, 48), np.uint8)
    clips[:] = np.array(COLORS[:6])[:, None, :, None, None]
    clips[:, 1, 0] ^= 4  # the second frame differs a little
    clips[:, :, :, :8, :16] = 60
    written = np.stack(frames_in(write(tmp_path / name, grid(clips, rows=2, cols=3))))
    assert written.shape == (2, 64, 144, 3)
    for i, color in enumerate(COLORS[:6]):
        y, x = i // 3 * 32, i % 3 * 48
        assert error_to(written[0, y + 20, x + 32], color) <= 8
        assert error_to(written[0, y + 4, x + 8], 60) <= 8
        assert error_to(written[0, y + 4, x + 40], color) <= 8
        assert error_to(written[0, y + 28, x + 8], color) <= 8


def test_grid_of_tensors_and_arrays():
    clips = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 8, 10), dtype=np.uint8)
    sheet = grid(clips, rows=2, cols=3)
    assert sheet.shape == (2, 3, 16, 30)
    assert (sheet[1, :, 8:, 10:20] == clips[4, 1]).all() and (sheet[:, :, 8:, 20:] == 0).all()
    assert (grid(torch.from_numpy(clips), 2, 3).numpy() == sheet).all()
    with pytest.raises(ValueError, match="5 clips do not fit into 2 x 2"):
        grid(clips, 2, 2)


@pytest.mark.parametrize("length, chosen", [(9, [0, 3, 5, 8]), (2, [0, 1]), (1, [0])])
def test_film_strips(length, chosen):
    clips = torch.randint(256, (3, length, 3, 5, 7), dtype=torch.uint8)
    picture = film_strips(clips, 4)
    assert picture.shape == (3, 15, 7 * len(chosen))
    for row in range(3):
        for column, t in enumerate(chosen):
            part = picture[:, 5 * row : 5 * row + 5, 7 * column : 7 * column + 7]
            assert (part == clips[row, t]).all()


def test_write_png(tmp_path):
    picture = noise(1)[0]
    for form in (picture, torch.from_numpy(picture.transpose(2, 0, 1).copy())):
        write_png(tmp_path / "new" / "a.png", form)
        assert error_to(next(decoded(tmp_path / "new" / "a.png"))[:1], picture) == 0
        assert os.listdir(tmp_path / "new") == ["a.png"]


# ------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("name", NAMES)
def test_an_exception_leaves_what_was_there(tmp_path, name):
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            with VideoWriter(tmp_path / name, 25) as video:
                video.write(smooth())
                raise error
        assert not video.thread.is_alive() and list(tmp_path.iterdir()) == []
    write(tmp_path / name, smooth(4))
    with pytest.raises(ValueError, match="are"):
        with VideoWriter(tmp_path / name, 25) as video:
            video.write(smooth(2))
            video.write(smooth(2, size=32))  # of another size
    assert os.listdir(tmp_path) == [name] and len(frames_in(tmp_path / name)) == 4
    write(tmp_path / name, smooth(3))  # and a second one replaces the first
    assert os.listdir(tmp_path) == [name] and len(frames_in(tmp_path / name)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_nothing_has_the_name_before_all_is_written(tmp_path, name):
    """The older file is whole while the new one is written, and after the process is killed."""
    write(tmp_path / name, smooth(4))
    program = f"""
import numpy as np, time
from mostgan.video import VideoWriter
with VideoWriter({str(tmp_path / name)!r}, 25) as video:
    for i in range(200):
        video.write(np.random.default_rng(i).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8))
    print("half", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert error_to(frames_in(tmp_path / name), smooth(4)) <= 130
    assert len(frames_in(tmp_path / name)) == 4
    others = [other for other in os.listdir(tmp_path) if other != name]
    assert len(others) == 1 and is_unfinished(others[0])


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files does what a full disk does: a write fails, here midway or at the
    end of a file.
    """
    program = """
import resource, signal
import numpy as np
from mostgan.config import UserError
from mostgan.video import VideoWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
noise = np.random.default_rng(0).integers(0, 256, (60, 96, 96, 3), dtype=np.uint8)
for name in ("a.mp4", "a.gif", "a.webp", "a.npy", "frames"):
    try:
        with VideoWriter(name, 25) as video:
            for frame in noise:
                video.write(frame[None])
        print("written")
    except UserError as error:
        print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line[:13] for line in lines] == ["cannot write "] * 5
    assert all("File too large" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_an_npy_never_lacks_its_sidecar(tmp_path, monkeypatch):
    """Names appear in order, sidecar first; a sidecar that cannot be written leaves an older npy as
    it was.
    """
    named, replace = [], os.replace

    def watched(old, new):
        named.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", watched)
    path = write(tmp_path / "a.npy", smooth(2), comment="first")
    assert named == ["a.npy.json", "a.npy"] and comment_in(path) == "first"

    def full(old, new):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        write(path, smooth(3), comment="second")
    assert len(np.load(path)) == 2 and comment_in(path) == "first"
    assert len(os.listdir(tmp_path)) == 2
    (tmp_path / "b.npy.json").mkdir()
    with pytest.raises(UserError, match="b.npy.json is there already"):
        VideoWriter(tmp_path / "b.npy", 25, comment="third")


def test_what_cannot_be_written_is_said_before_the_first_frame(tmp_path):
    for name, fps in (("a.gif", 51), ("a.webp", 1001), ("a.mp4", 1001), ("A.GIF", 51)):
        with pytest.raises(UserError, match="at most"):
            VideoWriter(tmp_path / name, fps)
    with pytest.raises(UserError, match="at least 0.002"):
        VideoWriter(tmp_path / "a.gif", 0.001)
    with pytest.raises(UserError, match="crf is 52"):
        VideoWriter(tmp_path / "a.mp4", 25, crf=52)
    with pytest.raises(UserError, match=r"\.xyz"):
        VideoWriter(tmp_path / "a.xyz", 25)
    with pytest.raises(UserError, match="positive"):
        VideoWriter(tmp_path / "a.mp4", 0)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious.txt").write_text("keep me")
    (tmp_path / "movie.mp4").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("folder", "movie.mp4", "file"):
        with pytest.raises(UserError, match=f"{name} is there already"):
            VideoWriter(tmp_path / name, 25)
    with pytest.raises(UserError, match="no frames"):
        with VideoWriter(tmp_path / "a.mp4", 25) as video:
            video.write(smooth(2)[:0])
    with pytest.raises(UserError, match="cannot write .*(Not a directory|File exists)"):
        write(tmp_path / "file" / "a.mp4", smooth(1))
    for frames in (smooth(2).astype(float), smooth(2)[0], smooth(2)[..., :2]):
        with pytest.raises(ValueError, match="expected uint8"):
            write(tmp_path / "a.mp4", frames)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "movie.mp4"]


@pytest.mark.parametrize("name, largest", [("a.mp4", 16384), ("a.webp", 16383), ("a.gif", 65535)])
def test_the_largest_pictures(tmp_path, name, largest):
    for size in ((largest, 1), (2, largest)):
        VideoWriter(tmp_path / name, 25).check_size(*size)
        assert len(frames_in(write(tmp_path / name, np.zeros((1, *size, 3), np.uint8)))) == 1
        (tmp_path / name).unlink()
    for height, width in ((largest + 1, 1), (2, largest + 1)):
        message = f"at most {largest} pixels a side.* {height} high and {width} wide"
        with pytest.raises(UserError, match=message):
            write(tmp_path / name, np.zeros((1, height, width, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
    VideoWriter(tmp_path / "a.npy", 25).check_size(100_000, 100_000)


# ----------------------------------------------------------------------------------- the thread


@pytest.mark.parametrize("name", ["a.gif", "a.npy"])  # x264's code for small frames varies
def test_chunks_make_no_difference_and_the_queue_is_bounded(tmp_path, name):
    write(tmp_path / name, smooth(40))
    alone = (tmp_path / name).read_bytes()
    with VideoWriter(tmp_path / name, 25) as video:
        for chunk in np.array_split(smooth(40), 10):
            video.write(chunk)
            assert video.queue.qsize() <= 2
    assert (tmp_path / name).read_bytes() == alone and video.seconds > 0


def test_an_error_of_the_thread_ends_the_next_write(tmp_path):
    (tmp_path / "file").write_text("")
    written = 0
    with pytest.raises(UserError, match="cannot write"):
        with VideoWriter(tmp_path / "file" / "a.mp4", 25) as video:
            for _ in range(1000):  # it does not wait for a thread that has ended
                video.write(smooth(2))
                written += 1
                time.sleep(0.01)
    assert written < 1000 and not video.thread.is_alive()


def test_encoding_overlaps_rendering(tmp_path, monkeypatch):
    """Slow writes and slow renders, one second each in turn, take not much more than one second."""
    prepared = np.ascontiguousarray

    def slowly(image):
        time.sleep(0.05)
        return prepared(image)

    started = time.perf_counter()
    with VideoWriter(tmp_path / "a.npy", 25) as video:
        monkeypatch.setattr("mostgan.video.np.ascontiguousarray", slowly)
        for _ in range(20):
            time.sleep(0.05)
            video.write(smooth(1))
    assert video.seconds > 0.95 and time.perf_counter() - started < 1.7
