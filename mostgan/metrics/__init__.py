"""Scores of generated clips against real ones (spec §9): what is measured between two sets, and
what to know of it.

Fréchet video distances FVD16, FVD128 and FVD128 of every 8th frame, and FID over the frames of
FVD16's clips, as far as the clips are long enough (frechet.py); how clips move, without a network
(motion_statistics.py). sets.py has the two sets and the protocol; `python -m mostgan.metrics`
(__main__.py) prints and writes a report.
"""

from typing import NamedTuple

import numpy as np
import torch

from mostgan.metrics import frechet, motion_statistics
from mostgan.metrics.sets import (
    FRAME_METRIC,
    ClipSet,
    Detectors,
    GeneratedSet,
    Protocol,
    Window,
    conditions_of,
    measure,
    measure_long,
    measure_once,
    open_detectors,
    progress,
)

__all__ = ["Scores", "evaluate", "in_a_line", "label", "open_detectors", "score"]

LABELS = {
    "fvd16": "FVD16",
    "fvd128": "FVD128",
    "fvd128_every8": "FVD128, every 8th frame",
    "fid": "FID of FVD16's frames",
    "spectrum_distance_db": "temporal spectrum distance (dB)",
    "static_rate": "static clips",
    "real_static_rate": "  of the real",
    "repeating_rate": "long videos that repeat",
    "recurrence": "mean recurrence",
    "period": "  median period (frames)",
    "real_repeating_rate": "real long videos that repeat",
    "real_recurrence": "  mean recurrence",
    "real_period": "  median period (frames)",
}


class Scores(NamedTuple):
    values: dict  # name → float
    skipped: dict  # name → why it is not among the values
    notes: list  # what to know before comparing the values
    samples: dict  # name → [real, generated]: how many samples
    spectra: dict  # real, generated: power of pixel differences in levels², lags 1, 2, …


def score(
    real: ClipSet, generated: ClipSet | GeneratedSet, protocol, detectors, show=True
) -> Scores:
    """All that can be measured between two sets, of which each clip is long enough or left out.
    Raises UserError.
    """
    # Motion is measured in clips as long as at least half of those of each set are.
    motion_frames = min(protocol.frames, *(int(np.median(s.lengths())) for s in (real, generated)))
    metrics = protocol.video_metrics
    counts = {w: [(s.lengths() >= w.span).sum() for s in (real, generated)] for w in metrics}
    enough = [w for w in metrics if w.span <= protocol.frames and min(counts[w]) >= 2]
    windows = sorted({*enough, Window(motion_frames)})
    kinds = [*windows, "long"] if protocol.long_clips else windows
    real_sums = {kind: measure_once(real, kind, detectors, show) for kind in kinds}
    if isinstance(generated, ClipSet):
        made_sums = {kind: measure_once(generated, kind, detectors, show) for kind in kinds}
    else:
        with progress("generated clips", protocol.clips, show) as bar:
            made_sums = measure(generated, windows, detectors, bar)
        with progress("generated long videos", protocol.long_clips, show) as bar:
            made_sums["long"] = measure_long(generated, detectors, bar)

    scores = Scores({}, {}, [], {}, {})
    for window, names in metrics.items():
        for name in [*names, *([FRAME_METRIC[window]] if window in FRAME_METRIC else [])]:
            detector = detectors.video if name in names else detectors.frame
            key = "proxy_" + name if detector.proxy else name
            if window in enough:
                add_distance(scores, key, name, real_sums[window], made_sums[window])
            elif window.span > protocol.frames:
                scores.skipped[key] = f"only clips of up to {protocol.frames} frames were asked for"
            else:
                scores.skipped[key] = f"fewer than 2 clips of a set have {window.span} frames"
    add_differences(scores, enough, protocol, real, generated)
    of_motion = real_sums[Window(motion_frames)], made_sums[Window(motion_frames)]
    add_spectrum(scores, motion_frames, *of_motion)
    if protocol.long_clips:
        add_repetition(scores, "", made_sums["long"])
        add_repetition(scores, "real_", real_sums["long"])
    return scores


def add_distance(scores, key, name, real, made):
    """The Fréchet distance, the numbers of samples, and a note where they are too few for their
    features.
    """
    scores.values[key] = frechet.distance(real, made, name)
    counts = [int(sums[f"{name}.count"]) for sums in (real, made)]
    features = len(real[f"{name}.mean"])
    scores.samples[key] = counts
    pairs = zip(("real", "generated"), counts)
    few = [f"{count:,} {which}" for which, count in pairs if count <= features]
    if few:
        scores.notes.append(
            f"{label(key)}: {' and '.join(few)} samples for {features} features: a covariance of "
            "less than full rank, so the value is biased; compare it only at the same numbers of "
            "samples"
        )


def add_differences(scores, enough, protocol, real, generated):
    """Notes where a set of clips has fewer than were asked for, and where frame rates differ."""
    for which, s in (("real", real), ("generated", generated)):
        for window in enough:
            count = int((s.lengths() >= window.span).sum())
            if count < protocol.clips:
                scores.notes.append(
                    f"{count:,} {which} clips of {window.span} frames, not {protocol.clips:,}: "
                    "there are no more"
                )
    fps = generated.clips.fps if isinstance(generated, ClipSet) else generated.generator.config.fps
    if fps is not None and abs(real.clips.fps - fps) > 0.01:
        scores.notes.append(
            f"the real clips have {real.clips.fps:g} frames/s, the others {fps:g}: "
            "a frame apart is not as long in both, so no value but the FID compares like with like"
        )


def add_spectrum(scores, frames, real, made):
    """Spectrum distance and static clips, by clips of so many frames."""
    lags = min(motion_statistics.LAGS, frames - 1)
    scores.values["spectrum_distance_db"] = motion_statistics.spectrum_distance(real, made, lags)
    scores.values["static_rate"] = motion_statistics.static_rate(made)
    scores.values["real_static_rate"] = motion_statistics.static_rate(real)
    for name in ("spectrum_distance_db", "static_rate"):
        scores.samples[name] = [int(real["clips"]), int(made["clips"])]
    for which, sums in (("real", real), ("generated", made)):
        scores.spectra[which] = motion_statistics.spectrum(sums, lags).tolist()
    if lags < motion_statistics.LAGS:
        scores.notes.append(
            f"motion is measured in clips of {frames} frames, as half of a set's clips have no "
            f"more or no more were asked for: lags 1 to {lags}, not {motion_statistics.LAGS}"
        )


def add_repetition(scores, prefix, sums):
    """How far long videos repeat themselves; prefix: "real_" for the real set's."""
    if not sums:
        scores.skipped[f"{prefix}repeating_rate"] = (
            f"no videos of {motion_statistics.SHORTEST_LONG} frames or more"
        )
        return
    rate, recurrence, period = motion_statistics.repetition(sums)
    scores.values.update({f"{prefix}repeating_rate": rate, f"{prefix}recurrence": recurrence})
    scores.samples[f"{prefix}repeating_rate"] = [len(sums["periodicity"])]
    if period is not None:
        scores.values[f"{prefix}period"] = period


@torch.no_grad()
def evaluate(
    generator, clips, detectors: Detectors, most=256, frames=16, seed=0
) -> dict[str, float]:
    """Scores of a generator against packed clips, as training logs them: name → value, FVD16 first.

    most: clips of each set; frames: 16, or 128 for FVD128 too. No random state is touched. With
    torch.distributed running, every process must call it, and all get the same. May raise
    UserError.
    """
    protocol = Protocol(clips=most, frames=frames, long_clips=0).chosen(detectors)
    model = generator.config
    conditions = conditions_of(clips, model.num_labels, model.frame_condition_dim)
    made = GeneratedSet(generator, protocol, seed, conditions, clips)
    return score(ClipSet(clips, protocol, seed), made, protocol, detectors, show=False).values


def in_a_line(values):
    return ", ".join(
        f"{label(key)} {value:.4g}" for key, value in values.items() if not key.startswith("real_")
    )


def label(key):
    """A value's name in the table."""
    bare = key.removeprefix("proxy_")
    return ("proxy " if bare != key else "") + LABELS[bare]
