"""Videos in: orientation, pixel shape, interlacing, colours, times, kinds of files, damage."""

import io
import shutil
import subprocess
from fractions import Fraction

import av
import made_clips as made
import numpy as np
import pytest
from made_clips import numbered, numbers, write_video
from PIL import Image

from mostgan.config import UserError

# x' = a x + c y, y' = b x + d y for the matrix (a, b, c, d): the four turns, and the four mirrored
# ones.
MATRICES = [
    (1, 0, 0, 1),
    (0, 1, -1, 0),
    (-1, 0, 0, -1),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
]


# ------------------------------------------------------------------------------------ orientation


@pytest.fixture(autouse=True)
def short_jobs(monkeypatch):
    """Short films are cut into several jobs, as long ones are, so that their clips are sought."""
    monkeypatch.setattr("mostgan.prepare.clips.JOB_FRAMES", 1)


def turned(image, a, b, c, d):
    """The independent answer: every pixel of [H, W, 3] put where the matrix says."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    out = np.zeros((down.max() + 1, right.max() + 1, 3), np.uint8)
    out[down, right] = image
    return out


def display_matrix(a, b, c, d):
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    return lambda stream: stream.set_display_matrix(values)


def by_ffmpeg(path, height, width):
    """The first frame as the ffmpeg program shows it, gray [H, W], or None without the program."""
    if not shutil.which("ffmpeg"):
        return None
    arguments = ["-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    done = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", path, *arguments], capture_output=True, check=True
    )
    return np.frombuffer(done.stdout, np.uint8).reshape(height, width)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_all_eight_orientations_of_a_display_matrix(tmp_path, suffix):
    image = made.quadrants()
    matrices = MATRICES if suffix != ".mkv" else MATRICES[1:4]  # Matroska stores turns alone
    for k, matrix in enumerate(matrices):
        path = tmp_path / "src" / f"{k}{suffix}"
        write_video(path, [image] * 3, stream=display_matrix(*matrix))
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32, crop="none")
    for k, matrix in enumerate(matrices):
        upright = turned(image, *matrix)
        expected = made.corners(upright.transpose(2, 0, 1))
        assert np.abs(np.subtract(made.corners(clips.frames(k, [1])[0]), expected)).max() <= 3, (
            matrix
        )
        reference = (
            by_ffmpeg(tmp_path / "src" / f"{k}{suffix}", *upright.shape[:2])
            if suffix != ".mkv"
            else None
        )
        if reference is not None:
            assert np.abs(np.subtract(made.corners(reference[None]), expected)).max() <= 3, matrix


def test_crops_count_in_the_upright_picture(tmp_path):
    """A tall film that is stored lying: the square is cut from the middle of its height, and boxes
    count from its top."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, :16], image[:, 16:48], image[:, 48:] = 60, 120, 180
    # Left becomes top.
    write_video(tmp_path / "a.mp4", [image] * 3, stream=display_matrix(0, 1, -1, 0))
    _, clips = made.pack(tmp_path / "a.mp4", tmp_path / "center", 32)
    assert np.abs(clips.frames(0, [0])[0, 0, 2:-2].astype(int) - 120).max() <= 3
    _, clips = made.pack(tmp_path / "a.mp4", tmp_path / "box", 16, crop=(8, 0, 16, 16))
    assert np.abs(clips.frames(0, [0])[0, 0, :-2].astype(int) - 60).max() <= 3


# ----------------------------------------------------- shape of pixels, interlacing, HDR, colours


def aspect(value):
    return lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", Fraction(value))


def test_a_circle_stays_a_circle(tmp_path):
    kinds = {
        "wide.mp4": ("4/3", "libx264", 48, 64),
        "narrow.mkv": ("8/9", "libx264", 48, 64),
        "very wide.mov": ("2/1", "libx264", 64, 40),
        "tall.mp4": ("1/2", "libx264", 48, 96),
        "dvd.mpg": ("4/3", "mpeg2video", 48, 64),
        "broadcast.ts": ("4/3", "mpeg2video", 48, 64),
        "old.avi": ("16/11", "mpeg4", 48, 64),
        "new.mp4": ("4/3", "libx265", 48, 64),
    }
    for name, (ratio, codec, height, width) in kinds.items():
        image = made.disc(height, width, float(Fraction(ratio)))
        write_video(tmp_path / "src" / name, [image] * 4, codec=codec, stream=aspect(ratio))
    lying = made.disc(48, 64, 4 / 3)

    def both(stream):
        aspect("4/3")(stream)
        display_matrix(0, 1, -1, 0)(stream)

    write_video(tmp_path / "src" / "turned.mp4", [lying] * 4, stream=both)
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 96)
    assert len(clips) == 9
    for k, name in enumerate(clips.names):
        assert 0.94 < made.roundness(clips.frames(k, [1])[0]) < 1.06, name


@pytest.mark.parametrize("first", ["tff", "bff"])
@pytest.mark.parametrize(
    "name, codec", [("a.ts", "mpeg2video"), ("a.mkv", "libx264"), ("a.mpg", "mpeg2video")]
)
def test_interlaced_video_is_deinterlaced(tmp_path, first, name, codec):
    """A bar that moves by 4 pixels a field: in every packed frame it stands at one place on all
    lines."""

    def field(moment):
        lines = np.full((64, 64, 3), 40, np.uint8)
        lines[:, 4 + 4 * moment : 12 + 4 * moment] = 200
        return lines

    frames = np.stack([field(2 * k) for k in range(6)])
    later = 1 if first == "tff" else 0
    frames[:, later::2] = np.stack([field(2 * k + 1) for k in range(6)])[:, later::2]
    options = (
        {"flags": "+ilme+ildct"}
        if codec == "mpeg2video"
        else {"x264-params": f"{first}=1:interlaced=1"}
    )
    write_video(tmp_path / name, frames, codec=codec, options=options, graph=f"setfield={first}")
    _, clips = made.pack(tmp_path / name, tmp_path / "dst", 64)
    assert clips.lengths[0] == 6 and clips.fps == 25
    for k, image in enumerate(clips.frames(0, range(1, 5))[:, 0].astype(float), 1):
        place = ((image - 40).clip(0) * np.arange(64)).sum(1) / (image - 40).clip(0).sum(1)
        assert place[4:-4].std() < 0.8 and abs(place.mean() - (7.5 + 8 * k)) < 3, (k, place)


@pytest.mark.parametrize("transfer, number", [("smpte2084", 16), ("arib-std-b67", 18)])
def test_hdr_is_tone_mapped_or_named(tmp_path, transfer, number):
    """The gray of white paper (203 cd/m²: PQ 58%, HLG 75%) is darker than a display shows white, if
    nothing is done."""
    paper = {16: 148, 18: 191}[number]
    grays = [0, 40, 80, paper, 220]

    def tags(stream):
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = (
            9,
            number,
            9,
            1,
        )

    parameters = f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    write_video(
        tmp_path / "src" / "hdr.mp4",
        made.flat(grays),
        codec="libx265",
        pix_fmt="yuv420p10le",
        stream=tags,
        options={"x265-params": parameters},
    )
    write_video(
        tmp_path / "src" / "plain.mkv", made.flat(grays), codec="libx265", pix_fmt="yuv420p10le"
    )
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    images = clips.frames(0, range(5)).astype(int)
    assert np.ptp(images, axis=1).max() <= 4  # gray stays gray
    shown = images.mean((1, 2, 3))
    assert (np.diff(shown) > 5).all()
    assert shown[3] > paper + 20 or made.notes_on(index, "hdr.mp4", "hdr")
    assert np.abs(made.levels(clips, 1) - grays).max() <= 2 and not made.notes_on(
        index, "plain.mkv"
    )


COLOURS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
    (128, 128, 128),
    (200, 30, 90),
]
SPACES = {"ITU601": 5, "ITU709": 1, "BT2020": 9}


def write_colours(path, pix_fmt, matrix, full_range=False, tagged=True, height=48):
    """The colours in YUV of a known matrix and range, written with or without saying which."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "1"})
        video.height, video.width, video.pix_fmt = height, 64, pix_fmt
        if tagged:
            video.codec_context.colorspace = SPACES[matrix]
        if full_range:
            video.codec_context.color_range = 2
        for colour in COLOURS:
            frame = av.VideoFrame.from_ndarray(
                np.full((height, 64, 3), colour, np.uint8), format="rgb24"
            )
            frame = frame.reformat(
                format=pix_fmt, dst_colorspace=matrix, dst_color_range=2 if full_range else 1
            )
            frame.colorspace = SPACES[matrix] if tagged else 2
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


def test_colours_are_read_with_the_matrix_and_the_range_of_the_file(tmp_path):
    (tmp_path / "src").mkdir()
    for matrix in ("ITU601", "ITU709"):
        for pix_fmt in ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le"):
            write_colours(tmp_path / "src" / f"{matrix}-{pix_fmt}.mp4", pix_fmt, matrix)
        write_colours(tmp_path / "src" / f"{matrix}-full.mp4", "yuv420p", matrix, full_range=True)
    write_colours(tmp_path / "src" / "untagged-small.mp4", "yuv420p", "ITU601", tagged=False)
    write_colours(
        tmp_path / "src" / "untagged-high-definition.mp4",
        "yuv420p",
        "ITU709",
        tagged=False,
        height=720,
    )
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert len(clips) == 12
    for k, name in enumerate(clips.names):
        shown = clips.frames(k, range(len(COLOURS)))[:, :, 8, 8].astype(int)
        assert np.abs(shown - COLOURS).max() <= 3, name


def test_what_has_the_right_size_is_untouched_and_scaling_is_smooth_and_centered(tmp_path):
    exact = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    write_video(tmp_path / "src" / "exact.mkv", exact, codec="ffv1", pix_fmt="bgr0")
    noise = np.random.default_rng(0).normal(128, 40, (3, 128, 128, 3)).clip(0, 255).astype(np.uint8)
    write_video(tmp_path / "src" / "noise.mkv", noise, codec="ffv1", pix_fmt="bgr0")
    ramp = np.broadcast_to(
        np.arange(0, 256, 2, dtype=np.uint8)[None, None, :, None], (3, 128, 128, 3)
    )
    write_video(tmp_path / "src" / "ramp.mkv", ramp, codec="ffv1", pix_fmt="bgr0")
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    assert (clips.frames(0, range(3)) == exact.transpose(0, 3, 1, 2)).all()
    assert clips.frames(1, [0]).std() < 0.4 * noise.std()  # without a filter about 0.7
    columns = clips.frames(2, [0])[0, 1, 16].astype(int)
    # The mean of four columns each.
    assert np.abs(columns[2:-2] - (np.arange(32) * 8 + 3)[2:-2]).max() <= 1


# ------------------------------------------------------------------------------------------- time


def left_out(n, share=0.2, seed=0):
    """Numbers 0 … n - 1 without some of them; the first and the last are there."""
    keep = np.random.default_rng(seed).random(n) > share
    keep[[0, 1, n - 1]] = True
    return np.flatnonzero(keep)


RATES = [Fraction(24000, 1001), 24, 25, Fraction(30000, 1001), 30, 50, Fraction(60000, 1001), 60]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """Matroska files, whose times are whole milliseconds, at many rates with frames left out."""
    folder, kept = tmp_path_factory.mktemp("rounded"), left_out(150)
    for k, rate in enumerate(RATES):
        times = [Fraction(round(1000 * n / rate), 1000) for n in kept.tolist()]
        write_video(folder / f"{k}.mkv", numbered(50, 16, 16)[kept % 50], rate, times)
    return folder, kept


def test_the_usual_rate_of_rounded_times_with_frames_left_out(rounded, tmp_path):
    folder, kept = rounded
    _, clips = made.pack(folder, tmp_path / "dst", 16)
    for k, rate in enumerate(RATES):
        assert clips.info["clips"]["fps"][k] == pytest.approx(float(rate), rel=1e-3)
        assert numbers(clips, k) == (kept[made.on_screen(kept, range(150))] % 50).tolist(), rate


@pytest.mark.parametrize("fps", [12.5, 30, 60])
def test_any_rate_can_be_asked_of_rounded_times(rounded, tmp_path, fps):
    folder, kept = rounded
    _, clips = made.pack(folder, tmp_path / "dst", 16, fps=fps)
    assert clips.fps == fps and set(clips.info["clips"]["fps"]) == {fps}
    for k, rate in enumerate(RATES):
        shown, duration = numbers(clips, k), 150 / float(rate)
        assert abs(len(shown) - duration * fps) <= 1, rate
        moments = np.arange(len(shown)) / fps
        early = kept[made.on_screen(kept / float(rate), moments - 0.0015)]
        late = kept[made.on_screen(kept / float(rate), moments + 0.0015)]
        assert all(n in (a % 50, b % 50) for a, n, b in zip(early, shown, late)), rate


UNEVEN = np.cumsum([0, *np.random.default_rng(0).choice([20, 40, 60, 100], 29)])


@pytest.mark.parametrize("fps", [25, 10, 50])
def test_frames_of_an_uneven_video_are_taken_by_their_times(tmp_path, fps):
    names = ["a.mkv", "b.mov", "c.mp4", "d.webm"]
    for name in names:
        codec = "libvpx" if name.endswith("webm") else "libx264"
        write_video(
            tmp_path / "src" / name,
            numbered(30),
            times=[Fraction(int(ms), 1000) for ms in UNEVEN],
            codec=codec,
        )
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32, fps=fps)
    assert clips.names == names
    for k in range(len(names)):
        shown = numbers(clips, k)
        assert shown == made.on_screen(UNEVEN / 1000, np.arange(len(shown)) / fps), names[k]
        # The last stays for at most 0.1 s.
        assert abs(len(shown) - UNEVEN[-1] * fps / 1000) <= 1 + 0.1 * fps


DECLARED = [
    ("a.mkv", "libx264", 25),
    ("b.mkv", "libx264", 1000),
    ("c.webm", "libvpx", 1000),
    ("d.webm", "libvpx", 25),
    ("e.flv", "flv", 25),
    ("f.avi", "mpeg4", 1000),
    ("g.mp4", "libx264", 1000),
    ("h.mov", "mjpeg", 100),
    ("i.mkv", "libx264", 5),
]


def test_a_declared_rate_that_the_frames_do_not_have(tmp_path):
    """Frames at 15/s in files that declare 25, 1000 (as browsers' recorders do), 100 and 5."""
    times = [Fraction(round(1000 * k / 15), 1000) for k in range(45)]
    for name, codec, rate in DECLARED:
        pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        write_video(tmp_path / "src" / name, numbered(45), rate, times, codec, pix_fmt)
    _, clips = made.pack(tmp_path / "src", tmp_path / "own", 16)
    assert clips.names == [name for name, _, _ in DECLARED]
    for k, name in enumerate(clips.names):
        assert clips.info["clips"]["fps"][k] == pytest.approx(15, rel=1e-3), name
        assert numbers(clips, k) == list(range(45)), name
    _, clips = made.pack(tmp_path / "src", tmp_path / "30", 16, fps=30)
    for k, name in enumerate(clips.names):
        assert abs(clips.lengths[k] - 90) <= 1, name
        assert numbers(clips, k)[:89] == np.arange(45).repeat(2)[:89].tolist(), name


def test_usual_rates_of_uneven_kinds(tmp_path):
    src, rng = tmp_path / "src", np.random.default_rng(0)
    jitter = (np.arange(250) * 1000 / 30 + rng.uniform(-3, 3, 250)).round().clip(0)
    kinds = {
        "jitter.mkv": (jitter / 1000, 30),
        "pause.mp4": (np.concatenate([np.arange(20) / 20, 4 + np.arange(20) / 20]), 20),
        "pulldown.mkv": (np.cumsum([0, *[2, 3] * 20]).round() / 60, 24),
        "one missing.mp4": (np.delete(np.arange(40) / 25, 17), 25),
        "slow.mp4": (np.arange(8) * 1.0, 1),  # a time-lapse of a frame a second
    }
    for name, (times, _) in kinds.items():
        frames = (
            numbered(len(times))
            if len(times) <= made.MOST_NUMBERS
            else made.flat(rng.integers(20, 230, len(times)))
        )
        write_video(src / name, frames, 25, [Fraction(round(1000 * time), 1000) for time in times])
    _, clips = made.pack(src, tmp_path / "dst", 16)
    for name, (times, rate) in kinds.items():
        k = clips.names.index(name)
        assert clips.info["clips"]["fps"][k] == pytest.approx(rate, rel=1e-3), name
        assert abs(clips.lengths[k] - (times[-1] * rate + 1)) <= 1, name
        if len(times) <= made.MOST_NUMBERS:
            moments = np.arange(clips.lengths[k]) / rate
            assert numbers(clips, k) == made.on_screen(times - 0.0011, moments), name


def test_films_that_do_not_begin_at_zero(tmp_path):
    """A late start, the end of a transport stream's 33 bits, an edit list, fragments, a cut stream
    without its first key."""
    src, milli = tmp_path / "src", Fraction(1, 1000)
    write_video(src / "a late.mkv", numbered(20), times=[1000 + 40 * k * milli for k in range(20)])
    ticks = [Fraction(2**33 - 10 * 3600 + 3600 * k, 90000) for k in range(20)]
    write_video(src / "b wrap.ts", numbered(20), times=ticks, base=Fraction(1, 90000))
    write_video(
        src / "c edited.mp4", numbered(20), times=[(40 * k - 200) * milli for k in range(20)]
    )
    write_video(
        src / "d fragments.mp4",
        numbered(20),
        container={"movflags": "frag_keyframe+empty_moov"},
        options={"g": "5"},
    )
    write_video(
        src / "e stream.ts", numbered(20), options={"g": "10", "sc_threshold": "0", "bf": "0"}
    )
    data, starts = (src / "e stream.ts").read_bytes(), []
    with av.open(str(src / "e stream.ts")) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    # The tables are sent again before the next key frame.
    (src / "e stream.ts").write_bytes(data[starts[3] :])
    _, clips = made.pack(src, tmp_path / "dst", 16)
    assert [name[0] for name in clips.names] == ["a", "b", "c", "d", "e"]
    assert numbers(clips, 0) == numbers(clips, 1) == numbers(clips, 3) == list(range(20))
    assert numbers(clips, 2) == list(range(5, 20))
    last = (made.levels(clips, 4)[-10:] - made.FIRST) / made.STEP
    # What comes before the first key frame is not judged.
    assert np.abs(last - range(10, 20)).max() < 0.45


def test_fps_halves_and_doubles_and_names_the_rate_of_folders_of_pictures(tmp_path):
    write_video(tmp_path / "src" / "a.mp4", numbered(12), 30)
    made.write_pictures(tmp_path / "src" / "b", numbered(12))
    for fps, expected in ((15, range(0, 12, 2)), (60, np.arange(12).repeat(2)), (30, range(12))):
        _, clips = made.pack(tmp_path / "src", tmp_path / str(fps), 32, fps=fps)
        assert numbers(clips, 0) == list(expected) and numbers(clips, 1) == list(range(12))
        assert clips.info["clips"]["fps"] == [fps, fps]


def test_times_that_jump_are_no_endless_clip(tmp_path):
    times = [Fraction(ms, 1000) for ms in (0, 40, 80, 120, 500_000_000)]
    write_video(tmp_path / "src" / "jump.mkv", numbered(5), times=times)
    write_video(tmp_path / "src" / "whole.mkv", numbered(5))
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert made.notes_on(index, "jump.mkv") and clips.names[-1].startswith("whole.mkv")
    assert clips.lengths.sum() < 200


# ----------------------------------------------------------------------------- kinds of video files

KINDS = [
    ("gray.mp4", "libx264", "gray"),
    ("ten bits.mkv", "libx264", "yuv420p10le"),
    ("all colour.mp4", "libx264", "yuv444p"),
    ("hevc.mp4", "libx265", "yuv420p10le"),
    ("mjpeg.avi", "mjpeg", "yuvj422p"),
    ("vp8.webm", "libvpx", "yuv420p"),
    ("vp9 alpha.webm", "libvpx-vp9", "yuva420p"),
    ("vp9.ivf", "libvpx-vp9", "yuv420p"),
    ("av1.mp4", "libsvtav1", "yuv420p"),
    ("divx.avi", "mpeg4", "yuv420p"),
    ("windows.wmv", "wmv2", "yuv420p"),
    ("alpha.mkv", "ffv1", "yuva444p"),
    ("sixteen bits.mkv", "ffv1", "gray16le"),
    ("prores.mov", "prores_ks", "yuv422p10le"),
    ("one.mpg", "mpeg1video", "yuv420p"),
    ("two.m2ts", "mpeg2video", "yuv420p"),
    ("rle.mov", "qtrle", "argb"),
    ("flash.flv", "flv", "yuv420p"),
    ("raw.h264", "libx264", "yuv420p"),
    ("raw.hevc", "libx265", "yuv420p"),
    ("raw.avi", "rawvideo", "bgr24"),
    ("phone.3gp", "mpeg4", "yuv420p"),
    ("UPPER.MP4", "libx264", "yuv420p"),
    ("huff.avi", "huffyuv", "yuv422p"),
    ("stream.nut", "libx264", "yuv420p"),
    ("no suffix", "libx264", "yuv420p"),
]


def write_kind(path, codec, pix_fmt, frames):
    """One of KINDS; a codec that this FFmpeg lacks raises ValueError."""
    if codec == "libx264" and pix_fmt == "gray":  # black is 16 in H.264, in gray pictures too
        frames = (16 + frames * (219 / 255)).round().astype(np.uint8)
    options = (
        {"speed": "8"}
        if "vp9" in codec
        else {"preset": "12", "crf": "10"}
        if codec == "libsvtav1"
        else {}
    )
    write_video(path, frames, codec=codec, pix_fmt=pix_fmt, options=options)


def test_videos_of_many_kinds(tmp_path):
    src, written = tmp_path / "src", []
    for name, codec, pix_fmt in KINDS:
        # Sides that are no multiples of a block.
        size = (64, 64) if codec == "libsvtav1" else (50, 66)
        try:
            if name == "no suffix":
                write_kind(src / "x.mp4", codec, pix_fmt, numbered(6, *size))
                (src / "x.mp4").rename(src / name)
            else:
                write_kind(src / name, codec, pix_fmt, numbered(6, *size))
        except (ValueError, av.FFmpegError):
            (src / name).unlink(missing_ok=True)
            continue
        written.append(name)
    write_y4m(src / "pipe.y4m", range(6))
    assert len(written) > 20
    index, clips = made.pack(src, tmp_path / "dst", 32)
    for name in [*written, "pipe.y4m"]:
        assert name in clips.names, (name, index["notes"])
        shown = numbers(clips, clips.names.index(name))
        assert shown == list(range(6)), name


def write_y4m(path, order, width=32, height=32):
    levels = [16 + round((made.FIRST + made.STEP * k) * 219 / 255) for k in order]
    frames = b"".join(
        b"FRAME\n" + bytes([y]) * (width * height) + bytes([128]) * (width * height // 2)
        for y in levels
    )
    path.write_bytes(f"YUV4MPEG2 W{width} H{height} F25:1 Ip A1:1 C420jpeg\n".encode() + frames)


def jpegs(frames, **options):
    for image in frames:
        data = io.BytesIO()
        Image.fromarray(image).save(data, "JPEG", quality=95, **options)
        yield data.getvalue()


def test_a_film_whose_size_changes_midway(tmp_path):
    """As recordings of video calls do."""
    packets = [*jpegs(numbered(10, 32, 48)[:5]), *jpegs(numbered(10, 64, 96)[5:])]
    made.write_packets(tmp_path / "a.mkv", packets, "mjpeg", (48, 32), [k / 25 for k in range(10)])
    _, clips = made.pack(tmp_path / "a.mkv", tmp_path / "dst", 32)
    assert numbers(clips) == list(range(10))


def test_sound_subtitles_and_a_cover_are_not_the_film(tmp_path):
    (tmp_path / "src").mkdir()
    with av.open(str(tmp_path / "src" / "a.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 320, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        film = container.add_stream("libx264", rate=25, options={"crf": "4"})
        film.width, film.height, film.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("aac", rate=44100)
        picture = av.VideoFrame.from_ndarray(np.full((320, 320, 3), 250, np.uint8), format="rgb24")
        container.mux(cover.encode(picture.reformat(format="yuvj420p")))
        for image in numbered(10):
            container.mux(film.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        silence = av.AudioFrame.from_ndarray(
            np.zeros((2, 1024), np.float32), format="fltp", layout="stereo"
        )
        silence.rate = 44100
        container.mux(sound.encode(silence))
        for stream in (cover, film, sound):
            container.mux(stream.encode(None))
    with av.open(str(tmp_path / "src" / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    assert clips.names == ["a.mp4"] and numbers(clips) == list(range(10))
    assert made.notes_on(index, "song.mp4")


@pytest.mark.parametrize("name, cut", [("whole.mkv", False), ("cut.mkv", True)])
def test_sound_that_is_longer_than_the_film_is_no_damage(tmp_path, name, cut):
    path = tmp_path / "src" / name
    path.parent.mkdir()
    with av.open(str(path), "w") as container:
        film = container.add_stream("libx264", rate=25, options={"crf": "4", "g": "5"})
        film.width, film.height, film.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=8000)
        for k in range(50 * 4):  # 4 seconds of sound, 2 of which have pictures
            if k % 2 == 0 and k < 100:
                image = made.flat([16 + 4 * (k // 2)])[0]
                container.mux(film.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            noise = np.random.default_rng(k).integers(-9999, 9999, (1, 160), dtype=np.int16)
            samples = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            samples.rate = 8000
            container.mux(sound.encode(samples))
        container.mux(film.encode(None))
    if cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    assert (index["clips"]["damaged"] != [0]) == cut
    assert numbers(clips)[:10] == list(range(10)) and (cut or clips.lengths[0] == 50)


def test_an_alpha_channel_is_laid_over_black(tmp_path):
    image = np.full((32, 32, 4), (200, 100, 40, 128), np.uint8)
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        video = container.add_stream("qtrle", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "argb"
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(image, format="rgba").reformat(format="argb")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    index, clips = made.pack(tmp_path / "a.mov", tmp_path / "dst", 32)
    assert np.abs(clips.frames(0, [1]).mean((0, 2, 3)) - (100, 50, 20)).max() <= 1.5
    assert made.notes_on(index, "alpha", "black")


def test_jpegs_one_after_the_other_are_a_film_and_one_of_another_name_is_none(tmp_path):
    jpegs = []
    for image in numbered(6):
        data = io.BytesIO()
        Image.fromarray(image).save(data, "JPEG", quality=95)
        jpegs.append(data.getvalue())
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.mjpeg").write_bytes(b"".join(jpegs))
    (tmp_path / "src" / "picture.part1").write_bytes(jpegs[0])
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    assert clips.names == ["a.mjpeg"] and numbers(clips) == list(range(6))
    assert made.notes_on(index, ".part1", "neither")


# --------------------------------------------------------------------------------------- long films

LONG = [
    ("a.mp4", "libx264", {"g": "20", "bf": "3"}, {}),
    ("b.mkv", "libx264", {"g": "25", "x264-params": "open-gop=1:bframes=3:b-adapt=0"}, {}),
    ("c.ts", "mpeg2video", {"g": "12", "bf": "2"}, {}),
    ("d.avi", "mpeg4", {"g": "20"}, {}),
    ("e.mp4", "libx264", {"g": "1000"}, {}),  # one key frame
    ("f.mp4", "libx264", {"g": "20"}, {"movflags": "frag_keyframe+empty_moov"}),
    ("g.h264", "libx264", {"g": "20"}, {}),
    ("h.mpg", "mpeg2video", {"g": "12", "bf": "2"}, {}),
    ("i.webm", "libvpx", {"g": "20"}, {}),
    ("j.mp4", "libx265", {"x265-params": "log-level=none:keyint=20:open-gop=1:bframes=4"}, {}),
    ("k.mkv", "libx264", {"g": "30", "x264-params": "intra-refresh=1:bframes=0"}, {}),
]


@pytest.fixture(scope="module")
def long_films(tmp_path_factory):
    """Films of 210 frames of 16 x 16; frame k is the number k % 50."""
    folder = tmp_path_factory.mktemp("long")
    frames = numbered(50, 16, 16)[np.arange(210) % 50]
    for name, codec, options, container in LONG:
        write_video(folder / name, frames, codec=codec, options=options, container=container)
    return folder


@pytest.mark.parametrize("fps", [None, 12.5])
def test_long_films_are_cut_without_a_seam(long_films, tmp_path, fps):
    """Whatever stretches the jobs are: clip k holds exactly the frames that follow those of clip k
    - 1."""
    index, clips = made.pack(long_films, tmp_path / "one", 16, clip_length=16, fps=fps)
    made.pack(long_films, tmp_path / "two", 16, clip_length=16, fps=fps, jobs=2)
    assert made.files_of(tmp_path / "one") == made.files_of(tmp_path / "two")
    table, step = index["clips"], 2 if fps else 1
    for name, _, _, _ in LONG:
        mine = [k for k, source in enumerate(table["source"]) if source == name]
        assert [table["start"][k] for k in mine] == [16 * i for i in range(len(mine))], name
        shown = sum((numbers(clips, k) for k in mine), [])
        expected = (np.arange(0, 210, step) % 50).tolist()
        rest = len(expected) % 16
        assert shown == expected[: len(expected) - (rest if rest < 3 else 0)], name
        assert not any(table["damaged"][k] for k in mine), name


# ----------------------------------------------------------------------------------------- damage


def packet_places(path):
    """(first byte, size) of every packet of the video, in the order of the file."""
    with av.open(str(path)) as container:
        return sorted(
            (packet.pos, packet.size) for packet in container.demux(video=0) if packet.size
        )


def smash(path, packet):
    """Overwrites the data of packet number `packet`; its container stays whole."""
    data = bytearray(path.read_bytes())
    place, size = packet_places(path)[packet]
    if path.suffix in (".mkv", ".webm"):
        place = data.index(bytes(packet_data(path, packet)), place)
    data[place : place + size] = b"\xff" * size
    path.write_bytes(data)


def packet_data(path, number):
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return sorted((packet.pos, bytes(packet)) for packet in packets)[number][1]


DAMAGED = [
    ("a.mp4", "libx264", "yuv420p", {"g": "10", "sc_threshold": "0", "bf": "0"}),
    ("b.mkv", "libx264", "yuv420p", {"g": "10", "sc_threshold": "0", "bf": "0"}),
    ("c.mkv", "ffv1", "yuv420p", {}),
    (
        "d.mp4",
        "libx265",
        "yuv420p",
        {"x265-params": "log-level=none:keyint=10:min-keyint=10:scenecut=0:bframes=0"},
    ),
    ("e.webm", "libvpx-vp9", "yuv420p", {"g": "10", "speed": "8", "lag-in-frames": "0"}),
    ("f.mov", "prores_ks", "yuv422p10le", {}),
]


@pytest.fixture(scope="module")
def smashed(tmp_path_factory):
    """Films of 50 frames with a key frame every 10; packet 23 is rubbish."""
    folder = tmp_path_factory.mktemp("smashed")
    for name, codec, pix_fmt, options in DAMAGED:
        write_video(
            folder / name, numbered(50, 64, 64), codec=codec, pix_fmt=pix_fmt, options=options
        )
        smash(folder / name, 23)
    return folder


def test_a_damaged_packet_costs_the_clips_that_it_touches_and_no_others(smashed, tmp_path):
    index, clips = made.pack(smashed, tmp_path / "dst", 32, clip_length=10)
    for name, _, _, _ in DAMAGED:
        mine = [k for k, source in enumerate(index["clips"]["source"]) if source == name]
        starts = [index["clips"]["start"][k] for k in mine]
        assert {0, 10, 30, 40} <= set(starts) <= {0, 10, 20, 30, 40}, name
        for k, start in zip(mine, starts):
            if start != 20:
                assert numbers(clips, k) == list(range(start, start + 10)), name
                assert not index["clips"]["damaged"][k], name
            else:
                assert numbers(clips, k)[:3] == [20, 21, 22] and index["clips"]["damaged"][k] > 0, (
                    name
                )
        told = made.notes_on(index, name)
        assert told and any(
            "0.8" in text or "0.9" in text or "00:00" in text
            for note in told
            for text in note["names"] + [note["why"] or ""]
        ), (name, told)


@pytest.mark.parametrize("name", [row[0] for row in DAMAGED])
def test_strict_stops_at_a_damaged_packet(smashed, tmp_path, name):
    with pytest.raises(UserError, match=name) as error:
        made.pack(smashed / name, tmp_path / "dst", 32, clip_length=10, strict=True)
    assert "\n" not in str(error.value) and not (tmp_path / "dst" / "index.json").exists()


def test_of_a_file_that_is_cut_off_what_is_there_is_used(tmp_path):
    src = tmp_path / "src"
    options = {"g": "10", "sc_threshold": "0"}
    kinds = {
        "a.mkv": {},
        "b.mp4": {"movflags": "faststart"},
        "c.mp4": {"movflags": "frag_keyframe+empty_moov"},
        "d.ts": {},
        "e.avi": {},
        "f.flv": {},
    }
    for name, container in kinds.items():
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        frames = numbered(50, 48, 48) // 2 + made.moving(50, 48, 48) // 2
        write_video(src / name, frames, codec=codec, options=options, container=container)
        (src / name).write_bytes((src / name).read_bytes()[: packet_places(src / name)[35][0]])
    write_video(src / "g.mp4", numbered(10))
    # Without its table nothing can be read.
    (src / "g.mp4").write_bytes((src / "g.mp4").read_bytes()[:-400])
    index, clips = made.pack(src, tmp_path / "dst", 16)
    for name in kinds:
        assert name in clips.names and 25 <= clips.lengths[clips.names.index(name)] <= 40, (
            name,
            index["notes"],
        )
    assert "g.mp4" not in clips.names and made.notes_on(index, "g.mp4")
    for name in ("a.mkv", "b.mp4", "e.avi"):  # these state how long they should be
        assert made.notes_on(index, name), name


def test_recordings_joined_end_to_end_are_told(tmp_path):
    write_video(tmp_path / "a.ts", numbered(50), options={"g": "10"})
    (tmp_path / "b.ts").write_bytes(2 * (tmp_path / "a.ts").read_bytes())
    index, clips = made.pack(tmp_path / "b.ts", tmp_path / "dst", 32)
    assert numbers(clips) == list(range(50)) and made.notes_on(index, "damaged", "go back")


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video"])
def test_a_recording_cut_at_its_start_begins_with_its_first_whole_frame(tmp_path, codec):
    """What hangs on frames that are missing is gray: it is not used, but counted."""
    options = {"g": "20", "bf": "0"}
    if codec == "libx265":
        options = {"x265-params": "log-level=none:keyint=20:bframes=0"}
    # (The encoder of HEVC spoils its memory where a side is no multiple of 16.)
    write_video(tmp_path / "whole.ts", made.moving(60, 48, 64), codec=codec, options=options)
    data = (tmp_path / "whole.ts").read_bytes()
    with av.open(str(tmp_path / "whole.ts")) as container:
        packets = [(p.pos, p.is_keyframe) for p in container.demux(video=0) if p.size]
    place, first = packets[25][0], next(k for k in range(26, 60) if packets[k][1])
    (tmp_path / "cut.ts").write_bytes(data[place + 50 :])
    _, whole = made.pack(tmp_path / "whole.ts", tmp_path / "dst-whole", 32)
    index, clips = made.pack(tmp_path / "cut.ts", tmp_path / "dst", 32)
    assert clips.lengths[0] == 60 - first
    found = clips.frames(0, range(60 - first))
    assert np.array_equal(found, whole.frames(0, range(first, 60)))
    assert codec == "mpeg2video" or index["clips"]["damaged"][0] > 0


def test_a_hole_in_a_film_does_not_shift_what_follows(tmp_path):
    """Fifteen packets are gone; the clips behind them are where they were."""
    write_video(
        tmp_path / "a.mkv", numbered(50, 64, 64), options={"g": "5", "sc_threshold": "0", "bf": "0"}
    )
    for packet in range(20, 35):
        smash(tmp_path / "a.mkv", packet)
    index, clips = made.pack(tmp_path / "a.mkv", tmp_path / "dst", 32, clip_length=10)
    starts = index["clips"]["start"]
    assert numbers(clips, starts.index(40)) == list(range(40, 50)) and numbers(clips, 1) == list(
        range(10, 20)
    )
    assert sum(index["clips"]["damaged"]) == 15


# ----------------------------------------------------------------------------- impossible numbers


def box(kind, content):
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def test_videos_that_claim_impossible_sizes_and_counts(tmp_path, capfd):
    """10⁹ frames, 100,000 x 100,000 pixels, JPEGs of 256 million pixels: in bounded time;
    `whole.mp4` beside them is packed."""
    src = tmp_path / "src"
    write_video(src / "whole.mp4", numbered(8))
    data = (src / "whole.mp4").read_bytes()
    at = data.index(b"stts") + 12  # one entry: count, duration
    (src / "count.mp4").write_bytes(data[:at] + (10**9).to_bytes(4, "big") + data[at + 4 :])
    at = data.index(b"stsz") + 12
    (src / "samples.mp4").write_bytes(data[:at] + (10**9).to_bytes(4, "big") + data[at + 4 :])
    at = data.index(b"avc1") + 28
    (src / "sides.mp4").write_bytes(data[:at] + (65500).to_bytes(2, "big") * 2 + data[at + 4 :])
    write_y4m(src / "huge.y4m", range(4))
    huge = (src / "huge.y4m").read_bytes().replace(b"W32 H32", b"W100000 H100000")
    (src / "huge.y4m").write_bytes(huge)
    write_video(src / "frames.avi", numbered(8), codec="mpeg4")
    data = bytearray((src / "frames.avi").read_bytes())
    at = data.index(b"avih") + 24
    data[at : at + 4] = (10**9).to_bytes(4, "little")
    (src / "frames.avi").write_bytes(data)
    (jpeg,) = jpegs(numbered(1))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg = jpeg[:at] + (16_000).to_bytes(2, "big") * 2 + jpeg[at + 4 :]
    made.write_packets(src / "jpegs.mkv", [jpeg] * 4, "mjpeg", (32, 32), [0, 0.1, 0.2, 0.3])
    with made.at_most(seconds=60, megabytes=1500):
        index, clips = made.pack(src, tmp_path / "dst", 32)
    assert numbers(clips, clips.names.index("whole.mp4")) == list(range(8))
    for name in ("huge.y4m", "jpegs.mkv"):
        assert name not in clips.names and made.notes_on(index, name)
    assert clips.lengths.max() <= 8 and "Traceback" not in capfd.readouterr().err


def test_metadata_that_is_not_utf8(tmp_path):
    write_video(tmp_path / "src" / "a.mp4", numbered(5))
    with av.open(str(tmp_path / "src" / "b.mkv"), "w") as container:
        container.metadata["title"] = "TITLE-TO-BREAK"
        video = container.add_stream("libx264", rate=25, options={"crf": "4"})
        video.metadata["handler_name"] = "STREAM-TO-BREAK"
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        for image in numbered(5):
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
    data = (tmp_path / "src" / "b.mkv").read_bytes()
    for text in (b"TITLE-TO-BREAK", b"STREAM-TO-BREAK"):
        data = data.replace(
            text,
            b"\xff\xfe\xc3(" + b"\xa0\xa1" * ((len(text) - 4) // 2) + b"\xff" * (len(text) % 2),
        )
    (tmp_path / "src" / "b.mkv").write_bytes(data)
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert clips.names == ["a.mp4", "b.mkv"] and numbers(clips, 1) == list(range(5))
