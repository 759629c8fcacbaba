"""The two sets that are compared, packed clips and a generator's; measuring one; keeping what was
measured (spec §9).

Several processes share a set batch by batch, so each batch is computed as one process alone would
compute it.
"""

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from mostgan import distributed
from mostgan.config import UserError
from mostgan.data import Clips
from mostgan.files import write_whole
from mostgan.metrics import frechet, motion_statistics
from mostgan.metrics.frechet import Detector, Sums
from mostgan.model import Generator
from mostgan.program import cores
from mostgan.rendering import render

CACHE_VERSION = 3  # raise it when what is collected changes, or how frames are decoded


class Window(NamedTuple):
    """So many frames of a clip, `stride` apart."""

    frames: int
    stride: int = 1

    @property
    def span(self):
        """Frames from the first to the last, both counted: what a clip must have."""
        return self.stride * (self.frames - 1) + 1

    def __str__(self):
        return f"{self.frames} frames" + (f", {self.stride} apart" if self.stride > 1 else "")


FVD16, FVD128, EVERY8 = Window(16), Window(128), Window(16, 8)
# What each window of a clip is measured for: name → stride of the frames that the detector sees.
VIDEO_METRICS = {
    "ours": {FVD16: {"fvd16": 1}, FVD128: {"fvd128": 1, "fvd128_every8": 8}},
    "release": {FVD16: {"fvd16": 1}, FVD128: {"fvd128": 1}, EVERY8: {"fvd128_every8": 1}},
}
FRAME_METRIC = {FVD16: "fid"}  # over all frames of FVD16's clips


@dataclass(frozen=True)
class Protocol:
    """What besides the two sets, the detectors and the seed decides the numbers."""

    protocol: Literal["ours", "release"] | None = None
    """which clips and windows are compared (mostgan/metrics/README.md); default: release for FVD
    with a detector, else ours
    """
    clips: int = 2048
    """most clips of either set; of generated ones, exactly so many"""
    frames: int = 128
    """longest clips to look at"""
    long_clips: int = 16
    """videos of up to 1,024 frames that are searched for repetition"""
    batch: int = 8
    """clips rendered or read at a time; another number changes the last digits"""
    precision: Literal["float32", "bf16"] = "float32"
    """of the generator; detectors compute in float32"""

    def __post_init__(self):
        if self.clips < 2 or self.frames < 2 or self.long_clips < 0 or self.batch < 1:
            raise UserError(
                f"clips {self.clips}, frames {self.frames}, long clips {self.long_clips}, "
                f"batch {self.batch}: clips and frames must be at least 2, batch 1, long clips 0"
            )

    def chosen(self, detectors):
        """The same, with the choice of protocol made."""
        default = "ours" if detectors.video.proxy else "release"
        return replace(self, protocol=self.protocol or default)

    @property
    def video_metrics(self):
        return VIDEO_METRICS[self.protocol or "ours"]


# ------------------------------------------------------------------------------------- the two sets


@dataclass(frozen=True)
class ClipSet:
    """Packed clips. from_start: take each clip's first frames, as a generator's, instead of a
    random window.
    """

    clips: Clips
    protocol: Protocol
    seed: int
    from_start: bool = False

    def lengths(self):
        return self.clips.lengths

    def windows(self, window):
        """(clip, first frame) of one such window for each clip that is long enough for it.

        If those are more than the protocol's number of clips: a random part of them, or, by the
        release's protocol, the first in the order of their names. Random numbers are keyed by
        (seed, frames, clip).
        """
        usable = np.flatnonzero(self.clips.lengths >= window.span)
        key = [self.seed, window.frames if window.stride == 1 else window.span]
        if len(usable) > self.protocol.clips:
            if self.protocol.protocol == "release":
                usable = np.array(sorted(usable, key=self.clips.names.__getitem__))
            else:
                usable = np.random.default_rng(key).permutation(usable)
            usable = usable[: self.protocol.clips]
        starts = [
            0 if self.from_start else np.random.default_rng([*key, clip]).integers(spare + 1)
            for clip, spare in zip(usable, self.clips.lengths[usable] - window.span)
        ]
        return list(zip(usable.tolist(), map(int, starts)))

    def batches(self, window, rank, world):
        """Yields uint8 [b, frames, 3, R, R]: every world-th batch of the windows."""
        windows, size = self.windows(window), self.protocol.batch

        def read(place):
            clip, first = place
            return self.clips.frames(clip, np.arange(first, first + window.span, window.stride))

        with ThreadPoolExecutor(min(size, cores())) as pool:
            for first in range(rank * size, len(windows), world * size):
                clips = list(pool.map(read, windows[first : first + size]))
                yield torch.from_numpy(np.stack(clips))

    def long_videos(self):
        """Yields, for each of the longest clips, a function that yields its frames uint8 [n, 3, R,
        R], up to 1,024.
        """
        order = np.argsort(-self.clips.lengths, kind="stable")[: self.protocol.long_clips]
        for clip in order[self.clips.lengths[order] >= motion_statistics.SHORTEST_LONG]:
            frames = np.arange(min(self.clips.lengths[clip], motion_statistics.LONG))
            yield lambda clip=clip, frames=frames: (
                torch.from_numpy(self.clips.frames(clip, part))
                for part in np.array_split(frames, -(-len(frames) // 16))
            )

    def describe(self):
        settings = self.clips.info.get("settings", {})
        return {
            "data": str(self.clips.path),
            "checksum": self.clips.fingerprint,
            "total": len(self.clips),
            "resolution": self.clips.resolution,
            "fps": self.clips.fps,
            "builtin": self.clips.builtin,
            "crop": settings.get("crop", "center"),
            "split": settings.get("split"),
            "settings": settings,
            "window": "its first n frames" if self.from_start else "n frames at random",
        }


@dataclass(frozen=True)
class GeneratedSet:
    """A generator's clips, at times 0, 1, …; clip i has seed (run's seed) · 2³² + i and a condition
    drawn from `conditions` [N, num_labels], or the conditions of a clip that is drawn from `clips`,
    of its frames those from a random one on.
    """

    generator: Generator
    protocol: Protocol
    seed: int
    conditions: np.ndarray | None = None
    clips: Clips | None = None

    def lengths(self):
        return np.array([self.protocol.frames] * self.protocol.clips)

    def _render(self, first, count, frames):
        """Yields windows uint8 [count, n, 3, R, R] of these clips."""
        label, of_frames, config = None, None, self.generator.config
        rngs = [np.random.default_rng([self.seed, i]) for i in range(first, first + count)]
        if config.num_labels or config.frame_condition_dim:
            of = self.conditions if self.clips is None else self.clips
            chosen = [rng.choice(len(of)) for rng in rngs]
        if config.num_labels:
            label = torch.from_numpy(self.conditions[chosen])
        if config.frame_condition_dim:
            of_frames = [self._of_frames(*drawn) for drawn in zip(chosen, rngs)]
        seed, size = (self.seed << 32) + first, min(frames, 16)  # most clips have 16 frames
        conditions = {"label": label, "frame_condition": of_frames}
        windows = render(self.generator, seed, 0, frames, count, window=size, **conditions)
        device, half = self.generator.mapping.w_avg.device, self.protocol.precision == "bf16"
        while True:
            # For the rendering alone, not for what is done with windows that were yielded.
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                window = next(windows, None)
            if window is None:
                return
            yield window

    def _of_frames(self, clip, rng):
        """A clip's frame conditions [n, E], from where a window of the longest kind may begin."""
        length = int(self.clips.lengths[clip])
        start = rng.integers(max(0, length - self.protocol.frames) + 1)
        return self.clips.frame_condition(clip, np.arange(start, length))

    def batches(self, window, rank, world):
        """Yields uint8 [b, frames, 3, R, R]: every world-th batch."""
        size, count = self.protocol.batch, self.protocol.clips
        for first in range(rank * size, count, world * size):
            windows = self._render(first, min(size, count - first), window.span)
            yield torch.cat(list(windows), dim=1)[:, :: window.stride]

    def long_videos(self):
        """As ClipSet's: of the first clips, 1,024 frames."""
        for index in range(self.protocol.long_clips):
            yield lambda index=index: self._long(index)

    def _long(self, index):
        for window in self._render(index, 1, motion_statistics.LONG):
            yield window[0]

    def describe(self):
        config = self.generator.config
        return {
            "total": self.protocol.clips,
            "resolution": config.resolution,
            "num_labels": config.num_labels,
            "frame_condition_dim": config.frame_condition_dim,
            "psi": 1.0,
            "times": "0 to n − 1",
            "seeds": "clip i of a run: (the run's seed) · 2³² + i",
            "precision": self.protocol.precision
            + " (the release: half in its four highest resolutions)",
        }


def conditions_of(clips, num_labels, frame_condition_dim=0):
    """What a generator of this num_labels is told of each packed clip: float32 [N, num_labels];
    None if that is 0.

    It may know more classes than these clips have. Raises UserError if they, or the conditions of
    their frames, do not fit.
    """
    if frame_condition_dim and clips.frame_condition_dim != frame_condition_dim:
        raise UserError(
            f"the model takes {frame_condition_dim} numbers as a condition of every frame, but "
            f"{clips.path} has {clips.frame_condition_dim or 'none'}: evaluate it on clips of its "
            "training data"
        )
    if not num_labels:
        return None
    classes = clips.labels is not None and clips.labels.ndim == 1
    if clips.num_labels != num_labels and not (classes and clips.num_labels < num_labels):
        have = f"{clips.num_labels} {'classes' if classes else 'numbers per clip'}"
        raise UserError(
            f"the model takes {num_labels} numbers as a condition, or as many classes, but "
            f"{clips.path} has {have if clips.num_labels else 'no labels'}: evaluate it on "
            "labelled clips of its training data"
        )
    conditions = np.zeros((len(clips), num_labels), np.float32)
    for clip in range(len(clips)):
        conditions[clip, : clips.num_labels] = clips.condition(clip)
    return conditions


# ---------------------------------------------------------------------------------------- measuring


class Detectors(NamedTuple):
    video: Detector
    frame: Detector
    device: torch.device


def open_detectors(video, frame, device):
    """The detectors in these files; the proxy for both where none is given. With one of them alone,
    the other's metrics are by the proxy, and say so.
    """
    return Detectors(
        frechet.video_detector(video, device), frechet.frame_detector(frame, device), device
    )


def add_batch(sums: Sums, batch, window, video_metrics, detectors):
    """Take in clips uint8 [B, n, 3, H, W], each such a window: motion if its frames follow one
    another, features where a metric is defined for the window. video_metrics: of the protocol.
    """
    if window.stride == 1:
        motion_statistics.add_motion(sums, batch)
    clips = batch.transpose(1, 2)
    for name, stride in video_metrics.get(window, {}).items():
        features = detectors.video.features(clips[:, :, ::stride].contiguous())
        frechet.add_features(sums, name, features)
    if window in FRAME_METRIC:
        features = detectors.frame.features(batch.flatten(0, 1))
        frechet.add_features(sums, FRAME_METRIC[window], features)


def measure(clip_set, windows, detectors, bar):
    """Sums over a set's clips for each of these windows: {window: Sums}. Several begin at one
    frame: a generated clip is rendered once for all of them.
    """
    rank, world = distributed.rank(), distributed.size()
    sums = {window: {} for window in windows}
    whole = windows[0] if len(windows) == 1 else Window(max(window.span for window in windows))
    for batch in clip_set.batches(whole, rank, world):
        batch = batch.to(detectors.device)
        for window in windows:
            part = batch if window == whole else batch[:, : window.span : window.stride]
            add_batch(sums[window], part, window, clip_set.protocol.video_metrics, detectors)
        bar.update(len(batch) * world)
    return {window: all_together(sums[window]) for window in windows}


def measure_long(clip_set, detectors, bar):
    """Sums over a set's long videos; empty if it has none."""
    rank, world = distributed.rank(), distributed.size()
    sums, videos = {}, list(clip_set.long_videos())
    for index in range(rank, len(videos), world):
        windows = videos[index]()
        rows = [motion_statistics.thumbnails(window.to(detectors.device)) for window in windows]
        rows = torch.cat(rows)
        motion_statistics.add_long(sums, index, len(videos), rows)
        bar.update(world)
    return all_together(sums)


def measure_once(clip_set: ClipSet, window, detectors, show):
    """Sums over such windows of packed clips, or over "long" ones: those in the cache, else
    measured and put there.
    """
    file = cache_file(clip_set, window, detectors)
    sums = from_rank_0(lambda: read_sums(file))
    if sums is not None:
        return sums
    if window == "long":
        with progress("long videos", len(list(clip_set.long_videos())), show) as bar:
            sums = measure_long(clip_set, detectors, bar)
    else:
        text = f"{clip_set.clips.path.name}, {window}"
        with progress(text, len(clip_set.windows(window)), show) as bar:
            sums = measure(clip_set, [window], detectors, bar)[window]
    from_rank_0(lambda: write_sums(file, sums))
    return sums


# ----------------------------------------------------------------------------- processes, the cache


def all_together(sums: Sums) -> Sums:
    """The sums of all processes, merged in their order, on the CPU."""
    sums, parts = {name: value.cpu() for name, value in sums.items()}, [None] * distributed.size()
    if len(parts) == 1:
        return sums
    dist.all_gather_object(parts, sums)
    whole = {}
    for part in parts:
        frechet.merge(whole, part)
    return whole


def from_rank_0(function):
    """function(), called in the first process alone, for all of them."""
    rank, world = distributed.rank(), distributed.size()
    result = [function() if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]


def cache_file(clip_set, window, detectors):
    """Where the sums of packed clips are kept: ~/.cache/mostgan/metrics (or below $XDG_CACHE_HOME),
    under a name made of all that they depend on: the data's checksum, the protocol, the
    detectors.
    """
    protocol = clip_set.protocol
    key = [CACHE_VERSION, clip_set.clips.fingerprint, clip_set.from_start, window, clip_set.seed]
    key += [detectors.device.type, protocol.protocol or "ours"]
    key += [protocol.long_clips] if window == "long" else [protocol.clips, protocol.batch]
    key += [detectors.video.sha256] * (window in protocol.video_metrics)
    key += [detectors.frame.sha256] * (window in FRAME_METRIC)
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "mostgan", "metrics", f"{name}.safetensors")


def read_sums(file):
    try:
        return safetensors.torch.load_file(file)
    except (OSError, SafetensorError):
        return None  # not there, or damaged: it is only a cache


def write_sums(file, sums):
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sums = {name: value.contiguous() for name, value in sums.items()}
        write_whole(file, safetensors.torch.save(sums))
    except OSError as error:
        what = f"warning: cannot keep the statistics in {file.parent}: {error.strerror}"
        tqdm.write(what, file=sys.stderr)


def progress(text, total, show):
    silent = None if show and distributed.main() else True  # None: where nobody watches
    return tqdm(desc=text, total=total, unit="clip", disable=silent)
