"""What is a clip: finding the videos, animations, arrays and folders of pictures in a folder, an
archive or a file.
"""

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import av
import numpy as np

from mostgan.config import UserError
from mostgan.prepare import archives, pictures, videos
from mostgan.prepare.frames import PICTURE_RATE, Timing, on_screen

STILLS = set(".jpg .jpeg .jpe .jfif .bmp .dib .ppm .pgm .pbm .pnm .tga .jp2 .j2k .pcx .sgi".split())
STILLS |= pictures.ANIMATED
VIDEOS = set(
    ".mp4 .m4v .mov .qt .mkv .webm .avi .mpg .mpeg .m2v .mpv .ts .mts .m2ts .vob .wmv .asf .flv .f4v .ogv .3gp .3g2"
    " .mxf .dv .rm .rmvb .nut .y4m .h264 .264 .h265 .265 .hevc .ivf .obu .mjpeg .mjpg .wtv".split()
)
# Files that are known not to be videos. Others are shown to FFmpeg.
OTHERS = set(
    ".txt .json .csv .tsv .md .html .xml .yaml .yml .nfo .srt .vtt .ass .ssa .sub .idx .sup .log .pdf .doc .docx"
    " .md5 .sha1 .sha256 .sfv .ini .db .url .lnk .py .sh .bat .exe .safetensors .npz .pkl .pt .pth .h5 .part .tmp"
    " .mp3 .wav .flac .aac .m4a .opus .wma .aif .aiff .mid .svg .psd .ai .eps .heic .ico".split()
)
PLAYLISTS = set(".m3u8 .m3u .ffconcat .concat .mpd .sdp .pls .xspf .imf .cue .asx".split())
NOT_OURS = {
    "__MACOSX",
    "@eaDir",
    ".thumbnails",
    "$RECYCLE.BIN",
    "lost+found",
    "System Volume Information",
}
FEW = 200  # files of a folder of which each is looked at: whether it holds several pictures

# What reading a damaged or strange file may raise.
UNREADABLE = (av.FFmpegError, AttributeError, *pictures.DAMAGED, *archives.DAMAGED)


@dataclass(frozen=True)
class Settings:
    """How every clip is made. crop: as in frames.square. fps: None keeps each source's.
    clip_length: None does not cut.
    """

    resolution: int
    coding: str  # "raw" or "jpeg"
    crop: str | tuple[int, int, int, int] = "center"
    fps: float | None = None
    clip_length: int | None = None


@dataclass
class Source:
    """One clip to be, or one film to be cut into clips. kind: "video", "animation", "array",
    "folder" (of pictures).
    """

    name: str
    kind: str
    root: str  # the folder or archive that it lies in
    files: list[str]  # names in the root
    problem: str | None = None  # why it cannot be used
    label: int | list[float] | None = None
    mask: "Source | None" = None  # white where a face is (FaceForensics)
    # Told by look:
    timing: Timing | None = None
    pixel_aspect: float = 1.0
    seconds: list[float] = field(default_factory=list)  # of each picture of an animation
    box: tuple | None = None  # what the mask says to crop
    facts: set = field(
        default_factory=set
    )  # what a user should know, e.g. that transparency was shown over black

    def stamp(self, times=True):
        """Names and sizes, and times of change: different when the source is. Reads nothing."""
        root = archives.open_root(self.root)
        files = [[printable(name), *root.stamp(name)[: 2 if times else 1]] for name in self.files]
        return [printable(self.name), self.problem, files, self.mask and self.mask.stamp(times)]

    def look(self, settings):
        """Finds out what can be told without reading it all; sets `problem` where it cannot be
        read.
        """
        try:
            root = archives.open_root(self.root)
            if self.kind == "video":
                searched = settings.clip_length is not None and os.path.isdir(self.root)
                file = root.video(self.files[0])
                self.timing, self.pixel_aspect = videos.video_timing(file, searched)
            elif self.kind == "animation":
                with root.open(self.files[0]) as file:
                    self.timing, self.seconds, self.facts = pictures.animation_timing(file)
            elif self.kind == "array":
                with root.open(self.files[0]) as file:
                    length = pictures.array_shape(file)[0] / PICTURE_RATE
                self.timing = Timing(PICTURE_RATE, 0.0, length, gap=0.0)
            else:
                length = len(self.files) / PICTURE_RATE
                self.timing = Timing(PICTURE_RATE, 0.0, length, gap=0.0)
            if self.mask:
                self.box = mask_box(self.mask, settings)
        except UNREADABLE as error:
            self.problem = pictures.reason(error)

    def fps(self, settings):
        return settings.fps or self.timing.fps

    def length(self, settings):
        """Frames that it will give, or None where only reading it would tell."""
        if self.timing.length is None:
            return None
        if self.kind in ("folder", "array"):  # they have no times: any rate keeps every picture
            return round(self.timing.length * self.timing.fps)
        return max(1, round(self.timing.length * self.fps(settings)))

    def frames(self, settings, first, count, errors, facts):
        """Yields (number, Shown) for frames number first … (see frames.on_screen), read from the
        nearest place before.
        """
        root, fps = archives.open_root(self.root), self.fps(settings)
        if self.kind == "video":
            time = self.timing.start + first / fps if first else None
            shown = videos.video_frames(root.video(self.files[0]), self.timing, time, errors)
        elif self.kind == "animation":
            shown = pictures.animation_frames(root.open(self.files[0]), self.seconds, errors, facts)
        elif self.kind == "array":
            shown = pictures.array_frames(root.open(self.files[0]), fps, first, errors)
        else:
            opens = {name: partial(root.open, name) for name in self.files}
            whole = self.box is None and settings.crop in ("center", "none")
            passes = settings.resolution if settings.coding == "jpeg" and whole else None
            shown = pictures.folder_frames(opens, fps, first, passes, errors, facts)
        return on_screen(shown, fps, self.timing.start, first, count)

    def framing(self, settings, facts):
        """A function: Shown.image → uint8 [R, R, 3], or the bytes of a JPEG that needs no change."""
        crop = self.box or settings.crop
        if self.kind == "video":
            return videos.VideoFraming(crop, settings.resolution, self.pixel_aspect, facts)
        return pictures.PictureFraming(crop, settings.resolution)


def mask_box(mask, settings):
    """The smallest square (x, y, side, side) that holds the white of every frame of a mask, as far
    as the frame goes.

    One box for the clip, so that the crop neither shakes nor cuts. Raises ValueError where the mask
    is black throughout.
    """
    mask.look(Settings(settings.resolution, "raw"))
    if mask.problem:
        raise ValueError(f"its mask {mask.name}: {mask.problem}")
    rows, columns = set(), set()
    size = None
    for _, shown in mask.frames(Settings(0, "raw"), 0, None, {}, set()):
        image = (
            shown.image.to_ndarray(format="gray")
            if mask.kind == "video"
            else np.asarray(shown.image.convert("L"))
        )
        rows.update(np.flatnonzero((image > 127).any(1)).tolist())
        columns.update(np.flatnonzero((image > 127).any(0)).tolist())
        size = image.shape
    if not rows:
        raise ValueError(f"its mask {mask.name} is black throughout")
    x, y = min(columns), min(rows)
    width, height = max(columns) + 1 - x, max(rows) + 1 - y
    side = min(max(width, height), *size)
    x, y = x + (width - side) // 2, y + (height - side) // 2
    place = min(max(x, 0), size[1] - side), min(max(y, 0), size[0] - side)
    return *place, side, side, size[1], size[0]


# -------------------------------------------------------------------------------------------------
# names


def printable(name):
    """A name as text that can be printed and stored: control characters and bytes that are no UTF-8
    as \\x1b, \\xff.
    """
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: ascii(match[0])[1:-1], text)


NUMBER = r"(?<![\d.])\d+\.\d+(?![\d.])|\d+"  # 7 or 0.25, but the numbers of 2020.10.05 apart


def natural(name):
    """Sort key in which frame2 comes before frame10, and 0.15 before 0.2."""
    parts = re.split(f"({NUMBER})", stem(name))
    key = []
    for text, number in zip(parts[::2], [*parts[1::2], ""]):
        whole, _, fraction = number.partition(".")
        key.append((text, int(whole or -1), fraction))
    return key, suffix(name)


def stem(name):
    return os.path.splitext(name)[0]


def suffix(name):
    return os.path.splitext(name)[1].lower()


# -----------------------------------------------------------------------------------------------
# finding


class Notes:
    """Everything that was skipped or guessed: what, why, how many, and some names of each."""

    EXAMPLES = 10

    def __init__(self):
        self.names = defaultdict(list)

    def add(self, what, why, *names):
        self.names[what, why] += [printable(name) for name in names]

    def lines(self, *kinds):
        """A line for each note whose `what` begins with one of these words."""
        chosen = [(why, names) for (what, why), names in self.names.items() if what.startswith(kinds)]
        return [f"{', '.join(names[:3])}: {why}" for why, names in chosen]

    def table(self):
        """Rows for the index: {what, why, count, names (the first ten)}, in an order that depends
        on nothing else.
        """
        rows = []
        for (what, why), names in sorted(self.names.items()):
            examples = sorted(filter(None, names), key=natural)[: self.EXAMPLES]
            rows.append({"what": what, "why": why, "count": len(names), "names": examples})
        return rows


def find_sources(src, notes, scratch):
    """Every clip-to-be in SRC, a folder, an archive or a file: (sources in the order of their
    names, tables of labels).

    notes: a Notes that takes what is left out. scratch: the folder to be made: nothing in it is a
    source, and compressed tars are unpacked there to be read. Tables are (where, prefix of the
    names in it, bytes) of each `dataset.json` at the top. Raises UserError where SRC is missing or
    holds nothing.
    """
    src, scratch = Path(src), str(scratch)
    told = printable(str(src))
    if not src.exists():
        raise UserError(f"{told} does not exist")
    tables = []
    if src.is_dir():
        folder = archives.Folder(str(src))
        names = folder.names(leave_out=os.path.realpath(scratch))
        packed = [name for name in names if archives.is_archive(name) and not _hidden(name)]
        own_name = src.resolve().name
        sources = _group(str(src), folder, set(names) - set(packed), own_name, notes, tables)
        for name in packed:
            sources += _in_archive(src / name, f"{name}/", notes, tables, scratch)
    elif archives.is_archive(src.name):
        sources = _in_archive(src, "", notes, tables, scratch)
    else:
        folder, name = src.resolve().parent, src.resolve().name
        sources = _group(str(folder), archives.Folder(str(folder)), [name], src.stem, notes, tables)
    if not sources:
        what = "videos, animations, folders of pictures or archives of them"
        raise UserError(f"{told} holds no {what}")
    _name_apart(sources)
    return sorted(sources, key=lambda source: natural(source.name)), tables


def _in_archive(path, prefix, notes, tables, scratch):
    """The sources in an archive; prefix: of their names, where there may be several archives."""
    name = prefix.rstrip("/") or path.name
    try:
        root = archives.unpacked(str(path), scratch)
        opened = archives.open_root(root)
    except archives.DAMAGED as error:
        return [_unusable(path.parent, name, f"a damaged archive ({pictures.reason(error)})")]
    if opened.cut:
        notes.add("damaged archive, the rest of it is missing", opened.cut, name)
    found = []
    sources = _group(root, opened, opened.names(), _bare(path.name), notes, found)
    if not sources:
        return [_unusable(path.parent, name, "an archive without videos or pictures")]
    wrapper = _wrapper([source.name for source in sources])
    for source in sources:
        source.name = prefix + source.name.removeprefix(wrapper)
    tables += [(f"{path.name}/{where}", prefix, data) for where, _, data in found]
    return sources


def _unusable(root, name, problem):
    return Source(name, "video", str(root), [os.path.basename(name)], problem)


def _bare(name):
    """An archive's name without its suffixes."""
    return next(name[: -len(end)] for end in archives.ARCHIVES[::-1] if name.lower().endswith(end))


def _wrapper(names):
    """The name and slash of the one folder that is around everything, or an empty text."""
    first = {name.partition("/")[0] for name in names}
    wrapped = len(names) > 1 and len(first) == 1 and all("/" in name for name in names)
    return first.pop() + "/" if wrapped else ""


def _name_apart(sources):
    """Gives sources of the same name, such as a folder a/ and pictures a_000 … beside it, different
    ones.
    """
    seen = Counter()
    for source in sources:
        seen[source.name] += 1
        if seen[source.name] > 1:
            source.name += f" ({seen[source.name]})"


def _hidden(name):
    return any(part.startswith(".") or part in NOT_OURS for part in name.split("/"))


def _group(root, opened, names, own_name, notes, tables):
    """Names of files → Sources: one for each video, animation and array, and one for each folder of
    pictures.
    """
    sources, unusable, stills, left = [], {}, defaultdict(list), Counter()
    videos_here = {stem(name) for name in names if suffix(name) in VIDEOS and not _hidden(name)}
    for name in sorted(names):
        if problem := opened.problem(name):
            place = os.path.dirname(name) or own_name if suffix(name) in STILLS else name
            unusable.setdefault(place, Source(place, "video", root, [name], problem))
        elif _hidden(name):
            left["hidden files and system folders"] += 1
        elif problem := _known_problem(name):
            sources.append(Source(name, "video", root, [name], problem))
        elif suffix(name) in STILLS:
            stills[os.path.dirname(name)].append(name)
        elif suffix(name) == ".npy":
            sources.append(Source(name, "array", root, [name]))
        elif suffix(name) in VIDEOS or _is_video(opened, name):
            sources.append(Source(name, "video", root, [name]))
        else:
            left[suffix(name) or "without a suffix"] += 1
    for folder, files in stills.items():
        sources += _of_pictures(root, opened, folder, files, own_name, videos_here, notes)
    if left:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        notes.add(
            "files that are neither videos nor pictures, left out", kinds, *[""] * left.total()
        )
    sources += unusable.values()
    around = _wrapper([source.name for source in sources])
    for place in ("", around):
        if f"{place}dataset.json" in names and not any(tables):
            tables.append((f"{place}dataset.json", "", _read(opened, f"{place}dataset.json")))
    return sources


def _read(opened, name):
    try:
        with opened.open(name) as file:
            return file.read()
    except archives.DAMAGED as error:
        raise UserError(f"{printable(name)} cannot be read: {pictures.reason(error)}") from None


def _known_problem(name):
    """Why a file cannot be used, as its name tells; or None."""
    if name.lower().endswith(archives.ARCHIVES + archives.OTHER_ARCHIVES):
        return "an archive in an archive, or of another kind than zip and tar: unpack it first"
    if suffix(name) in PLAYLISTS:
        return "a playlist: it names other files, which are not read"
    return None


def _is_video(opened, name):
    """Whether FFmpeg takes a file, whose suffix says nothing, for a video."""
    if suffix(name) in OTHERS:
        return False
    try:
        container, _ = videos.open_video(opened.video(name))
    except UNREADABLE:
        return False
    container.close()
    return True


# ------------------------------------------------------------------------------ folders of pictures


def _of_pictures(root, opened, folder, files, own_name, videos_here, notes):
    """The pictures of one folder: files that hold several are clips of their own, the others one
    clip, or one for each numbered sequence.
    """
    candidates = [name for name in files if suffix(name) in pictures.ANIMATED]
    if len(candidates) > FEW and not _several(opened, candidates[0]):
        candidates = [name for name in candidates if suffix(name) == ".gif"]
    animations = [name for name in candidates if _several(opened, name)]
    sources = [Source(name, "animation", root, [name]) for name in animations]
    stills = sorted(set(files) - set(animations), key=natural)
    thumbnails = set(_thumbnails(stills, videos_here))
    if thumbnails:
        notes.add("pictures of a video beside them, left out", "they have its name", *thumbnails)
    rest = [name for name in stills if name not in thumbnails]
    rest = _one_of_each_stem(opened, rest, notes)
    for prefix, names in _sequences(rest, notes):
        name = "/".join(filter(None, (folder, prefix))) or own_name
        sources.append(Source(name, "folder", root, names))
    return sources


def _several(opened, name):
    try:
        with opened.open(name) as file:
            return pictures.number_of_pictures(file) > 1
    except UNREADABLE:
        return False


def _thumbnails(names, videos_here):
    """Which stills of a folder belong to videos: a.jpg, a.mp4.jpg, a-thumb.jpg of a.mp4 beside it,
    or all of them in a folder of their own.
    """

    def forms(name):
        own = stem(name)
        bare = re.sub(
            r"[-_. ](thumb|thumbnail|poster|preview|cover|fanart)s?$", "", own, flags=re.I
        )
        return {own, stem(own), bare, stem(bare)}

    beside = [name for name in names if not videos_here.isdisjoint(forms(name))]
    files = {os.path.basename(video) for video in videos_here}
    if all(not files.isdisjoint(forms(os.path.basename(name))) for name in names):
        return names
    return beside


def _one_of_each_stem(opened, names, notes):
    """Where 000.png lies beside 000.jpg, the kind whose files are larger: the other may be previews
    or masks.
    """
    groups = defaultdict(dict)
    for name in names:
        groups[stem(name)][suffix(name)] = name
    twice = [group for group in groups.values() if len(group) > 1]
    if not twice:
        return names
    sizes = Counter()
    for group in twice:
        sizes.update({kind: opened.stamp(name)[0] for kind, name in group.items()})
    order = [kind for kind, _ in sizes.most_common()]
    left = [
        name
        for group in twice
        for name in sorted(group.values(), key=lambda n: order.index(suffix(n)))[1:]
    ]
    why = f"of each the {order[0]} is taken, those files are larger"
    notes.add("pictures that share their name with another, left out", why, *left)
    return [name for name in names if name not in set(left)]


def _sequences(names, notes):
    """[(name, files)]: stills of one folder, grouped where there are several numbered sequences
    (a_000, b_000).

    Pictures without a number beside a sequence, such as a cover, are left out.
    """
    groups, loose = defaultdict(list), []
    for name in names:
        base = os.path.basename(stem(name))
        match = re.search(rf"(?:{NUMBER})$", base)
        if match:
            groups[base[: match.start()]].append((name, match[0]))
        else:
            loose.append(name)
    if not any(len(group) > 2 for group in groups.values()):
        return [("", names)] if names else []
    if loose:
        notes.add("pictures beside a numbered sequence, left out", "they have no number", *loose)
    if len(groups) > 1 and _are_sequences(groups):
        return [
            (prefix.rstrip("_-. ") or "frames", [name for name, _ in group])
            for prefix, group in groups.items()
        ]
    return [("", [name for name in names if name not in set(loose)])]


def _are_sequences(groups):
    """Whether numbered pictures with different prefixes are different clips: the prefixes differ by
    more than numbers, or each counts on by ones. Else they are parts of a date or a time: 12-00-05,
    12-01-05.
    """
    if len({re.sub(r"\d+", "0", prefix) for prefix in groups}) == len(groups):
        return True
    for prefix, group in groups.items():
        numbers = [number for _, number in group]
        if len(re.sub(r"\D", "", prefix)) >= 8 or any("." in number for number in numbers):
            return False
        if any(int(b) - int(a) != 1 for a, b in zip(numbers, numbers[1:])):
            return False
    return True
