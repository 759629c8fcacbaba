"""From whatever the user has to a packed data set: finding, labels and masks, packing; its check;
its cache beside the source.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from mostgan.config import UserError
from mostgan.files import read_json
from mostgan.prepare import archives
from mostgan.prepare.conditions import Conditions
from mostgan.prepare.labels import label_sources
from mostgan.prepare.pack import RAW_UP_TO, checksum_of, locked, pack, pack_here, wrong_files
from mostgan.prepare.reading import Settings, natural, printable, stem
from mostgan.prepare.sources import Notes, find_sources


def prepare(
    src,
    dst,
    resolution,
    *,
    crop="center",
    masks=None,
    fps=None,
    clip_length=None,
    labels=None,
    conditions=None,
    split=None,
    test_share=0.1,
    lossless=False,
    strict=False,
    jobs=None,
    about=None,
):
    """Packs the clips in SRC (a folder, an archive or a file) into the folder DST and returns its
    index, a dict.

    The options are those of the command (`python -m mostgan.prepare --help`); jobs: processes, None
    for one a core; about: more entries of the index. Raises UserError.
    """
    if fps is not None and not 0 < fps <= 1000:
        raise UserError(f"--fps {fps:g} is not possible: above 0, up to 1000")
    if not 0 < test_share < 1:
        raise UserError(f"--test-share {test_share:g} is not possible: between 0 and 1")
    if masks is not None and crop != "center":
        raise UserError("--masks and --crop exclude each other: the masks say what to crop")
    if labels is not None and conditions is not None:
        raise UserError("--labels and --conditions exclude each other: write classes as one-hot")
    conditions = Conditions(conditions) if conditions is not None else None
    coding = "raw" if lossless or resolution <= RAW_UP_TO else "jpeg"
    settings = Settings(resolution, coding, _crop(crop), fps, clip_length)
    notes, src, dst = Notes(), Path(src), Path(dst)
    new = not dst.exists()
    with locked(dst), _tidied(dst, new):
        sources, tables = find_sources(src, notes, dst)
        if conditions:
            sources, meaning = conditions.give(sources, notes), conditions.meaning()
        else:
            sources, meaning = label_sources(sources, tables, labels, notes)
        if masks is not None:
            _find_masks(sources, masks, dst)
        if split:
            test = {source.name for source in sources if place(source.name) < test_share}
            sources = [s for s in sources if (s.name in test) == (split == "test")]
            if not sources:
                raise UserError(f"{printable(str(src))}: no clip falls into the {split} part")
        told = {
            "source": printable(src.resolve().name),
            "labels": meaning,
            "masks": masks is not None,
        }
        told |= {"split": split, "test_share": test_share if split else None} | (about or {})
        return pack_here(sources, dst, settings, notes, told, strict, jobs, conditions)


@contextlib.contextmanager
def _tidied(dst, new):
    """Removes unpacked archives at the end, and the folder if it is new and nothing came of it."""
    try:
        yield
    finally:
        for name in os.listdir(dst):
            if name.endswith(archives.UNPACKED):
                os.unlink(dst / name)
        if new and set(os.listdir(dst)) <= {"plan.json"}:
            (dst / "plan.json").unlink(missing_ok=True)
            dst.rmdir()


def _crop(crop):
    """ "center", "none", or the text X,Y,W,H as four numbers. Raises UserError."""
    if crop in ("center", "none") or isinstance(crop, tuple):
        return crop
    try:
        x, y, width, height = (int(part) for part in crop.split(","))
    except ValueError:
        raise UserError(f"--crop {crop}: use none, center or X,Y,W,H") from None
    if x < 0 or y < 0 or width < 1 or height < 1:
        raise UserError(
            f"--crop {crop}: the box must begin at 0 or more and be at least a pixel large"
        )
    return x, y, width, height


def place(name):
    """A number in [0, 1) that depends on nothing but a clip's name: no other clip, no order, no
    machine.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _find_masks(sources, masks, scratch):
    """Gives each source the mask of its path (any suffix), else of its name, else the first named
    <name>_<anything>.
    """
    found = {}
    for mask in reversed(find_sources(masks, Notes(), scratch)[0]):
        base = stem(mask.name).rpartition("/")[2]
        beginnings = [base[: i + 1] + "*" for i, letter in enumerate(base) if letter == "_"]
        found |= dict.fromkeys([stem(mask.name), base, *beginnings], mask)
    for source in sources:
        base = stem(source.name).rpartition("/")[2]
        source.mask = found.get(stem(source.name)) or found.get(base) or found.get(base + "_*")
        if source.mask is None:
            source.problem = source.problem or "it has no mask"
    if all(source.mask is None for source in sources):
        example = f"none named {printable(base)} or {printable(base)}_..."
        raise UserError(f"{masks} holds no mask for any clip, e.g. {example}")


# ----------------------------------------------------------------------------------------- checking


def check(path):
    """What is wrong with a packed folder: a list of lines, each naming a file; empty: nothing.
    Reads every byte.

    Raises UserError where there is no index to read.
    """
    from mostgan.data import Clips, read_index  # not above: see pack._write_preview

    path = Path(path)
    index = read_index(path)
    if index.get("checksum") != checksum_of(index):
        return [f"{path / 'index.json'} is damaged; prepare {path} again"]
    columns, again = index["clips"], f"remove it, and prepare {path} again"
    clips = {file: f", which holds {n}," for file, n in zip(columns["file"], columns["name"])}
    wrong = wrong_files(path, dict(zip(columns["file"], columns["sha256"])) | index["files"])
    if not wrong:
        Clips(path)
    return [f"{path / file}{clips.get(file, '')} {what}; {again}" for file, what in wrong.items()]


# ------------------------------------------------------------------------ opening whatever there is


def open_data(path, dataset, resolution, cache=None):
    """Whatever the user has → mostgan.data.Clips of the right resolution.

    path: a packed folder; or videos, pictures or archives in any form that prepare takes, which are
    packed once: beside the source, or under `cache` (default data/cache) when that is given or the
    place beside is read-only; packed anew when the source changes. None: data/<dataset>, else for
    "sky" the built-in procedural sky. Raises UserError.
    """
    from mostgan.data import Clips, is_packed  # not above: see pack._write_preview

    if path is None:
        path = _usual_place(dataset)
        if path is None and dataset == "sky":
            return _builtin_sky(resolution, Path(cache or "data"))
        if path is None:
            what = f"put videos or frames of '{dataset}' into data/{dataset}"
            raise UserError(f"no data: {what}, or say where with --data PATH")
    path = Path(path)
    if not path.exists():
        raise UserError(f"{printable(str(path))} does not exist")
    if is_packed(path):
        clips = Clips(path)
        if clips.resolution != resolution:
            raise UserError(
                f"{path} holds frames of {clips.resolution} pixels, the model takes {resolution}; "
                "change the model's resolution or prepare the videos again with "
                f"--resolution {resolution}"
            )
        return clips
    place = _cache_place(path, resolution, cache)
    if clips := _opened(place):
        return clips
    _clear_damaged(place)
    print(
        f"packing {printable(str(path))} at {resolution} pixels into {printable(str(place))} (once)"
    )
    origin = {"origin": str(path.resolve())}
    index = prepare(path, place, resolution, about=origin)
    print("\n".join(summary(index)))
    _name_older(place)
    return Clips(place)


def _usual_place(dataset):
    """Where a data set lies that nobody named: data/<dataset>, or an archive or video of that name;
    else None.
    """
    for suffix in ("", *archives.ARCHIVES, ".mp4"):
        if (found := Path("data", dataset + suffix)).exists():
            return found
    return None


def _opened(place):
    from mostgan.data import Clips

    try:
        return Clips(place)
    except UserError:
        return None  # not there, or of another version, or damaged: it is only a cache


def _clear_damaged(place):
    """Removes a cache that cannot be opened, unless packing can go on with it."""
    if place.is_dir() and "made by" not in read_json(place / "plan.json"):
        shutil.rmtree(place)


def _cache_place(path, resolution, cache):
    """A folder for the packed clips of a source, of a name that no other source has, nor this one
    in another state.
    """
    path = path.resolve()
    kind = "folder" if path.is_dir() else path.suffix.lower().lstrip(".") or "file"
    own = path.name if path.is_dir() else path.stem
    own = os.fsencode(own)[:180].decode("utf-8", "ignore")  # a name has 255 bytes at most
    name = f"{own}-{kind[:20]}-{source_fingerprint(path)}-{resolution}px.clips"
    # Root may write anywhere; a folder without any write permission is still meant to be left
    # alone.
    writable = os.access(path.parent, os.W_OK) and path.parent.stat().st_mode & 0o222
    if cache is None and writable:
        return path.parent / name
    return Path(cache or "data/cache", name)


def source_fingerprint(path):
    """Eight digits that change when a source does: its place, and its files' names, sizes and times
    of change.
    """
    digest = hashlib.sha256(str(path).encode("utf-8", "surrogateescape"))
    folder = archives.Folder(str(path if path.is_dir() else path.parent))
    for name in sorted(folder.names()) if path.is_dir() else [path.name]:
        digest.update(json.dumps([printable(name), *folder.stamp(name)]).encode())
    return digest.hexdigest()[:8]


def _name_older(place):
    """Says which caches are of the source as it was before: they may be removed, unless a training
    still reads them.
    """
    name, kind, _, size = place.name.rsplit("-", 3)
    found = place.parent.glob(f"*-{kind}-????????-{size}")
    for older in sorted(found, key=lambda path: natural(path.name)):
        if older != place and older.name.rsplit("-", 3)[0] == name:
            told = printable(str(older))
            print(f"{told} holds the clips as they were before, and can be removed")


def pack_sky(dst, resolution, count=None, frames=None, builtin=False, seed=0):
    """Packs the first `count` clips of the procedural sky, of `frames` frames each (default: all);
    returns the index. seed: other seeds give other skies.
    """
    from mostgan.prepare import sky  # not above: it brings PyTorch, see pack._write_preview

    settings = Settings(resolution, "raw" if resolution <= RAW_UP_TO else "jpeg")
    about = {"source": f"sky {sky.VERSION}", "origin": None, "labels": None, "builtin": builtin}
    clips = sky.clips(count or sky.CLIPS, frames or sky.FRAMES, seed)
    # In this process: to start others, each with PyTorch, takes as long as they would save.
    return pack(clips, dst, settings, about=about, jobs=1)


def _builtin_sky(resolution, folder):
    """The whole procedural sky, packed once into `folder`."""
    from mostgan.data import Clips

    place = folder / f"sky-builtin-{resolution}px.clips"
    if clips := _opened(place):
        return clips
    _clear_damaged(place)
    print(f"packing the built-in procedural sky at {resolution} pixels into {place} (once)")
    print("\n".join(summary(pack_sky(place, resolution, builtin=True))))
    return Clips(place)


# ------------------------------------------------------------------------------------------ telling


def summary(index):
    """What was packed, as a few lines: clips, lengths, rates, labels, and a line for everything
    skipped or guessed.
    """
    clips = index["clips"]
    lengths = sorted(clips["frames"])
    seconds = sum(frames / fps for frames, fps in zip(clips["frames"], clips["fps"]))
    rates = sorted({round(fps, 3) for fps in clips["fps"]})
    rates = ", ".join(f"{rate:g}" for rate in rates[:5]) + (" ..." if len(rates) > 5 else "")
    middle = lengths[len(lengths) // 2]
    form = f"{index['resolution']} pixels ({index['coding']})"
    spread = f"{lengths[0]} to {lengths[-1]} frames, median {middle}"
    lines = [
        f"packed    {len(lengths)} clips, {sum(lengths)} frames of {form}",
        f"lengths   {spread}; {seconds / 60:.1f} minutes in all",
        f"rates     {rates} frames/s",
        f"labels    {_meaning(index.get('labels'))}",
    ]
    for note in index["notes"]:
        names = ", ".join(note["names"][:3]) + (" ..." if note["count"] > 3 else "")
        names = f" ({names})" if names else ""
        lines.append(f"note      {note['count']} {note['what']}: {note['why']}{names}")
    return lines


def _meaning(labels):
    if labels is None:
        return "none"
    if "size" in labels:
        sizes = {"clip": labels["size"], "frame": labels.get("frame_size", 0)}
        each = [f"vectors of {size} numbers per {of}" for of, size in sizes.items() if size]
        return ", ".join(each)
    names = labels["classes"]
    if names == [str(number) for number in range(len(names))]:
        return f"{len(names)} classes, 0 to {len(names) - 1}"
    told = ", ".join(f"{number} is {printable(name)}" for number, name in enumerate(names[:10]))
    return f"{len(names)} classes: {told}" + (" ... (all in index.json)" if len(names) > 10 else "")
