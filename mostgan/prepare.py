"""`python -m mostgan.prepare SRC DST --resolution 256`: videos, frame folders and zips of either → packed clips.

What a packed folder holds, and how packing survives being killed: packing.py. How clips are found and read: sources.py.
"""

import hashlib
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from mostgan.config import UserError
from mostgan.packing import FORMAT, VERSION, counts, crc_of, digest_of, pack, read_index
from mostgan.sources import Framing, find_sources

__all__ = ["FORMAT", "VERSION", "check", "pack", "prepare", "summary", "table"]

NAMED = 10  # skipped clips that the table names; the index names all


def prepare(
    src: tyro.conf.Positional[Path | None] = None,
    dst: tyro.conf.Positional[Path | None] = None,
    /,
    resolution: int | None = None,
    crop: str = "center",
    masks: Path | None = None,
    fps: float | None = None,
    clip_length: int | None = None,
    labels: str | None = None,
    split: Literal["train", "test"] | None = None,
    test_share: float = 0.1,
    lossless: bool = False,
    strict: bool = False,
    check: Path | None = None,
):
    """Packs videos, folders of frames, or zips of either into a form that training reads frame by frame.

    Interrupted, it leaves nothing that looks finished; the same command goes on where it stopped.

    Args:
        src: folder (nested and mixed as you like), zip, or single video.
        dst: the folder to make.
        resolution: side of the square frames, in pixels.
        crop: `center`: the largest centered square; `none`: the whole frame, squeezed into the square; or a box
            X,Y,W,H in pixels of the source.
        masks: folder or zip of masks (white on black, named as the clips, or CLIP_ANYTHING as FaceForensics does):
            crops the square around everything white in a clip, the same for all its frames.
        fps: frames per second to resample to, by timestamps. Default: as the source, where its frames are evenly
            spaced in time, else its usual rate. Folders of frames have no timestamps; they are taken to have this rate.
        clip_length: cut longer videos into clips of this many frames.
        labels: `folders` makes each top-level folder a class; a file gives them (like dataset.json, or lines of
            clip,number); otherwise a dataset.json is used if there is one.
        split: pack only this part. Which clips are `test` depends on nothing but their names.
        test_share: how much of the data is `test`.
        lossless: keep every frame exactly (about twice the size).
        strict: stop at the first clip that cannot be used, instead of skipping it.
        check: verify this packed folder, every byte, and do nothing else.
    """
    if check is not None:
        _check_and_print(check)
        return
    if src is None or dst is None or resolution is None:
        raise UserError("give SRC, DST and --resolution, or --check DST; --help explains")
    framing = Framing(_parse_crop(crop), fps)
    if fps is not None and not 0 < fps <= 1000:
        raise UserError(f"--fps {fps:g} is not possible: above 0, up to 1000")
    if not 0 < test_share < 1:
        raise UserError(f"--test-share {test_share:g} is not possible: between 0 and 1")
    if masks is not None and crop != "center":
        raise UserError("--masks and --crop exclude each other: the masks say what to crop")
    sources = find_sources(src, labels, framing, masks)
    if split:
        sources = [source for source in sources if (place(source.name) < test_share) == (split == "test")]
        if not sources:
            raise UserError(f"{src}: no clip falls into the {split} part")
    settings = {"crop": "masks" if masks else framing.crop, "fps": fps}
    settings |= {"split": split, "test_share": test_share if split else None}
    extra = {"source": src.resolve().name, "settings": settings}
    index = pack(sources, dst, resolution, lossless, extra, clip_length=clip_length, strict=strict)
    print(table(index))
    print(f"preview   {dst / 'preview.png'}")


def _parse_crop(text):
    if text in ("center", "none"):
        return text
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--crop {text}: use none, center or X,Y,W,H") from None
    if x < 0 or y < 0 or width < 1 or height < 1:
        raise UserError(f"--crop {text}: the box must begin at 0 or more and be at least a pixel large")
    return x, y, width, height


def place(name):
    """A number in [0,1) that depends on nothing but the name: no other clip, no order, no machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


# ------------------------------------------------------------------------------------------------------------- telling


def summary(index):
    """One line on what was packed."""
    clips, skipped = index["clips"], index["skipped"]
    frames, size = sum(clip["frames"] for clip in clips), sum(shard["bytes"] for shard in index["shards"])
    text = f"{len(clips)} clips, {frames} frames of {index['resolution']} pixels, {size / 1e6:.1f} MB"
    return text + (f"; skipped {len(skipped)}: {counts(skipped)}" if skipped else "")


def table(index):
    """What was packed, in a few lines."""
    clips, skipped = index["clips"], index["skipped"]
    lengths = [clip["frames"] for clip in clips]
    seconds = sum(clip["frames"] / clip["fps"] for clip in clips)
    rates = sorted({round(clip["fps"], 3) for clip in clips})
    labels = [clip["label"] for clip in clips if clip["label"] is not None]
    lines = [f"packed    {summary(index)}"]
    lines.append(f"lengths   {min(lengths)} to {max(lengths)} frames, median {np.median(lengths):g}; {_clock(seconds)}")
    lines.append(f"rates     {', '.join(f'{rate:g}' for rate in rates[:5])}{' ...' if len(rates) > 5 else ''} frames/s")
    lines.append(f"labels    {len(set(labels))} classes, 0 to {max(labels)}" if labels else "labels    none")
    lines += [f"skipped   {entry['name']}: {entry['problem']}" for entry in skipped[:NAMED]]
    if len(skipped) > NAMED:
        lines.append(f"skipped   and {len(skipped) - NAMED} more, listed in index.json")
    return "\n".join(lines)


def _clock(seconds):
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} in all"


# ------------------------------------------------------------------------------------------------------------ checking


def check(path):
    """What is wrong with a packed folder: lines that name the file and, for shards, the clips; empty: nothing.

    Reads every byte. Raises UserError where there is no index to read.
    """
    path = Path(path)
    index, wrong = read_index(path), []
    sums = _read_checksums(path / "SHA256SUMS")
    if sums is None:
        return [f"{path / 'SHA256SUMS'} is missing or damaged"]
    good = {name for name, digest in sums.items() if (path / name).is_file() and digest_of(path / name) == digest}
    for name in sorted(set(sums) - good):
        if not (path / name).is_file():
            wrong.append(f"{path / name} is missing")
        elif name.startswith("shard-") and {"index.json", "offsets.npy"} <= good:
            wrong.append(f"{path / name} is damaged{_extent(path, index, name)}")
        else:
            wrong.append(f"{path / name} is damaged")
    return wrong


def _read_checksums(file):
    """{name: digest}, or None where the file is not what packing wrote."""
    try:
        lines, _, last = file.read_text(encoding="ascii").rpartition("# ")
        if last != f"{hashlib.sha256(lines.encode()).hexdigest()}  the lines above\n":
            return None
        return {line.split("  ", 1)[1]: line.split("  ", 1)[0] for line in lines.splitlines()}
    except (OSError, ValueError):
        return None


def _extent(path, index, name):
    """How much of a damaged shard is damaged: its size, and the clips whose bytes changed."""
    sizes = {shard["file"]: shard["bytes"] for shard in index["shards"]}
    found, begin = (path / name).stat().st_size, sum(size for file, size in sizes.items() if file < name)
    starts = np.load(path / "offsets.npy")[np.cumsum([0] + [clip["frames"] for clip in index["clips"]])] - begin
    bad = []
    with open(path / name, "rb") as file:
        for clip, start, stop in zip(index["clips"], starts, starts[1:]):
            if 0 <= start < stop <= sizes[name]:
                file.seek(start)
                if crc_of(file, int(stop - start)) != (clip["crc32"], stop - start):
                    bad.append(clip["name"])
    text = f" ({found} bytes instead of {sizes[name]})" if found != sizes[name] else ""
    return text + f": {', '.join(bad[:NAMED])}" + (f" and {len(bad) - NAMED} more clips" if len(bad) > NAMED else "")


def _check_and_print(path):
    wrong = check(path)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong:
        raise UserError(f"{path}: {len(wrong)} of its files cannot be used; prepare it again")
    print(table(read_index(path)))
    print(f"checked   {path}: every byte is as it was written")


def main():
    try:
        tyro.cli(prepare)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
