"""prepare.py, packing.py, sources.py: the command's options, times, crops, masks; damaged inputs, kills, checking."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from fractions import Fraction
from itertools import count
from pathlib import Path

import av
import numpy as np
import pytest

from mostgan import coding, packing, prepare, sources
from mostgan.config import UserError
from mostgan.data import Clips, open_data
from mostgan.packing import pack
from mostgan.prepare import check
from mostgan.sources import Framing, cadence, find_sources, square_around
from mostgan.video import png, read_frames
from mostgan.video_writer import VideoWriter

ROOT = Path(prepare.__file__).parents[1]


def moving(n, height=40, width=48, seed=0):
    y, x = np.mgrid[:height, :width] / 40
    a, b = np.random.default_rng(seed).uniform(0, 6, 2)
    wave = np.sin(4 * x + a + np.arange(n)[:, None, None] / 4) * np.cos(3 * y + b) * 60
    return np.stack([wave + 100, wave * 0.5 + 90, 190 - wave], -1).astype(np.uint8)


def levels(values, height=32, width=32):
    """Flat gray frames whose brightness tells them apart."""
    return np.stack([np.full((height, width, 3), value, np.uint8) for value in values])


def write_video(path, frames, fps=25):
    with VideoWriter(path, fps, crf=4) as video:
        video.write(frames)


def write_frames(folder, frames):
    folder.mkdir(parents=True)
    for i, image in enumerate(frames):
        (folder / f"{i:03d}.png").write_bytes(png(image))


def write_timed(path, frames, milliseconds, codec="libx264", **options):
    """A video whose frames appear at the given times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "4", **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for image, ms in zip(frames, milliseconds):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def command(capsys, *arguments):
    """Runs the command in this process: (exit status, stdout, stderr)."""
    argv, sys.argv = sys.argv, ["prepare", *map(str, arguments)]
    capsys.readouterr()
    try:
        prepare.main()
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = argv
    return status, *capsys.readouterr()


def gray(clips, clip=0):
    """The brightness of every frame of a clip."""
    return clips.frames(clip, range(clips.lengths[clip])).mean((1, 2, 3)).round().astype(int).tolist()


# times


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("fps", [25, 10, 50])
def test_frames_of_an_uneven_video_are_taken_by_their_times(tmp_path, suffix, fps):
    rng = np.random.default_rng(0)
    ms = np.cumsum(np.concatenate([[0], rng.choice([20, 40, 60, 100], 29)]))
    values = 20 + 7 * np.arange(30)
    write_timed(tmp_path / f"a.{suffix}", levels(values), ms)
    pack(find_sources(tmp_path / f"a.{suffix}", framing=Framing(fps=fps)), tmp_path / "dst", 32)
    clips = Clips(tmp_path / "dst")
    got = gray(clips)
    expected = [int(values[ms <= 1000 * k / fps].max()) for k in range(len(got))]
    assert np.abs(np.array(got) - expected).max() <= 2 and clips.fps == fps
    assert abs(len(got) - ms[-1] * fps / 1000) <= 1 + 0.1 * fps  # the last frame stays for at most 100 ms


def test_without_fps_an_uneven_video_gets_its_usual_rate_and_an_even_one_keeps_its_frames(tmp_path):
    ms = [0, 40, 80, 200, 240, 280, 320, 600, 640, 680]
    values = np.arange(10) * 20 + 30
    write_timed(tmp_path / "uneven.mp4", levels(values), ms)
    write_timed(tmp_path / "even.mkv", levels(values), [33, 67, 100, 133, 167, 200, 233, 267, 300, 333])  # rounded
    pack(find_sources(tmp_path), tmp_path / "out" / "dst", 32)
    clips = Clips(tmp_path / "out" / "dst")
    assert clips.names == ["even.mkv", "uneven.mp4"]
    assert np.abs(np.array(gray(clips)) - values).max() <= 2
    uneven = [values[np.array(ms) <= 40 * k].max() for k in range(18)]
    assert len(gray(clips, 1)) == 18 and np.abs(np.array(gray(clips, 1)) - uneven).max() <= 2
    assert clips.info["clips"][1]["fps"] == 25


def test_fps_halves_and_doubles_and_names_the_rate_of_frame_folders(tmp_path):
    values = np.arange(12) * 18 + 20
    write_video(tmp_path / "src" / "a.mp4", levels(values), fps=30)
    write_frames(tmp_path / "src" / "b", levels(values))
    for fps, expected in ((15, values[::2]), (60, values.repeat(2)), (30, values)):
        pack(find_sources(tmp_path / "src", framing=Framing(fps=fps)), tmp_path / "dst", 32, replace=True)
        clips = Clips(tmp_path / "dst")
        assert len(gray(clips)) == len(expected) and np.abs(np.array(gray(clips)) - expected).max() <= 2
        assert gray(clips, 1) == values.tolist() and clips.info["clips"][1]["fps"] == fps == clips.fps


def test_cadence_and_jumps(tmp_path):
    even = np.arange(100) / 29.97
    assert cadence(even, 29.97) == (29.97, True)
    assert cadence(even.round(3), 29.97) == (29.97, True)  # Matroska
    assert cadence(np.delete(even, [5, 30, 31, 60]), 28) == (29.97, False)
    pulldown = np.cumsum([0, *[2, 3] * 20]) / 60
    assert cadence(pulldown, 24.0) == (24.0, True)
    assert cadence(np.cumsum(np.full(50, 1e-6)) ** 2, 25)[0] <= 240
    write_timed(tmp_path / "a.mkv", levels(range(10, 90, 20)), [0, 40, 80, 500_000_000])
    with pytest.raises(UserError, match="timestamps jump"):
        pack(find_sources(tmp_path / "a.mkv"), tmp_path / "dst", 32)


# which part of the picture


@pytest.mark.parametrize("crop", ["none", "center", (5, 3, 20, 30)])
def test_crops(tmp_path, crop):
    frames = np.zeros((3, 40, 60, 3), np.uint8)
    frames[:, :, :10], frames[:, :, 50:], frames[:, 3:33, 5:25] = (255, 0, 0), (0, 0, 255), (9, 200, 77)
    write_frames(tmp_path / "a", frames)
    pack(find_sources(tmp_path / "a", framing=Framing(crop)), tmp_path / "dst", 24, lossless=True)
    image = Clips(tmp_path / "dst").frames(0, [1])[0].transpose(1, 2, 0)
    if crop == "none":  # both ends are there
        assert (image[-1, 0] == (255, 0, 0)).all() and (image[-1, -1] == (0, 0, 255)).all()
    elif crop == "center":  # columns 10 to 49 are
        assert (image[-1] == 0).all() and (image[12, 2] == (9, 200, 77)).all()
    else:
        assert (image == (9, 200, 77)).all()


def test_a_box_outside_the_picture_is_refused(tmp_path, capsys):
    write_frames(tmp_path / "a", moving(3))
    with pytest.raises(UserError, match="30,0,20,20 exceeds its frames of 48x40"):
        pack(find_sources(tmp_path / "a", framing=Framing((30, 0, 20, 20))), tmp_path / "dst", 16)
    for text in ("1,2,3", "a", "0,0,0,5", "-1,0,5,5"):
        status, _, error = command(capsys, tmp_path / "a", tmp_path / "dst", "--resolution", "16", f"--crop={text}")
        assert status == 2 and error.startswith(f"error: --crop {text}") and error.count("\n") == 1


@pytest.mark.parametrize("form", ["videos", "frames"])
def test_masks_give_one_square_that_holds_the_face_in_every_frame(tmp_path, form):
    frames, masks = moving(6, 64, 96), np.zeros((6, 64, 96, 3), np.uint8)
    for i in range(6):  # a face of 12x16 that moves by 4 pixels a frame: the box is 32x16, the square 32
        masks[i, 24:40, 20 + 4 * i : 32 + 4 * i] = 255
    write_frames(tmp_path / "src" / "youtube" / "000", frames)
    write_frames(tmp_path / "src" / "youtube" / "001", frames)
    if form == "videos":
        write_video(tmp_path / "masks" / "000_003.mp4", masks)
    else:
        write_frames(tmp_path / "masks" / "000_003", masks)
    index = pack(find_sources(tmp_path / "src", masks=tmp_path / "masks"), tmp_path / "dst", 32, lossless=True)
    clips = Clips(tmp_path / "dst")
    assert (clips.frames(0, range(6)).transpose(0, 2, 3, 1) == frames[:, 16:48, 20:52]).all()
    assert index["skipped"] == [{"name": "youtube/001", "problem": "unreadable (no mask)"}]
    with pytest.raises(UserError, match="no mask for any clip"):
        find_sources(tmp_path / "src" / "youtube" / "001", masks=tmp_path / "masks")
    write_frames(tmp_path / "black" / "000", masks * 0)
    with pytest.raises(UserError, match="black throughout"):
        pack(find_sources(tmp_path / "src" / "youtube", masks=tmp_path / "black"), tmp_path / "new", 32)
    write_frames(tmp_path / "small" / "000", masks[:, ::2, ::2])
    with pytest.raises(UserError, match="48x32 pixels, it of 96x64"):
        pack(find_sources(tmp_path / "src" / "youtube", masks=tmp_path / "small"), tmp_path / "new", 32)


def test_the_square_stays_in_the_picture():
    assert square_around((10, 10, 20, 10), 100, 100) == (10, 5, 20, 20)
    assert square_around((0, 0, 10, 30), 100, 100) == (0, 0, 30, 30)
    assert square_around((95, 90, 5, 10), 100, 100) == (90, 90, 10, 10)
    assert square_around((0, 20, 100, 10), 50, 100) == (25, 0, 50, 50)


@pytest.mark.parametrize("pix_fmt", ["gray", "gray16be", "rgba", "rgb48be", "pal8"])
def test_pictures_of_any_kind(tmp_path, pix_fmt):
    """Gray, 16-bit, transparent and palette PNGs of an odd size."""
    image = np.full((33, 47, 3), 60, np.uint8)
    image[10:20, 20:30] = 200
    (tmp_path / "a").mkdir()
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt, context.time_base = 47, 33, pix_fmt, Fraction(1, 25)
    if pix_fmt == "pal8":
        palette = np.zeros((256, 4), np.uint8)
        palette[[0, 1]] = (255, 60, 60, 60), (255, 200, 200, 200)  # alpha first
        frame = av.VideoFrame.from_ndarray(((image[..., 0] == 200).astype(np.uint8), palette), format="pal8")
    else:
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
    (packet,) = context.encode(frame)
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(bytes(packet))
    pack(find_sources(tmp_path / "a"), tmp_path / "dst", 33, lossless=True)
    got = Clips(tmp_path / "dst").frames(0, [0])[0].transpose(1, 2, 0)
    assert np.abs(got.astype(int) - image[:, 7:40]).max() <= 1


@pytest.mark.parametrize("codec, pix_fmt, suffix", [
    ("libx264", "gray", "mp4"), ("libx264", "yuv420p10le", "mkv"), ("libx265", "yuv420p10le", "mp4"),
    ("ffv1", "gray16le", "mkv"), ("mjpeg", "yuvj422p", "avi"), ("libvpx-vp9", "yuva420p", "webm"),
    ("mpeg4", "yuv420p", "avi"), ("ffv1", "yuva444p", "mkv"), ("prores_ks", "yuv422p10le", "mov"),
])  # fmt: skip
def test_videos_of_any_kind(tmp_path, codec, pix_fmt, suffix):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    frames = levels([40, 90, 140, 190], 50, 66)  # sides that are no multiples of a block
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 50, 66, pix_fmt
        stream.bit_rate = 4_000_000
        for image in frames:
            if (codec, pix_fmt) == ("libx264", "gray"):  # black is 16 in H.264, for gray too, unless it says otherwise
                image = (16 + image * (219 / 255)).round().astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    pack(find_sources(tmp_path / f"a.{suffix}"), tmp_path / "dst", 32)
    assert np.abs(np.array(gray(Clips(tmp_path / "dst"))) - [40, 90, 140, 190]).max() <= 2


# cutting, splitting, labels


def test_long_videos_are_cut(tmp_path):
    frames = moving(23, 32, 32)
    write_frames(tmp_path / "src" / "long", frames)
    write_frames(tmp_path / "src" / "short", frames[:5])
    index = pack(find_sources(tmp_path / "src"), tmp_path / "dst", 32, lossless=True, clip_length=7)
    clips = Clips(tmp_path / "dst")
    assert clips.names == ["long#0000", "long#0001", "long#0002", "short"] and clips.lengths.tolist() == [7, 7, 7, 5]
    assert index["skipped"] == [{"name": "long#0003", "problem": "shorter than 3 frames"}]
    assert [(clip["source"], clip["start"]) for clip in index["clips"][1:3]] == [("long", 7), ("long", 14)]
    assert (clips.frames(2, range(7)).transpose(0, 2, 3, 1) == frames[14:21]).all()
    with pytest.raises(UserError, match="too short"):
        pack(find_sources(tmp_path / "src"), tmp_path / "new", 32, clip_length=2)


def test_the_split_depends_on_names_alone(tmp_path, capsys):
    places = [prepare.place(f"clip{i}") for i in range(2000)]
    assert 0.08 < np.mean(np.array(places) < 0.1) < 0.12
    assert prepare.place("clip7") == pytest.approx(0.8504394577, abs=1e-9)  # the same on every machine, for ever
    for i in range(12):
        write_frames(tmp_path / "src" / f"clip{i}", moving(3, 16, 16, seed=i))
    parts = {}
    for part in ("train", "test"):
        arguments = ("--resolution", 16, "--split", part, "--test-share", 0.4)
        assert command(capsys, tmp_path / "src", tmp_path / part, *arguments)[0] == 0
        parts[part] = Clips(tmp_path / part).names
    assert sorted(parts["train"] + parts["test"]) == sorted(f"clip{i}" for i in range(12))
    assert parts["test"] == [f"clip{i}" for i in range(12) if prepare.place(f"clip{i}") < 0.4] != []
    status, _, error = command(capsys, tmp_path / "src", tmp_path / "x", "--resolution", 16, "--split", "test",
                               "--test-share", 1e-9)  # fmt: skip
    assert status == 2 and "no clip falls" in error


def test_labels_from_files_of_each_form(tmp_path, capsys):
    write_frames(tmp_path / "src" / "a", moving(3))
    write_video(tmp_path / "src" / "b.mp4", moving(3))
    files = {"l.json": json.dumps({"labels": [["a", 3], ["b.mp4", 1]]}), "l.csv": "a,3\n\nb,1\n", "l.txt": "a 3\nb 1\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert [source.label for source in find_sources(tmp_path / "src", tmp_path / name)] == [3, 1]
    for text in ("a,3\n", "a,x\nb,1\n", "a\n", "a,-1\nb,2\n"):
        (tmp_path / "bad.csv").write_text(text)
        status, _, error = command(capsys, tmp_path / "src", tmp_path / "dst", "--resolution", 16, "--labels",
                                   tmp_path / "bad.csv")  # fmt: skip
        assert status == 2 and "bad.csv" in error and error.count("\n") == 1
    with pytest.raises(UserError, match="cannot read"):
        find_sources(tmp_path / "src", "nowhere.csv")


# the command


def test_the_table_the_preview_and_strict(tmp_path, capsys):
    for i in range(20):
        write_frames(tmp_path / "src" / f"c{i:02d}", moving(5, 160, 160, seed=i))
    (tmp_path / "src" / "broken.mp4").write_bytes(b"junk")
    status, _, error = command(capsys, tmp_path / "src", tmp_path / "dst", "--resolution", 160, "--strict")
    assert status == 2 and error.strip().split("\n")[-1].startswith("error: broken.mp4: unreadable")
    status, out, _ = command(capsys, tmp_path / "src", tmp_path / "dst", "--resolution", 160)
    assert status == 0 and "20 clips, 100 frames of 160 pixels" in out and "5 to 5 frames" in out
    assert "0:00:04 in all" in out and "skipped   broken.mp4: unreadable" in out and "labels    none" in out
    sheet = next(read_frames(tmp_path / "dst" / "preview.png"))
    assert sheet.shape == (12 * 128, 3 * 128, 3) and sheet.std() > 20
    first = moving(5, 160, 160)
    assert abs(sheet[:128, 128:256].mean() - first[2].mean()) < 1


def test_bad_commands_get_one_line(tmp_path, capsys):
    write_frames(tmp_path / "a", moving(3))
    base = (tmp_path / "a", tmp_path / "dst")
    cases = [
        (), base, (*base, "--resolution", 2), (*base, "--resolution", 99999), (*base, "--resolution", 16, "--fps", 0),
        (*base, "--resolution", 16, "--clip-length", 2), (*base, "--resolution", 16, "--masks", tmp_path / "none"),
        (tmp_path / "none", tmp_path / "dst", "--resolution", 16), (tmp_path / "a", tmp_path / "a", "--resolution", 16),
        ("--check", tmp_path / "none"), ("--check", tmp_path / "a"),
        (*base, "--resolution", 16, "--masks", tmp_path / "a", "--crop", "none"),
    ]  # fmt: skip
    for arguments in cases:
        status, out, error = command(capsys, *arguments)
        assert status == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


# checking


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    for i in range(6):
        write_frames(folder / "src" / f"clip{i}", moving(8, 32, 32, seed=i))
    packing.SHARD_BYTES, before = 12_000, packing.SHARD_BYTES
    pack(find_sources(folder / "src"), folder / "dst", 32)
    packing.SHARD_BYTES = before
    return folder


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00001.bin", "offsets.npy", "index.json", "preview.png",
                                  "SHA256SUMS"])  # fmt: skip
def test_a_flipped_byte_and_a_truncated_file_are_found_and_named(packed, tmp_path, capsys, name):
    whole = contents(packed / "dst")
    assert check(packed / "dst") == [] and len(whole) == 6
    for damage in [*random.Random(0).sample(range(len(whole[name])), 5), "cut", "gone"]:
        dst = tmp_path / str(damage)
        dst.mkdir()
        for file, data in whole.items():
            (dst / file).write_bytes(data)
        data = bytearray(whole[name])
        if damage == "gone":
            (dst / name).unlink()
        elif damage == "cut":
            (dst / name).write_bytes(data[:-1])
        else:
            data[damage] ^= 1 << (damage % 8)
            (dst / name).write_bytes(data)
        status, out, error = command(capsys, "--check", dst)
        # A flip in the version's digit makes another version of it, which is as good a refusal.
        assert status == 2 and out == "" and (name in error or "version" in error), error
        if name.startswith("shard") and damage not in ("cut", "gone"):
            offsets = np.load(packed / "dst" / "offsets.npy")[::8]
            at = damage + (len(whole["shard-00000.bin"]) if name == "shard-00001.bin" else 0)
            assert f": clip{np.searchsorted(offsets, at, side='right') - 1}\n" in error


def test_check_says_so_when_all_is_well_and_sha256sum_agrees(packed, capsys):
    status, out, error = command(capsys, "--check", packed / "dst")
    assert status == 0 and error == "" and "6 clips, 48 frames" in out and "every byte" in out
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=packed / "dst", capture_output=True)
    assert done.returncode == 0, done


# interrupted and taken up again


def pack_until(sources, dst, stop_after, how, jobs=1, **arguments):
    """Packs until so many frames are coded, then fails as told."""
    real, count = coding.FrameEncoder.encode, [0]

    def encode(self, image):
        count[0] += 1
        if count[0] > stop_after:
            raise how
        return real(self, image)

    coding.FrameEncoder.encode = encode
    try:
        pack(sources, dst, 32, jobs=jobs, **arguments)
    finally:
        coding.FrameEncoder.encode = real
    return count[0]


@pytest.mark.parametrize("stop_after", [0, 3, 8, 20, 47])
def test_an_interrupted_packing_goes_on_and_ends_the_same(packed, tmp_path, monkeypatch, stop_after):
    monkeypatch.setattr(packing, "SHARD_BYTES", 12_000)
    listed = find_sources(packed / "src")
    with pytest.raises(KeyboardInterrupt):
        pack_until(listed, tmp_path / "dst", stop_after, KeyboardInterrupt())
    assert not (tmp_path / "dst" / "index.json").exists() and list(tmp_path.iterdir()) == [tmp_path / "dst"]
    with pytest.raises(UserError, match="not finished"):
        Clips(tmp_path / "dst")
    with pytest.raises(UserError, match="not finished"):
        open_data(tmp_path / "dst", "sky", 32)
    coded = pack_until(listed, tmp_path / "dst", 10**6, None)
    assert coded <= 48 - stop_after // 8 * 8 + 8  # what was done is not done again
    assert contents(tmp_path / "dst") == contents(packed / "dst")


@pytest.mark.parametrize("change", ["settings", "a clip", "a shard", "journal", "shards gone", "more clips"])
def test_what_changed_meanwhile_is_done_again(packed, tmp_path, monkeypatch, change):
    monkeypatch.setattr(packing, "SHARD_BYTES", 12_000)
    src, dst = tmp_path / "src", tmp_path / "dst"
    for i in range(6):
        write_frames(src / f"clip{i}", moving(8, 32, 32, seed=i))
    with pytest.raises(KeyboardInterrupt):
        pack_until(find_sources(src), dst, 36, KeyboardInterrupt())
    assert len((dst / "packing.jsonl").read_bytes().split(b"\n")) >= 4
    lossless = change == "settings"
    if change == "a clip":
        (src / "clip1" / "003.png").write_bytes(png(moving(1, 32, 32, seed=9)[0]))
    if change == "a shard":
        data = bytearray((dst / "shard-00000.bin").read_bytes())
        data[len(data) // 2] ^= 1
        (dst / "shard-00000.bin").write_bytes(data)
    if change == "journal":
        (dst / "packing.jsonl").write_bytes((dst / "packing.jsonl").read_bytes()[:-30])
    if change == "shards gone":
        (dst / "shard-00001.bin").unlink(missing_ok=True)
    if change == "more clips":
        write_frames(src / "clip0b", moving(8, 32, 32, seed=7))
    pack(find_sources(src), dst, 32, lossless=lossless)
    pack(find_sources(src), tmp_path / "fresh", 32, lossless=lossless)
    assert contents(dst) == contents(tmp_path / "fresh") and check(dst) == []


def long_video(path, frames=400, codec="libx264", uneven=False):
    """Alternates between stretches that JPEG keeps well and stretches of noise, which is stored exactly."""
    images = moving(frames, 64, 64)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    noisy = np.arange(frames) % 90 > 60
    images[noisy] = noise[noisy]
    gaps = np.random.default_rng(1).choice([20, 40, 60, 100] if uneven else [40], frames - 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_timed(path, images, np.cumsum([0, *gaps]), codec, g="15")


LONG = [("mp4", "libx264", None), ("mkv", "libx264", None), ("mp4", "libx264", 17), ("avi", "mpeg4", None),
        ("uneven.mkv", "libx264", 30), ("frames", None, None)]  # fmt: skip


@pytest.mark.parametrize("suffix, codec, fps", LONG)
@pytest.mark.parametrize("seekable", [True, False])
def test_one_long_video_goes_on_within_it(tmp_path, monkeypatch, suffix, codec, fps, seekable):
    if codec:
        long_video(tmp_path / "src" / f"long.{suffix}", 400, codec, uneven="uneven" in suffix)
    else:
        write_frames(tmp_path / "src" / "long", moving(400, 32, 32))
    listed = find_sources(tmp_path / "src", framing=Framing(fps=fps))
    whole = pack(listed, tmp_path / "whole", 32, clip_length=32)
    frames = sum(clip["frames"] for clip in whole["clips"])
    if not seekable:  # finds another frame than the one looked for
        numbers = count()
        monkeypatch.setattr(coding, "_crc_of_image", lambda image: next(numbers))
    for k, stop_after in enumerate((40, 70, 33)):  # finishes a clip, two clips, one clip
        with pytest.raises(KeyboardInterrupt):
            pack_until(listed, tmp_path / "dst", stop_after, KeyboardInterrupt(), clip_length=32)
        (notes,) = (tmp_path / "dst").glob("clip-*.jsonl")
        assert notes.read_bytes().count(b"\n") == (1, 3, 4)[k]
    assert pack_until(listed, tmp_path / "dst", 10**6, None, clip_length=32) == frames - 4 * 32
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole") and check(tmp_path / "dst") == []


@pytest.mark.parametrize("suffix, codec, fps", LONG)
@pytest.mark.parametrize("wrong", [None, "places", "frames"])
def test_one_long_video_by_several_threads_is_the_same(tmp_path, monkeypatch, suffix, codec, fps, wrong):
    monkeypatch.setattr(coding, "JOB_CLIPS", 2)
    monkeypatch.setattr(coding, "JOB_FRAMES", 60)
    if codec:
        long_video(tmp_path / "src" / f"long.{suffix}", 400, codec, uneven="uneven" in suffix)
    else:
        write_frames(tmp_path / "src" / "long", moving(400, 32, 32))
    (source,) = find_sources(tmp_path / "src", framing=Framing(fps=fps))
    real, code, names = source.places, coding.Coder.code, []
    found = real(64)
    assert len(found) >= 4 or suffix == "avi"  # which states no times: one job
    if wrong == "places":  # off by a frame from the third on
        source.places = lambda every: [p if k < 2 else q for k, (p, q) in enumerate(zip(real(every), real(every)[1:]))]
    if wrong == "frames":
        source.places = lambda every: [(n - 1, *p) for n, *p in real(every)]
    monkeypatch.setattr(coding.Coder, "code", lambda self, name, *a: (names.append(name), code(self, name, *a))[1])
    pack([source], tmp_path / "one", 32, clip_length=32, jobs=1)
    assert names == ["clip-0000000"]
    pack([source], tmp_path / "several", 32, clip_length=32, jobs=3)
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    assert any(name.endswith("-end") for name in names) == bool(wrong and found)
    if wrong is None and found:
        assert len(names) >= 2 + len(found)
        with pytest.raises(KeyboardInterrupt):
            pack_until([source], tmp_path / "dst", 250, KeyboardInterrupt(), jobs=3, clip_length=32)
        noted = sum(file.read_bytes().count(b"\n") for file in (tmp_path / "dst").glob("clip-*.jsonl"))
        names.clear()
        frames = sum(clip["frames"] for clip in json.loads((tmp_path / "one/index.json").read_text())["clips"])
        coded = pack_until([source], tmp_path / "dst", 10**6, None, jobs=2, clip_length=32)
        again = sum(name.endswith("again") for name in names)
        assert noted >= 3 and coded <= frames - 32 * noted + 64 * again
        assert contents(tmp_path / "dst") == contents(tmp_path / "one")


@pytest.mark.parametrize("damage", ["cut", "flipped", "zeros"])
def test_a_damaged_long_video_is_judged_the_same_by_several_threads(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(coding, "JOB_CLIPS", 2)
    monkeypatch.setattr(coding, "JOB_FRAMES", 60)
    write_frames(tmp_path / "src" / "other", moving(3))
    for suffix in ("mp4", "mkv", "avi"):
        path = tmp_path / "src" / f"long.{suffix}"
        long_video(path, 400, "mpeg4" if suffix == "avi" else "libx264")
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        if damage == "cut":
            del data[middle:]
        elif damage == "zeros":
            data[middle : middle + 20_000] = bytes(20_000)
        else:
            for k in random.Random(0).sample(range(len(data) // 4, len(data) * 3 // 4), 5):
                data[k] ^= 255
        path.write_bytes(data)
    for jobs in (1, 3):
        pack(find_sources(tmp_path / "src"), tmp_path / str(jobs), 32, clip_length=32, jobs=jobs)
    assert contents(tmp_path / "3") == contents(tmp_path / "1")


def test_going_on_in_a_long_video_does_not_decode_what_is_done(tmp_path, monkeypatch):
    """Where there are key frames; the last 5 seconds before the place are decoded again."""
    long_video(tmp_path / "long.mp4", 700)
    listed, decoded = find_sources(tmp_path / "long.mp4"), []
    with pytest.raises(KeyboardInterrupt):
        pack_until(listed, tmp_path / "dst", 650, KeyboardInterrupt(), clip_length=32)
    monkeypatch.setattr(sources, "to_rgb", lambda *a, real=sources.to_rgb: (decoded.append(1), real(*a))[1])
    pack(listed, tmp_path / "dst", 32, clip_length=32)
    assert len(decoded) == 700 - 640 + 1


@pytest.mark.parametrize("change", ["the video", "a part", "the notes", "a part gone", "settings", "broken"])
def test_a_part_of_a_long_video_that_changed_is_done_again(tmp_path, change):
    src, dst = tmp_path / "src" / "long.mp4", tmp_path / "dst"
    long_video(src, 200)
    with pytest.raises(KeyboardInterrupt):
        pack_until(find_sources(src), dst, 150, KeyboardInterrupt(), clip_length=32)
    (part,), (notes,) = dst.glob("clip-*.part"), dst.glob("clip-*.jsonl")
    if change == "the video":
        long_video(src, 190)
    if change == "a part":
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 1
        part.write_bytes(data)
    if change == "the notes":
        notes.write_bytes(notes.read_bytes()[:-5])
    if change == "a part gone":
        part.unlink()
    if change == "broken":
        src.write_bytes(src.read_bytes()[:-9000])
        write_frames(tmp_path / "src" / "other", moving(3))
        src = src.parent
    clip_length = 50 if change == "settings" else 32
    pack(find_sources(src), dst, 32, clip_length=clip_length)
    pack(find_sources(src), tmp_path / "fresh", 32, clip_length=clip_length)
    assert contents(dst) == contents(tmp_path / "fresh") and check(dst) == []


def test_an_older_dataset_is_replaced_only_when_asked(packed, tmp_path):
    listed = find_sources(packed / "src")
    pack(listed, tmp_path / "dst", 32)
    before = contents(tmp_path / "dst")
    with pytest.raises(UserError, match="exists"):
        pack(listed, tmp_path / "dst", 16)
    assert contents(tmp_path / "dst") == before
    pack(listed, tmp_path / "dst", 16, replace=True)
    assert Clips(tmp_path / "dst").resolution == 16 and check(tmp_path / "dst") == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="exists"):
        pack(listed, tmp_path / "mine", 16, replace=True)
    assert contents(tmp_path / "mine") == {"thesis.txt": b"precious"}


def test_strict_does_not_take_up_what_was_skipped(packed, tmp_path):
    for i in range(2):
        write_frames(tmp_path / "src" / f"clip{i}", moving(8, 32, 32, seed=i))
    (tmp_path / "src" / "broken.mp4").write_bytes(b"junk")
    with pytest.raises(KeyboardInterrupt):
        pack_until(find_sources(tmp_path / "src"), tmp_path / "dst", 10, KeyboardInterrupt())
    with pytest.raises(UserError, match=r"broken\.mp4"):
        pack(find_sources(tmp_path / "src"), tmp_path / "dst", 32, strict=True)
    (tmp_path / "src" / "broken.mp4").unlink()
    assert len(pack(find_sources(tmp_path / "src"), tmp_path / "dst", 32, strict=True)["clips"]) == 2


def test_two_at_once_do_not_mix(packed, tmp_path):
    (tmp_path / "dst").mkdir()
    with open(tmp_path / "dst" / "packing.jsonl", "w") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            pack(find_sources(packed / "src"), tmp_path / "dst", 32)
    pack(find_sources(packed / "src"), tmp_path / "dst", 32)


def test_a_full_disk_is_one_line_and_is_gone_on_with(packed, tmp_path, capsys):
    """A limit on the size of a file stands in for the disk: that, too, fails in the midst of a write."""
    half = sum(len(data) for name, data in contents(packed / "dst").items() if name.startswith("shard")) // 2
    script = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({half}, {half})); "
        "from mostgan import prepare; prepare.main()"
    )
    arguments = [str(packed / "src"), str(tmp_path / "dst"), "--resolution", "32"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 2 and last.startswith("error: cannot write") and "Traceback" not in done.stderr
    assert "File too large" in last and not (tmp_path / "dst" / "index.json").exists()
    status, _, error = command(capsys, *arguments)
    assert status == 0 and "going on after" in error and check(tmp_path / "dst") == []
    command(capsys, arguments[0], tmp_path / "fresh", *arguments[2:])
    assert contents(tmp_path / "dst") == contents(tmp_path / "fresh")


def test_kills_at_random_moments(packed, tmp_path):
    """Three here; bench/packing.py does twenty on larger data."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "mostgan.prepare", str(packed / "src"), str(tmp_path / "dst"), "--resolution", "32"]
    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(run, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() < begun + 60 and not (tmp_path / "dst").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 or "exists already" in done.stderr, done.stderr
    assert check(tmp_path / "dst") == [] and list(tmp_path.iterdir()) == [tmp_path / "dst"]
    assert (tmp_path / "dst" / "shard-00000.bin").read_bytes() == b"".join(
        data for name, data in sorted(contents(packed / "dst").items()) if name.startswith("shard")
    )


# damaged and hostile inputs


def damaged_files(folder, count=30):
    """Videos and pictures, truncated, with bytes flipped, misnamed."""
    rng = random.Random(0)
    whole = folder / "whole"
    write_video(whole / "v.mp4", moving(12))
    write_video(whole / "v.gif", moving(6))
    write_timed(whole / "v.mkv", moving(12), range(0, 480, 40))
    data = {file.suffix: file.read_bytes() for file in sorted(whole.iterdir())}
    src = folder / "src"
    src.mkdir()
    for i in range(count):
        suffix = rng.choice(sorted(data))
        broken = bytearray(data[suffix])
        if i % 2:
            del broken[rng.randrange(1, len(broken)) :]
        else:
            for _ in range(rng.choice([1, 10, 100])):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
        (src / f"{i:02d}{suffix}").write_bytes(broken)
    for name, content in {"zero.mp4": b"", "text.mp4": b"I am text\n" * 99, "wrong.png": data[".mp4"],
                          "wrong.avi": data[".mp4"], "z.zip": b"PK\3\4" + bytes(99)}.items():  # fmt: skip
        (src / name).write_bytes(content)
    (src / "dangling.mp4").symlink_to("nowhere")
    (src / "circle.mp4").symlink_to(".")
    os.mkfifo(src / "pipe.mp4")
    picture = png(moving(1)[0])
    (src / "frames").mkdir()
    for i in range(5):
        (src / "frames" / f"{i}.png").write_bytes(picture[: len(picture) // 2] if i == 3 else picture)
    write_video(src / "good.mp4", moving(9))
    return src


def test_damaged_inputs_are_named_and_skipped(tmp_path, capfd):
    src = damaged_files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    index = pack(find_sources(src), tmp_path / "dst", 32)
    packed, skipped = {clip["name"] for clip in index["clips"]}, {entry["name"] for entry in index["skipped"]}
    assert "good.mp4" in packed and {"zero.mp4", "text.mp4", "dangling.mp4", "z.zip"} <= skipped
    assert not packed & skipped and len(packed | skipped) == len(find_sources(src))
    printed = capfd.readouterr().err
    assert all(f"skipped {name}: " in printed for name in skipped) and "Traceback" not in printed
    assert check(tmp_path / "dst") == []
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "dst" not in [path, *path.parents]] == before


def hostile_zip(path, kind):
    picture = png(moving(1)[0])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"good/{i}.png", picture)
            if kind == "dots":
                archive.writestr(f"../../evil/{i}.png", picture)
            if kind == "absolute":
                archive.writestr(f"/tmp/evil/{i}.png", picture)
            if kind == "windows":
                archive.writestr(f"C:\\evil\\{i}.png", picture)
            if kind == "bomb":
                archive.writestr(f"bomb/{i}.png", bytes(40 << 20))
    if kind == "flipped":
        data = bytearray(path.read_bytes())
        data[60] ^= 255  # within the first picture
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["dots", "absolute", "windows", "bomb", "flipped"])
def test_hostile_zips(tmp_path, kind):
    (tmp_path / "in").mkdir()
    hostile_zip(tmp_path / "in" / "a.zip", kind)
    write_frames(tmp_path / "in" / "other", moving(3))
    before = sorted(tmp_path.rglob("*"))
    index = pack(find_sources(tmp_path / "in"), tmp_path / "dst", 16)
    problems = {entry["problem"] for entry in index["skipped"]}
    reason = {"bomb": "unpacks to more than 100 times", "flipped": "unreadable"}.get(kind, "leads out of the zip")
    assert problems and all(reason in problem for problem in problems)
    assert [clip["name"] for clip in index["clips"]] == (["other"] if kind == "flipped" else ["a.zip/good", "other"])
    assert [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "dst" not in [path, *path.parents]] == before


def test_a_damaged_label_table_in_a_zip_is_the_users_to_mend(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/0.png", png(moving(1)[0]))
        archive.writestr("dataset.json", '{"labels": [["a", 1]]}')
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(b'"a", 1', b'"a", 2'))  # the checksum no longer fits
    with pytest.raises(UserError, match=r"dataset\.json cannot be read"):
        find_sources(tmp_path / "a.zip")


def test_pictures_that_claim_to_be_huge_are_refused(tmp_path):
    data = bytearray(png(moving(1)[0]))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(data)
    with pytest.raises(UserError, match="1 unreadable"):
        pack(find_sources(tmp_path / "a"), tmp_path / "dst", 16)


def test_a_packed_folder_among_the_sources_is_no_source(tmp_path):
    write_frames(tmp_path / "src" / "a", moving(3))
    pack(find_sources(tmp_path / "src"), tmp_path / "src" / "packed", 16)
    assert [source.name for source in find_sources(tmp_path / "src")] == ["a"]
    (tmp_path / "src" / "begun").mkdir()
    (tmp_path / "src" / "begun" / sources.JOURNAL).write_text("")
    (tmp_path / "src" / "begun" / "shard-00000.bin").write_text("x")
    assert [source.name for source in find_sources(tmp_path / "src")] == ["a"]
