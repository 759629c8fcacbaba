"""Reading pictures with Pillow: folders of them, files that hold several, arrays; each upright,
square and RGB.

Pictures that cannot be read are left out, and `errors`, a dict {time in seconds: what is wrong},
takes note of them.
"""

import io
import struct
import warnings
import zlib
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from mostgan.prepare.frames import PICTURE_RATE, ROUNDING, Shown, Timing, square, usual_rate

# Pillow's names of the formats that are read. Not EPS, for which it would run Ghostscript.
FORMATS = "JPEG PNG BMP DIB GIF WEBP TIFF PPM TGA JPEG2000 AVIF SGI PCX".split()
# Suffixes of files that may hold several pictures.
ANIMATED = set(".gif .webp .png .apng .tif .tiff .avif".split())
MAX_PIXELS = 1 << 26  # twice 8K; a picture that claims more is damaged, or meant to fill the memory
UNTIMED = 0.1  # seconds of an animation's picture that states none, or almost none, as browsers do
# What Pillow's readers raise over bytes that are none of their format's.
DAMAGED = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError)
DAMAGED += (ArithmeticError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError)

JPEG_QUALITY = 95
TRANSPARENT = "transparent pixels, shown over black"


@contextmanager
def open_picture(file):
    """An opened Pillow image that is not too large; closed with the block. Raises what DAMAGED
    lists.
    """
    with warnings.catch_warnings():
        # Of large pictures, which are refused below, and of strange metadata.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise ValueError("it claims far too many pixels") from None
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it claims {image.width}x{image.height} pixels, too many")
            yield image


def number_of_pictures(file):
    """How many pictures an opened file holds, of a damaged one perhaps only 2; 1 where it cannot be
    read.
    """
    try:
        with open_picture(file) as image:
            if image.format == "MPO":
                return 1
            try:
                return getattr(image, "n_frames", 1)
            except DAMAGED:  # it is cut off somewhere
                image.seek(1)
                return 2
    except DAMAGED:
        return 1


def to_rgb(image, facts):
    """A loaded Pillow image of any mode → upright RGB. What changes more than the coding is added
    to the set `facts`.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, whether Pillow holds them in 16 or in 32
        facts.add("16 bits a channel, reduced to 8")
        values = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown scale")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            facts.add(TRANSPARENT)
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image)
    return image if image.mode == "RGB" else image.convert("RGB")


# --------------------------------------------------------------------------------- kinds of sources


def folder_frames(opens, fps, first, passes, errors, facts):
    """Yields Shown for a folder of pictures, one each, from number `first` on.

    opens: {name of a picture: function that opens its file}. passes: the resolution at which a JPEG
    goes through as it is, or None.
    """
    for number, (name, opened) in enumerate(list(opens.items())[first:], first):
        time = number / fps
        try:
            with opened() as file:
                picture = (passes and jpeg_as_it_is(file, passes)) or _only_picture(file, facts)
        except DAMAGED as error:
            errors[time] = f"{name}: {reason(error)}"
        else:
            yield Shown(time, 1 / fps, picture)


def jpeg_as_it_is(file, resolution):
    """A file's bytes, where it is a whole JPEG that has this size and needs neither turning nor
    other colours; else None.
    """
    with open_picture(file) as image:
        fits = image.size == (resolution, resolution) and image.mode in ("RGB", "L")
        if image.format != "JPEG" or not fits or image.getexif().get(0x0112, 1) != 1:
            file.seek(0)
            return None
        image.load()  # raises if it is damaged
        file.seek(0)
        return file.read()


def _only_picture(file, facts):
    with open_picture(file) as image:
        image.load()
        return to_rgb(image, facts)


def animation_timing(file):
    """(Timing, seconds of each picture, facts) of a GIF, animated WebP, APNG, AVIF, or TIFF of
    several pages.
    """
    seconds, facts = [], set()
    with open_picture(file) as image:
        kind, rounding = image.format, 10 * ROUNDING if image.format == "GIF" else ROUNDING
        for _ in _pages(image, []):
            stated = (image.info.get("duration") or 0) / 1000
            untimed = 1 / PICTURE_RATE if kind == "TIFF" else UNTIMED
            seconds.append(stated if stated > (0.01 if kind == "GIF" else 0) else untimed)
    if not seconds:
        raise ValueError("no picture of it can be read")
    fps = usual_rate(np.cumsum([0.0, *seconds[:-1]]), 1 / np.median(seconds), rounding)
    # Nobody can tell how long a pause before it starts again is meant to be.
    if seconds[-1] > 1.5 / fps:
        facts.add("a pause at the end of an animation, taken for one frame")
        seconds[-1] = 1 / fps
    return Timing(fps, 0.0, sum(seconds)), seconds, facts


def animation_frames(file, seconds, errors, facts):
    """Yields Shown for each picture of an animation; seconds: of each."""
    time, damaged = 0.0, []
    with open_picture(file) as image:
        for number, _ in enumerate(_pages(image, damaged)):
            yield Shown(time, seconds[number], to_rgb(image, facts))
            time += seconds[number]
    for number, text in enumerate(damaged):
        errors[time + number] = text


def _pages(image, damaged):
    """Goes through the pictures of an opened file and yields once with each of them loaded;
    damaged: a list of reasons.

    A page of a TIFF that cannot be read is left out; other formats build each picture on the one
    before, so that they end there.
    """
    # An APNG may have a picture for programs that know no APNG, which is not among the others.
    number = 1 if getattr(image, "default_image", False) else 0
    while True:
        try:
            image.seek(number)
            number += 1
            image.load()
        except EOFError:
            if image.format in ("PNG", "WEBP", "AVIF") and number < image.n_frames:
                damaged.append(f"it is cut off: {image.n_frames - number} pictures are missing")
            return
        except DAMAGED as error:
            damaged.append(reason(error))
            if image.format != "TIFF" or image.tell() < number - 1:
                return
        else:
            yield


def array_shape(file):
    """(frames that an opened .npy file claims, those that are there, height, width); raises
    ValueError where it is no uint8 [frames, H, W, 3]. The file is left where the frames begin.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"it is an .npy file of version {version}")
    if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"it is an array of {dtype} {list(shape)}, not of uint8 [frames, H, W, 3]")
    count, height, width = shape[:3]
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"its frames claim {width}x{height} pixels")
    begin = file.tell()
    there = (file.seek(0, io.SEEK_END) - begin) // (height * width * 3)
    file.seek(begin)
    return count, min(count, there), height, width


def array_frames(file, fps, first, errors):
    """Yields Shown for the frames of an .npy file from number `first` on, read one by one."""
    claimed, count, height, width = array_shape(file)
    size = height * width * 3
    file.seek(first * size, io.SEEK_CUR)
    for number in range(first, count):
        frame = np.frombuffer(file.read(size), np.uint8).reshape(height, width, 3)
        yield Shown(number / fps, 1 / fps, Image.fromarray(frame))
    if count < claimed:
        errors[count / fps] = f"it is cut off: {claimed - count} frames are missing"


# ----------------------------------------------------------------------------------- squares, JPEGs


class PictureFraming:
    """A Pillow image → uint8 [R, R, 3]: cropped and scaled. crop: as in frames.square."""

    def __init__(self, crop, resolution):
        self.crop, self.resolution = crop, resolution

    def __call__(self, image):
        x, y, width, height = square(*image.size, self.crop)
        if (width, height) != image.size:  # first: resizing a box would look beyond its edges
            image = image.crop((x, y, x + width, y + height))
        if image.size != (self.resolution, self.resolution):
            image = image.resize((self.resolution, self.resolution), Image.LANCZOS)
        return np.asarray(image)


def encode_jpeg(frame):
    """uint8 [H, W, 3] → the bytes of a JPEG with full colour resolution."""
    data = io.BytesIO()
    Image.fromarray(frame).save(data, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return data.getvalue()


def reason(error):
    """One line on why something cannot be read."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
