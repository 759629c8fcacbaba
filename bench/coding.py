"""What does each coding of packed frames cost, and what does it change?

    python bench/coding.py --data CLIPS [--resolutions 256 128]

CLIPS: whatever prepare takes; cut into clips of 16 frames (a rest is left out). JPEGs are 4:4:4.
bytes   of a frame, on average
PSNR    of decoded frames, in dB: mean, exact frames left out, and worst
decode  processor time relative to JPEG 95, decoded in turn with it; median of the clips
shift   of proxy FVD16 (mostgan/metrics/frechet.py) of half of the sources against the other
        half, both coded, relative to both raw: median, lowest and highest of 8 random splits
"""

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder's kernels.py
from mostgan.config import UserError  # noqa: E402
from mostgan.data import Clips  # noqa: E402
from mostgan.metrics import frechet  # noqa: E402
from mostgan.prepare import prepare  # noqa: E402

FRAMES, SPLITS = 16, 8
CODINGS = {"raw": None, "PNG": {"format": "PNG"}}  # name → how Pillow saves it
CODINGS |= {f"JPEG {q}": {"format": "JPEG", "quality": q, "subsampling": 0} for q in (90, 95, 98)}


def encode(frame, how):
    """uint8 [3, R, R] → bytes."""
    if how is None:
        return frame.tobytes()
    data = io.BytesIO()
    Image.fromarray(frame.transpose(1, 2, 0)).save(data, **how)
    return data.getvalue()


def decode(data, how, out):
    """The bytes of a frame → out, uint8 [3, R, R]."""
    if how is None:
        out[:] = np.frombuffer(data, np.uint8).reshape(out.shape)
    else:
        out[:] = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)


def measure(frames, detector):
    """A clip, uint8 [n, 3, R, R] → {coding: (bytes a frame, errors [n], seconds, features [F])}."""
    stored = {name: [encode(frame, how) for frame in frames] for name, how in CODINGS.items()}
    decoded, seconds = {name: np.empty_like(frames) for name in CODINGS}, {}
    for _ in range(2):  # the first time fills the processor's caches
        for name, how in CODINGS.items():
            begun = time.process_time()
            for data, out in zip(stored[name], decoded[name]):
                decode(data, how, out)
            seconds[name] = time.process_time() - begun
    found = {}
    for name, images in decoded.items():
        size = np.mean([len(data) for data in stored[name]])
        errors = np.square(frames.astype(np.float32) - images).mean((1, 2, 3), dtype=np.float64)
        features = detector.features(torch.from_numpy(images).transpose(0, 1)[None])[0]
        found[name] = size, errors, seconds[name], features
    return found


def random_splits(sources):
    """Random halves of the sources, as bool [clips]. sources: each clip's."""
    names, rng = np.unique(sources), np.random.default_rng(0)
    return [np.isin(sources, rng.permutation(names)[: len(names) // 2]) for _ in range(SPLITS)]


def distances(features, splits):
    """Proxy FVD16 of each half against the other: float64 [splits]. features: [F] of each clip."""
    features, values = torch.stack(features), []
    for half in splits:
        one, other = {}, {}
        frechet.add_features(one, "fvd16", features[half])
        frechet.add_features(other, "fvd16", features[~half])
        values.append(frechet.distance(one, other, "fvd16"))
    return np.array(values)


def print_table(clips):
    """Measures packed clips and prints what was found, in Markdown."""
    usable = np.flatnonzero(clips.lengths == FRAMES)
    sources = np.array(clips.info["clips"]["source"])[usable]
    if len(set(sources)) < 2:
        raise UserError(f"comparing halves takes at least 2 sources of {FRAMES} frames or more")
    splits, detector = random_splits(sources), frechet.proxy("cpu")
    measured = [measure(clips.frames(clip, range(FRAMES)), detector) for clip in usable]
    columns = {name: list(zip(*(found[name] for found in measured))) for name in CODINGS}
    raw = distances(columns["raw"][3], splits)
    apart = f"{np.median(raw):.1f} ({raw.min():.1f} to {raw.max():.1f})"
    print(f"\n{clips.resolution}²: {len(usable)} clips; raw halves have proxy FVD16 {apart}\n")
    print("| coding | bytes | PSNR mean / worst | decode | shift of proxy FVD16 |")
    print("|---|---|---|---|---|")
    for name, (sizes, errors, seconds, features) in columns.items():
        errors = np.concatenate(errors)
        psnr = 10 * np.log10(255**2 / errors[errors > 0])
        quality = f"{psnr.mean():.1f} / {psnr.min():.1f}" if len(psnr) else "exact"
        slowness = np.median(np.divide(seconds, columns["JPEG 95"][2]))
        shift = 100 * (distances(features, splits) / raw - 1)
        spread = f"{np.median(shift):+.2f}% ({shift.min():+.2f} to {shift.max():+.2f})"
        print(f"| {name} | {np.mean(sizes):,.0f} | {quality} | {slowness:.2f} | {spread} |")


def main():
    raw_text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw_text)
    parser.add_argument("--data", required=True)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 128])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for resolution in args.resolutions:
        with tempfile.TemporaryDirectory() as folder:
            prepare(args.data, folder, resolution, clip_length=FRAMES, lossless=True, jobs=1)
            print_table(Clips(folder))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
