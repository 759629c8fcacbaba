"""python -m mostgan.prepare SRC DST --resolution 256"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mostgan.config import UserError
from mostgan.prepare import data_sets
from mostgan.prepare.reading import printable
from mostgan.program import run_program


def prepare(
    src: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="SRC")] = None,
    dst: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="DST")] = None,
    /,
    resolution: int | None = None,
    crop: str = "center",
    masks: Path | None = None,
    fps: float | None = None,
    clip_length: int | None = None,
    labels: str | None = None,
    conditions: Path | None = None,
    split: Literal["train", "test"] | None = None,
    test_share: float = 0.1,
    lossless: bool = False,
    strict: bool = False,
    check: Path | None = None,
):
    """Packs videos, animations, folders of pictures, or archives of them into a form that training
    reads frame by frame.

    Interrupted, it leaves nothing that looks finished; the same command goes on where it stopped.

    Args:
        src: folder (nested and mixed as you like), zip, tar, or a single file.
        dst: the folder to make.
        resolution: side of the square frames, in pixels.
        crop: `center`, the largest centered square; `none`, the whole frame, squeezed into the
            square; or a box X,Y,W,H in pixels of the source.
        masks: folder or zip of masks (white on black, named as the clips, or CLIP_ANYTHING as
            FaceForensics does). Crops the square around everything white in a clip, the same for
            all its frames.
        fps: frames per second to resample to. Default: each source's usual rate. Folders of
            pictures and arrays have no times; their frames are kept as they are, and taken to have
            this rate (25 by default).
        clip_length: cut longer videos into clips of this many frames.
        labels: `folders` makes each top-level folder a class; a file gives them (like dataset.json,
            or lines of clip,label or clip,number,number,...); otherwise a dataset.json is used if
            there is one.
        conditions: a safetensors file of vectors: for each clip an entry NAME [C], or NAME/frames
            [n, E] with a row for each of its frames, or both.
        split: pack only this part. Which clips are `test` depends on nothing but their names.
        test_share: how much of the data is `test`.
        lossless: keep every frame exactly, also above 128 pixels, where frames are JPEGs of quality
            95 otherwise.
        strict: stop at the first source that cannot be used, or is damaged, instead of leaving it
            out.
        check: verify this packed folder, every byte, and do nothing else.
    """
    if check is not None:
        return _check(check)
    if src is None or dst is None or resolution is None:
        raise UserError("give SRC, DST and --resolution, or --check DST; --help explains")
    options = dict(
        crop=crop, masks=masks, fps=fps, clip_length=clip_length, labels=labels, split=split
    )
    options |= dict(conditions=conditions, test_share=test_share, lossless=lossless, strict=strict)
    index = data_sets.prepare(src, dst, resolution, **options)
    print("\n".join(data_sets.summary(index)))
    print(f"preview   {printable(str(dst / 'preview.png'))}")


def _check(path):
    wrong = data_sets.check(path)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong:
        return 2
    print(f"checked   {path}: every byte is as it was written")


def main():
    again = "interrupted; the same command goes on where this one stopped"
    run_program(lambda: tyro.cli(prepare, prog="python -m mostgan.prepare"), interrupted=again)


if __name__ == "__main__":
    main()
