"""Pictures in: EXIF, formats, colours, animations, JPEGs kept as they are, bombs, damage."""

import io
import struct
import warnings
import zlib

import made_clips as made
import numpy as np
import pytest
from made_clips import moving, numbered, numbers, write_animation, write_pictures
from PIL import Image
from safetensors.numpy import load_file

from mostgan.config import UserError
from mostgan.prepare import pictures
from mostgan.video import VideoWriter

# ------------------------------------------------------------------------------------ orientation

# What each value of the EXIF tag 0x0112 asks a viewer to do with the stored picture (TIFF 6.0, tag
# Orientation).
UPRIGHT = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: lambda image: np.rot90(image, 1),
}


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_all_eight_orientations_of_exif(tmp_path, suffix):
    image = made.quadrants()
    for orientation in UPRIGHT:
        options = {"lossless": True} if suffix == ".webp" else {}
        write_pictures(
            tmp_path / "src" / str(orientation),
            [image] * 3,
            suffix,
            exif=exif(orientation),
            **options,
        )
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32, crop="none")
    for k, (orientation, turn) in enumerate(UPRIGHT.items()):
        expected = made.corners(turn(image).transpose(2, 0, 1))
        assert np.abs(np.subtract(made.corners(clips.frames(k, [1])[0]), expected)).max() <= 2, (
            orientation
        )


def test_jpegs_of_the_right_size_are_turned_too(tmp_path):
    image = made.quadrants(160, 160)
    for orientation in UPRIGHT:
        write_pictures(
            tmp_path / "src" / str(orientation),
            [image] * 3,
            ".jpg",
            exif=exif(orientation),
            quality=95,
        )
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 160)
    for k, (orientation, turn) in enumerate(UPRIGHT.items()):
        expected = made.corners(turn(image).transpose(2, 0, 1))
        assert np.abs(np.subtract(made.corners(clips.frames(k, [1])[0]), expected)).max() <= 2, (
            orientation
        )


def test_exif_that_is_rubbish_is_no_reason_to_stop(tmp_path):
    for name, data in {
        "a": b"Exif\0\0rubbish",
        "b": b"Exif\0\0MM\0*" + bytes(40),
        "c": exif(9).tobytes(),
    }.items():
        write_pictures(tmp_path / "src" / name, numbered(4), ".jpg", exif=data, quality=95)
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    assert [numbers(clips, k) for k in range(3)] == [[0, 1, 2, 3]] * 3


# ------------------------------------------------------------------------------------------- time


def gif_delays(rate, n):
    """Whole hundredths of a second, in ms, as programs round them for frames at `rate` per
    second."""
    ends = np.round(np.arange(n + 1) * 100 / rate)
    return (np.diff(ends) * 10).astype(int).tolist()


HOLD = [100] * 9 + [3000]
TIMED = {
    "24.gif": (gif_delays(24, 40), 24),
    "30.gif": (gif_delays(30, 40), 30),
    "40.gif": ([20, 30] * 15, 40),
    "50.gif": ([20] * 30, 50),
    "15.gif": (gif_delays(15, 30), 15),
    "slow.gif": ([2000] * 5, 0.5),
    "hold.gif": (HOLD, 10),
    "uneven.gif": ([100, 100, 200, 100, 300, 100, 100, 100], 10),
    "30.webp": ([33, 33, 34] * 10, 30),
    "25.webp": ([40] * 20, 25),
    "hold.webp": (HOLD, 10),
    "25.png": ([40] * 20, 25),
    "hold.png": (HOLD, 10),
}


@pytest.fixture(scope="module")
def animations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("animations")
    for name, (delays, _) in TIMED.items():
        write_animation(folder / name, numbered(len(delays), 16, 16), delays)
    return folder


@pytest.mark.parametrize("fps", [None, 10, 25])
def test_animations_are_shown_by_their_delays(animations, tmp_path, fps):
    """A pause of seconds at the end, before it starts again, counts as one frame of the usual
    length."""
    _, clips = made.pack(animations, tmp_path / "dst", 16, fps=fps)
    for name, (delays, rate) in TIMED.items():
        k, begins = clips.names.index(name), np.cumsum([0, *delays[:-1]]) / 1000
        assert clips.info["clips"]["fps"][k] == pytest.approx(fps or rate, rel=1e-3), name
        shown, step = numbers(clips, k), 1 / (fps or rate)
        moments = np.arange(len(shown)) * step
        early, late = (made.on_screen(begins, moments + slack) for slack in (-0.006, 0.006))
        assert all(a <= n <= b for a, n, b in zip(early, shown, late)), name
        if not fps and len(set(delays)) == 1:
            assert shown == list(range(len(delays))), name
        last = delays[-1] / 1000
        seconds = sum(delays[:-1]) / 1000 + (last if last < 1.5 / rate else 1 / rate)
        assert abs(len(shown) - seconds / step) <= 1, name


def test_gifs_without_delays_are_shown_as_browsers_do(tmp_path):
    """Ten frames a second where the delay is 0 or 10 ms."""
    for delay in (0, 10):
        write_animation(tmp_path / "src" / f"{delay}.gif", numbered(8), [delay] * 8)
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert clips.info["clips"]["fps"] == [10, 10] and numbers(clips, 0) == numbers(
        clips, 1
    ) == list(range(8))


# ---------------------------------------------------------------------------------------- formats

FORMATS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jfif": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "avif": "AVIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
    "ppm": "PPM",
    "pgm": "PPM",
    "tga": "TGA",
    "jp2": "JPEG2000",
    "gif": "GIF",
}


@pytest.mark.parametrize("case", ["lower", "UPPER"])
def test_folders_of_pictures_of_every_format(tmp_path, case):
    for end, kind in FORMATS.items():
        folder = tmp_path / "src" / end
        folder.mkdir(parents=True)
        options = (
            {"lossless": True}
            if kind == "WEBP"
            else {"quality": 98}
            if kind in ("JPEG", "AVIF")
            else {}
        )
        for k, image in enumerate(numbered(4)):
            picture = Image.fromarray(image[..., 0] if end == "pgm" else image)
            name = f"{k}.{end.upper() if case == 'UPPER' else end}"
            picture.save(folder / name, format=kind, **options)
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    assert sorted(clips.names) == sorted(FORMATS)
    for k, name in enumerate(clips.names):
        assert numbers(clips, k) == [0, 1, 2, 3], name
    assert set(clips.info["clips"]["fps"]) == {25}


ORDERS = {
    "plain": ["1", "2", "3", "9", "10", "11", "100"],
    "padded": ["frame_0008", "frame_0009", "frame_0010", "frame_0100"],
    "mixed padding": ["f1", "f02", "f3", "f010", "f11"],
    "decimals": ["t0.5", "t0.75", "t1", "t1.25", "t2.0", "t10.5"],
    "more decimals": ["0.1", "0.15", "0.2", "0.95", "1.05", "1.1"],
    "several numbers": ["clip2_shot9_1", "clip2_shot9_2", "clip2_shot10_1", "clip10_shot1_1"],
    "brackets": ["img (1)", "img (2)", "img (10)", "img (11)"],
    "other digits": ["a²1", "a²2", "a²10", "a²11"],
    "long": [f"1700000000{k}00000000000" for k in range(5)],
    "times": ["00-00-09.960", "00-00-10.000", "00-00-10.040", "00-01-00.000"],
}


def test_pictures_are_in_the_natural_order_of_their_numbers(tmp_path):
    for folder, stems in ORDERS.items():
        (tmp_path / "src" / folder).mkdir(parents=True)
        for stem, image in zip(stems, numbered(len(stems))):
            Image.fromarray(image).save(tmp_path / "src" / folder / f"{stem}.png")
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    for folder, stems in ORDERS.items():
        assert numbers(clips, clips.names.index(folder)) == list(range(len(stems))), folder


def test_the_same_stem_twice_is_warned_about(tmp_path):
    write_pictures(tmp_path / "src" / "a", numbered(4), ".png")
    write_pictures(tmp_path / "src" / "a", numbered(4), ".jpg", quality=95)
    write_pictures(tmp_path / "src" / "b", numbered(4), ".png")
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    told = made.notes_on(index, "000")
    assert told and all(note["why"] for note in told) and not made.notes_on(index, "b/")
    assert numbers(clips, clips.names.index("b")) == [0, 1, 2, 3]
    if "a" in clips.names:
        shown = numbers(clips, clips.names.index("a"))
        assert shown in ([0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3])


def deep_png(values, channels):
    """A PNG of 16 bits a channel, written by hand; values: uint16 [H, W]."""
    height, width = values.shape
    lines = np.repeat(values[..., None], channels, 2).astype(">u2").tobytes()
    size = len(lines) // height
    raw = b"".join(b"\0" + lines[y * size : (y + 1) * size] for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 0, 0, 0, 0)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def test_sixteen_bits_keep_their_brightness(tmp_path):
    """Level 65,535 is white whatever a picture holds: a dark one stays dark."""
    grays = [0, 150, 3_000, 20_000, 65_535]
    for folder in ("gray png", "colour png", "tif", "pgm", "ten bits"):
        (tmp_path / "src" / folder).mkdir(parents=True)
    for k, gray in enumerate(grays):
        values = np.full((16, 16), gray, np.uint16)
        (tmp_path / "src" / "gray png" / f"{k}.png").write_bytes(deep_png(values, 1))
        (tmp_path / "src" / "colour png" / f"{k}.png").write_bytes(deep_png(values, 3))
        Image.fromarray(values).save(tmp_path / "src" / "tif" / f"{k}.tif")
        (tmp_path / "src" / "pgm" / f"{k}.pgm").write_bytes(
            b"P5 16 16 65535\n" + values.astype(">u2").tobytes()
        )
        ten = np.full((16, 16), round(gray * 1023 / 65535), ">u2").tobytes()
        (tmp_path / "src" / "ten bits" / f"{k}.pgm").write_bytes(b"P5 16 16 1023\n" + ten)
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert len(clips) == 5
    for k, name in enumerate(clips.names):
        assert np.abs(made.levels(clips, k) - np.array(grays) / 257).max() <= 1, name


def test_cmyk_palettes_and_single_bits_look_as_pillow_shows_them(tmp_path):
    image = made.moving(3, 32, 32)[1]
    black_white = Image.fromarray((image[..., 0] > 100) * np.uint8(255)).convert("1")
    rgb = Image.fromarray(image)
    kinds = {
        "cmyk jpg": (rgb.convert("CMYK"), "a.jpg", {"quality": 95}),
        "cmyk tif": (rgb.convert("CMYK"), "a.tif", {}),
        "palette png": (rgb.quantize(64), "a.png", {}),
        "palette bmp": (rgb.quantize(16), "a.bmp", {}),
        "palette gif": (rgb.quantize(32), "a.gif", {}),
        "bit png": (black_white, "a.png", {}),
        "bit tif": (black_white, "a.tif", {"compression": "group4"}),
        "gray jpg": (rgb.convert("L"), "a.jpg", {}),
        "ycc jpg": (rgb.convert("YCbCr"), "a.jpg", {"quality": 95}),
        "lzw": (rgb, "a.tif", {"compression": "tiff_lzw"}),
        "progressive": (rgb, "a.jpg", {"progressive": True, "quality": 95}),
        "rle tga": (rgb, "a.tga", {"rle": True}),
    }
    for folder, (picture, name, options) in kinds.items():
        (tmp_path / "src" / folder).mkdir(parents=True)
        for k in range(3):
            picture.save(tmp_path / "src" / folder / f"{k}{name}", **options)
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    for folder, (_, name, _) in kinds.items():
        expected = np.asarray(
            Image.open(tmp_path / "src" / folder / f"1{name}").convert("RGB")
        ).transpose(2, 0, 1)
        assert (clips.frames(clips.names.index(folder), [1])[0] == expected).all(), folder


def test_transparency_is_laid_over_black_and_said_once(tmp_path):
    rgba = np.full((32, 32, 4), 200, np.uint8)
    rgba[:16, :, 3], rgba[16:, :16, 3], rgba[16:, 16:, 3] = 0, 128, 255
    picture, one = Image.fromarray(rgba), np.full((32, 32), 1, np.uint8)
    one[:16] = 0
    palette = Image.fromarray(one, "P")
    palette.putpalette([255, 0, 0, 200, 200, 200])
    kinds = {
        "rgba": (picture, "png", {}),
        "la": (picture.convert("LA"), "png", {}),
        "tga": (picture, "tga", {}),
        "webp": (picture, "webp", {"lossless": True, "exact": True}),
        "tif": (picture, "tif", {}),
        "palette": (palette, "png", {"transparency": 0}),
        "gif": (palette, "gif", {"transparency": 0}),
    }
    for folder, (image, end, options) in kinds.items():
        (tmp_path / "src" / folder).mkdir(parents=True)
        for k in range(3):
            image.save(tmp_path / "src" / folder / f"{k}.{end}", **options)
    write_pictures(tmp_path / "src" / "opaque", made.moving(3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    assert len(clips) == 8
    for folder in kinds:
        image = clips.frames(clips.names.index(folder), [2])[0].astype(int)
        assert image[:, :15].max() <= 1 and np.abs(image[:, 17:, 17:] - 200).max() <= 1, folder
        if folder not in ("palette", "gif"):
            assert np.abs(image[:, 17:, :15] - 100).max() <= 2, folder
    (note,) = made.notes_on(index, "transparen")
    assert note["count"] == 7 and not any("opaque" in name for name in note["names"])


def test_files_of_several_pictures_are_clips(tmp_path):
    src, stack = tmp_path / "src", [Image.fromarray(image) for image in numbered(6)]
    src.mkdir()
    stack[0].save(src / "pages.tif", save_all=True, append_images=stack[1:])
    stack[0].save(src / "moves.png", save_all=True, append_images=stack[1:], duration=40)
    stack[0].save(src / "moves.gif", save_all=True, append_images=stack[1:], duration=40)
    stack[0].save(
        src / "moves.webp", save_all=True, append_images=stack[1:], duration=40, lossless=True
    )
    stack[0].save(
        src / "moves.avif", save_all=True, append_images=stack[1:], duration=40, quality=98
    )
    deep = [
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) for image in stack
    ]
    deep[0].save(src / "deep.tiff", save_all=True, append_images=deep[1:])
    # Each of one picture: a folder as any other.
    write_pictures(src / "stills", numbered(5), ".gif")
    _, clips = made.pack(src, tmp_path / "dst", 32)
    for name in ("pages.tif", "moves.png", "moves.gif", "moves.webp", "moves.avif", "deep.tiff"):
        assert numbers(clips, clips.names.index(name)) == list(range(6)), name
    assert numbers(clips, clips.names.index("stills")) == list(range(5))
    assert clips.info["clips"]["fps"][clips.names.index("moves.gif")] == 25


def test_parts_of_gif_frames_are_laid_over_what_they_leave(tmp_path):
    """Frames that change a corner only, with each way of disposing of them."""
    for disposal in (1, 2):
        frames = []
        for k in range(5):
            image = Image.new("P", (32, 32), 0)
            image.putpalette([0, 0, 0, 80, 80, 80, 160, 160, 160, 240, 240, 240, 40, 40, 40])
            image.paste(1 + k % 4, (4 * k, 4 * k, 4 * k + 8, 4 * k + 8))
            frames.append(image)
        frames[0].save(
            tmp_path / f"{disposal}.gif",
            save_all=True,
            append_images=frames[1:],
            duration=40,
            disposal=disposal,
            transparency=0,
            optimize=False,
        )
        _, clips = made.pack(tmp_path / f"{disposal}.gif", tmp_path / f"dst{disposal}", 32)
        with Image.open(tmp_path / f"{disposal}.gif") as image:
            for k in range(5):
                image.seek(k)
                shown = Image.alpha_composite(
                    Image.new("RGBA", (32, 32), (0, 0, 0, 255)), image.convert("RGBA")
                )
                expected = np.asarray(shown.convert("RGB")).transpose(2, 0, 1)
                assert (clips.frames(0, [k])[0] == expected).all(), (disposal, k)


def test_an_array_that_is_cut_off_is_used_as_far_as_it_goes(tmp_path):
    np.save(tmp_path / "a.npy", numbered(9, 16, 16))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[: -(2 * 16 * 16 * 3 + 5)])
    index, clips = made.pack(tmp_path / "a.npy", tmp_path / "dst", 16)
    assert numbers(clips) == list(range(6))
    assert made.notes_on(index, "damaged", "3 frames are missing")


def test_the_picture_of_an_apng_for_other_programs_is_no_frame(tmp_path):
    made.write_animation(tmp_path / "a.png", numbered(6), [40] * 5, default_image=True)
    _, clips = made.pack(tmp_path / "a.png", tmp_path / "dst", 32)
    assert numbers(clips) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.npy", "a"])
def test_our_own_samples_can_be_packed(tmp_path, name):
    with VideoWriter(tmp_path / "src" / name, 25, comment="a sample") as video:
        video.write(numbered(12))
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    assert clips.names == [name] and numbers(clips) == list(range(12)) and clips.fps == 25


def test_arrays_that_are_no_films_are_named(tmp_path):
    src = tmp_path / "src"
    write_pictures(src / "good", numbered(3))
    np.save(src / "floats.npy", np.zeros((4, 8, 8, 3), np.float32))
    np.save(src / "flat.npy", np.zeros(9, np.uint8))
    np.save(src / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 64, 64, 3), }"
    header += b" " * (117 - len(header)) + b"\n"
    (src / "huge.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(5000)
    )
    with made.at_most(seconds=20, megabytes=500):
        index, clips = made.pack(src, tmp_path / "dst", 16)
        made.pack(src, tmp_path / "dst-cut", 16, clip_length=3)
    assert clips.names == ["good"]
    for name in ("floats.npy", "flat.npy", "objects.npy", "huge.npy"):
        assert made.notes_on(index, name), name


def test_pictures_of_different_sizes_in_one_folder(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for k, (image, size) in enumerate(zip(numbered(4), [(32, 32), (48, 32), (20, 90), (64, 64)])):
        Image.fromarray(image).resize(size).save(folder / f"{k}.png")
    assert numbers(made.pack(folder, tmp_path / "dst", 32)[1]) == [0, 1, 2, 3]


# ------------------------------------------------------------------------ JPEGs kept, JPEGs written


def jpeg_files(clips, clip=0):
    """The coded frames of a clip, as bytes."""
    tensors = load_file(clips.path / clips.info["clips"]["file"][clip])
    offsets = tensors["offsets"]
    return [tensors["jpeg"][a:b].tobytes() for a, b in zip(offsets, offsets[1:])]


def test_jpegs_of_the_right_size_pass_through_byte_for_byte(tmp_path):
    src, images = tmp_path / "src", made.moving(4, 160, 160)
    write_pictures(src / "a", images, ".jpg", quality=80)
    write_pictures(
        src / "b", images, ".JPG", format="JPEG", quality=90, progressive=True, subsampling=2
    )
    write_pictures(src / "c", images, ".png")
    write_pictures(src / "d", made.moving(4, 170, 170), ".jpg", quality=80)
    index, clips = made.pack(src, tmp_path / "dst", 160)
    assert index["coding"] == "jpeg"
    for k, name in enumerate("ab"):
        files = sorted((src / name).iterdir())
        assert jpeg_files(clips, k) == [file.read_bytes() for file in files]
        shown = np.stack([np.asarray(Image.open(file)) for file in files])
        assert (clips.frames(k, range(4)).transpose(0, 2, 3, 1) == shown).all()
    for k in (2, 3):  # what is coded here: 4:4:4, quality 95
        reference = io.BytesIO()
        Image.fromarray(images[0]).save(reference, "JPEG", quality=95, subsampling=0)
        with (
            Image.open(reference) as expected,
            Image.open(io.BytesIO(jpeg_files(clips, k)[0])) as found,
        ):
            assert found.quantization == expected.quantization and found.size == (160, 160)
            assert [entry[1:3] for entry in found.layer] == [(1, 1)] * 3
    error = (clips.frames(2, range(4)).transpose(0, 2, 3, 1).astype(float) - images) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 40


@pytest.mark.parametrize("resolution", [64, 160])
def test_lossless_gives_the_very_pixels(tmp_path, resolution):
    images = np.random.default_rng(0).integers(0, 256, (3, resolution, resolution, 3), np.uint8)
    write_pictures(tmp_path / "src" / "a", images)
    write_pictures(tmp_path / "src" / "b", images, ".jpg", quality=90)
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", resolution, lossless=True)
    assert index["coding"] == "raw"
    assert (clips.frames(0, range(3)).transpose(0, 2, 3, 1) == images).all()
    expected = np.stack(
        [np.asarray(Image.open(file)) for file in sorted((tmp_path / "src" / "b").iterdir())]
    )
    assert (clips.frames(1, range(3)).transpose(0, 2, 3, 1) == expected).all()


def test_up_to_128_pixels_frames_are_raw_and_above_they_are_jpeg(tmp_path):
    write_pictures(tmp_path / "a", made.moving(3, 140, 140))
    for resolution, coding in ((32, "raw"), (128, "raw"), (136, "jpeg")):
        index, clips = made.pack(tmp_path / "a", tmp_path / str(resolution), resolution)
        tensors = load_file(clips.path / clips.info["clips"]["file"][0])
        assert index["coding"] == coding and sorted(tensors) == (
            ["frames"] if coding == "raw" else ["jpeg", "offsets"]
        )


# ------------------------------------------------------------------------------------------ bombs


def png_head(width, height, more=b""):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + more


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_decompression_bombs_are_refused(tmp_path):
    src = tmp_path / "src"
    write_pictures(src / "good", numbered(3))
    zeros = zlib.compressobj(1)
    megabytes = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(590)) + zeros.flush()
    text = png_chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(100 << 20)))
    whole = io.BytesIO()
    Image.fromarray(numbered(1)[0]).save(whole, "PNG")
    whole = whole.getvalue()
    gif = io.BytesIO()
    Image.fromarray(numbered(1)[0]).save(gif, "GIF")
    jpeg = io.BytesIO()
    Image.fromarray(numbered(1)[0]).save(jpeg, "JPEG")
    at = jpeg.getvalue().index(b"\xff\xc0") + 5
    bombs = {
        "claims.png": png_head(100_000, 100_000, png_chunk(b"IDAT", zlib.compress(bytes(9)))),
        "unpacks.png": png_head(
            14_000, 14_000, png_chunk(b"IDAT", megabytes) + png_chunk(b"IEND", b"")
        ),
        "text.png": whole[:33] + text + whole[33:],
        "claims.gif": gif.getvalue()[:6] + struct.pack("<HH", 65_535, 65_535) + gif.getvalue()[10:],
        "claims.jpg": jpeg.getvalue()[:at]
        + struct.pack(">HH", 65_500, 65_500)
        + jpeg.getvalue()[at + 4 :],
        "claims.bmp": b"BM"
        + struct.pack(
            "<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0
        ),
        "claims.ppm": b"P6 100000 100000 255\n" + bytes(99),
        "claims.tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65_535, 65_535, 24, 0)
        + bytes(99),
    }
    for name, data in bombs.items():
        (src / name.replace(".", " ")).mkdir()
        for k in range(3):
            (src / name.replace(".", " ") / f"{k}{name[name.index('.') :]}").write_bytes(data)
    with made.at_most(seconds=60, megabytes=1200):
        index, clips = made.pack(src, tmp_path / "dst", 16)
    assert clips.names[0] == "good" and set(clips.names) <= {"good", "text png"}
    for name in bombs:
        assert name == "text.png" or made.notes_on(index, name.replace(".", " ")), name


def test_animations_that_declare_a_billion_frames(tmp_path):
    write_animation(tmp_path / "src" / "a.png", numbered(6), [40] * 6)
    write_animation(tmp_path / "src" / "good.gif", numbered(6), [40] * 6)
    data = (tmp_path / "src" / "a.png").read_bytes()
    at = data.index(b"acTL")
    claim = png_chunk(b"acTL", struct.pack(">II", 10**9, 0))
    (tmp_path / "src" / "a.png").write_bytes(data[: at - 4] + claim + data[at + 16 :])
    with made.at_most(seconds=20, megabytes=500):
        index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert numbers(clips, clips.names.index("good.gif")) == list(range(6))
    assert clips.lengths.max() <= 7 and made.notes_on(index, "a.png")


def test_scripts_in_pictures_clothing_are_not_run(tmp_path):
    """EPS would run Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "src" / "a").mkdir(parents=True)
    for k in range(3):
        (tmp_path / "src" / "a" / f"{k}.png").write_bytes(eps)
    write_pictures(tmp_path / "src" / "good", numbered(3))
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert clips.names == ["good"] and made.notes_on(index, "a")


# ----------------------------------------------------------------------------------------- damage


def gif_frames(data):
    """Where every picture of a GIF begins."""
    places, at = [], 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    while data[at] != 0x3B:
        if data[at] == 0x2C:
            places.append(at)
            at += 10 + (3 << ((data[at + 9] & 7) + 1) if data[at + 9] & 0x80 else 0) + 1
        else:
            at += 2
        while data[at]:
            at += data[at] + 1
        at += 1
    return places


@pytest.mark.parametrize("how", ["cut", "rubbish"])
def test_a_broken_gif_frame_costs_what_follows_it_at_most(tmp_path, how):
    write_animation(tmp_path / "src" / "a.gif", made.moving(12, 32, 32), [40] * 12)
    write_animation(tmp_path / "src" / "good.gif", numbered(6), [40] * 6)
    whole = np.stack(list(frames_of(tmp_path / "src" / "a.gif")))
    data = bytearray((tmp_path / "src" / "a.gif").read_bytes())
    at = gif_frames(data)[8]
    # In the picture's first block.
    at += 10 + (3 << ((data[at + 9] & 7) + 1) if data[at + 9] & 0x80 else 0) + 20
    if how == "cut":
        del data[at:]
    else:
        data[at : at + 100] = b"\xff" * 100
    (tmp_path / "src" / "a.gif").write_bytes(data)
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32)
    k = clips.names.index("a.gif")
    assert 8 <= clips.lengths[k] <= 12 and (clips.frames(k, range(8)) == whole[:8]).all()
    assert made.notes_on(index, "a.gif") and numbers(clips, clips.names.index("good.gif")) == list(
        range(6)
    )
    with pytest.raises(UserError, match=r"a\.gif"):
        made.pack(tmp_path / "src", tmp_path / "strict", 32, strict=True)


def frames_of(path):
    with Image.open(path) as image:
        for k in range(image.n_frames):
            image.seek(k)
            yield np.asarray(image.convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_a_broken_picture_costs_the_clip_that_it_is_in(tmp_path, suffix):
    options = (
        {"lossless": True} if suffix == ".webp" else {"quality": 95} if suffix == ".jpg" else {}
    )
    write_pictures(tmp_path / "src" / "shots", numbered(15), suffix, **options)
    broken = tmp_path / "src" / "shots" / f"007{suffix}"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32, clip_length=5)
    starts = index["clips"]["start"]
    assert numbers(clips, starts.index(0)) == [0, 1, 2, 3, 4]
    assert numbers(clips, starts.index(10)) == [10, 11, 12, 13, 14]
    assert made.notes_on(index, "shots") and set(starts) <= {0, 5, 10}
    if 5 in starts:
        assert index["clips"]["damaged"][starts.index(5)] > 0
    with pytest.raises(UserError, match="shots"):
        made.pack(tmp_path / "src", tmp_path / "strict", 32, clip_length=5, strict=True)


def test_an_empty_file_among_the_pictures(tmp_path):
    """As an extraction that ran out of disk leaves."""
    write_pictures(tmp_path / "src" / "shots", numbered(8), ".png")
    (tmp_path / "src" / "shots" / "008.png").write_bytes(b"")
    write_pictures(tmp_path / "src" / "others", numbered(8), ".png")
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    assert clips.names[0] == "others" and made.notes_on(index, "shots")
    assert len(clips) == 1 or numbers(clips, 1)[:8] == list(range(8))


def test_an_animation_that_is_cut_off_anywhere_is_one(tmp_path):
    """From its second picture on, wherever it ends; and none of the ends is an error."""
    write_animation(tmp_path / "v.gif", moving(6), [40] * 6)
    data = (tmp_path / "v.gif").read_bytes()
    counts = [pictures.number_of_pictures(io.BytesIO(data[:n])) for n in range(len(data))]
    second = next(n for n, count in enumerate(counts) if count > 1)
    assert second < 0.5 * len(data) and min(counts[second:]) > 1 and set(counts[:second]) == {1}
