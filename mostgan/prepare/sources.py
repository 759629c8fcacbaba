"""What is a clip: finding videos, animations, arrays and folders of pictures in whatever there
is.
"""

import errno
import os
import re
from collections import Counter, defaultdict
from itertools import chain, count
from pathlib import Path

from mostgan.config import UserError
from mostgan.prepare import archives, pictures, videos
from mostgan.prepare.reading import (
    NUMBER,
    STILLS,
    UNREADABLE,
    VIDEOS,
    Source,
    natural,
    printable,
    stem,
    suffix,
)

# Files that are known not to be videos. Others are shown to FFmpeg.
OTHERS = set(
    ".txt .json .csv .tsv .md .html .xml .yaml .yml .nfo .srt .vtt .ass .ssa .sub .idx .sup .log "
    ".pdf .doc .docx"
    " .md5 .sha1 .sha256 .sfv .ini .db .url .lnk .py .sh .bat .exe .safetensors .npz .pkl .pt .pth "
    ".h5 .part .tmp"
    " .mp3 .wav .flac .aac .m4a .opus .wma .aif .aiff .mid .svg .psd .ai .eps .heic .ico".split()
)
PLAYLISTS = set(".m3u8 .m3u .ffconcat .concat .mpd .sdp .pls .xspf .imf .cue .asx".split())
NOT_OURS = set("__MACOSX @eaDir .thumbnails $RECYCLE.BIN lost+found".split())
NOT_OURS.add("System Volume Information")
FEW = 200  # files of a folder of which each is looked at: whether it holds several pictures


class Notes:
    """Everything that was skipped or guessed: what, why, how many, and some names of each."""

    EXAMPLES = 10

    def __init__(self):
        self.names = defaultdict(list)

    def add(self, what, why, *names):
        self.names[what, why] += [printable(name) for name in names]

    def lines(self, *kinds):
        """A line for each note whose `what` begins with one of these words."""
        chosen = [
            (why, names) for (what, why), names in self.names.items() if what.startswith(kinds)
        ]
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
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            told = f"cannot unpack {printable(name)} into {printable(scratch)}"
            raise UserError(f"{told}: {error.strerror}") from None
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
    taken = set()
    for source in sources:
        names = chain([source.name], (f"{source.name} ({k})" for k in count(2)))
        source.name = next(name for name in names if name not in taken)
        taken.add(source.name)


def _hidden(name):
    parts = [part for part in re.split(r"[/\\]", name) if part != ".."]
    return any(part.startswith(".") or part in NOT_OURS for part in parts)


def _group(root, opened, names, own_name, notes, tables):
    """Names of files → Sources: one for each video, animation and array, and one for each folder of
    pictures.
    """
    sources, unusable, stills, left = [], {}, defaultdict(list), Counter()
    videos_here = {stem(name) for name in names if suffix(name) in VIDEOS and not _hidden(name)}
    for name in sorted(names):
        if _hidden(name):
            left["hidden files and system folders"] += 1
        elif problem := opened.problem(name):
            place = os.path.dirname(name) or own_name if suffix(name) in STILLS else name
            unusable.setdefault(place, Source(place, "video", root, [name], problem))
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
    around = _wrapper([source.name for source in sources])
    for table in ("dataset.json", f"{around}dataset.json"):
        if table in names and not any(tables):
            tables.append((table, "", _read(opened, table)))
            left[suffix(table)] -= 1
    left = +left
    if left:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
        notes.add(
            "files that are neither videos nor pictures, left out", kinds, *[""] * left.total()
        )
    sources += unusable.values()
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
    return container.format.name != "jpeg_pipe"  # a picture


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
