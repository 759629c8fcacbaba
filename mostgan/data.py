"""Packed clips → batches of frames and times: opening, frame sampling (spec §8), an endless reproducible loader.

Sample number i of a run is a pure function of (seed, i), so a run resumed at batch k goes on exactly as if it had never
stopped. Of `world` processes, each takes its part of every batch, in the order of their ranks: together they make the
run that one process would make with batches `world` times as large.
"""

import functools
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch

from mostgan import prepare, sky, sources
from mostgan.config import UserError
from mostgan.packing import read_index
from mostgan.sources import JOURNAL
from mostgan.video import FrameDecoder

SPANS = (2, 4, 8, 16, 32)  # frames between the first and the last frame of a sample


# --------------------------------------------------------------------------------------------------------- packed clips


class Clips:
    """An opened packed folder (see prepare.py). Cheap to open and to pickle; frames come through memory maps.

    resolution; fps (median of the clips); names; lengths int64 [N]; labels: classes int64 [N], vectors float32 [N, C]
    or None; num_labels: the number of classes, C or 0; builtin: whether this is the procedural sky; info: the index.
    Raises UserError naming the path when it is missing, of another version, or incomplete.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.info = read_index(self.path)
        try:
            self._read(self.info)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.path / 'index.json'} is damaged; prepare {self.path} again") from None
        # Opened now, not when needed: another process may make the folder anew while this one goes on with the old one.
        self._maps = []
        for shard in self.info["shards"]:
            file = self.path / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise UserError(f"{file} is missing or cut short; prepare {self.path} again")
            self._maps.append(np.memmap(file, np.uint8, mode="r"))
        try:
            self._offsets = np.load(self.path / "offsets.npy", mmap_mode="r")
        except (OSError, ValueError):
            raise UserError(f"{self.path / 'offsets.npy'} is missing or damaged; prepare {self.path} again") from None
        fits = self._offsets.shape == (self.lengths.sum() + 1,) and self._offsets.dtype == np.int64
        if not fits or self._offsets[-1] != self._shard_ends[-1]:
            raise UserError(f"{self.path / 'offsets.npy'} does not fit the index; prepare {self.path} again")

    def _read(self, info):
        clips = info["clips"]
        self.resolution, self.fps, self.builtin = info["resolution"], info["fps"], info.get("builtin", False)
        self.names = [clip["name"] for clip in clips]
        self.lengths = np.array([clip["frames"] for clip in clips], np.int64)
        labelled = all(clip["label"] is not None for clip in clips)
        self.labels, self.num_labels = None, 0
        if labelled:
            labels = np.array([clip["label"] for clip in clips])
            self.labels = labels.astype(np.int64 if labels.ndim == 1 else np.float32)
            self.num_labels = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
        self._first = np.cumsum(self.lengths) - self.lengths  # each clip's first frame among all frames
        self._shard_ends = np.cumsum([shard["bytes"] for shard in info["shards"]])

    def __len__(self):
        return len(self.lengths)

    def __reduce__(self):
        return Clips, (self.path,)

    def condition(self, clip):
        """What a model is told of clip number `clip`: float32 [num_labels], a class as a one-hot vector."""
        if self.labels is not None and self.labels.ndim == 2:
            return self.labels[clip]
        vector = np.zeros(self.num_labels, np.float32)
        if self.labels is not None:
            vector[self.labels[clip]] = 1
        return vector

    def frames(self, clip, indices):
        """Frames `indices` of clip number `clip` → uint8 [n,3,R,R]; decodes those and no others."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.lengths[clip]:
            raise IndexError(f"clip {clip} has {self.lengths[clip]} frames; asked for {indices.tolist()}")
        out = np.empty((len(indices), 3, self.resolution, self.resolution), np.uint8)
        decoder = _decoder(self.resolution)
        for image, index in zip(out, indices):
            try:
                decoder.decode(self._coded(self._first[clip] + index), image)
            except (av.FFmpegError, ValueError, IndexError):  # IndexError: an offset that lies in no shard
                raise UserError(
                    f"{self.path}: frame {index} of {self.names[clip]} is damaged; prepare it again"
                ) from None
        return out

    def _coded(self, frame):
        start, stop = self._offsets[frame : frame + 2]
        shard = int(np.searchsorted(self._shard_ends, start, side="right"))
        base = self._shard_ends[shard] - len(self._maps[shard])
        return self._maps[shard][start - base : stop - base].tobytes()


_local = threading.local()


def _decoder(resolution):
    """This thread's decoder: codec contexts may be shared neither between threads nor across a fork."""
    key = os.getpid(), resolution
    if getattr(_local, "key", None) != key:
        _local.key, _local.decoder = key, FrameDecoder(resolution)
    return _local.decoder


# ------------------------------------------------------------------------------------------------------- frame sampling


def sample_span(length, num_frames, rng):
    """Frames of one sample relative to its first: int64 [T], 0 … span ascending, T−2 distinct ones strictly between.

    The span is uniform over those of SPANS that fit into the clip and hold num_frames, else just num_frames − 1.
    """
    if length < num_frames:
        raise ValueError(f"a clip of {length} frames cannot give {num_frames}")
    if num_frames == 1:
        return np.zeros(1, np.int64)
    fitting = [span for span in SPANS if num_frames - 1 <= span <= length - 1]
    span = int(rng.choice(fitting)) if fitting else num_frames - 1
    between = 1 + np.sort(rng.choice(span - 1, num_frames - 2, replace=False))
    return np.concatenate(([0], between, [span])).astype(np.int64)


def sample_uniform(length, num_frames, rng):
    """As sample_span, without its spans: once the offset is drawn too, any T frames of the clip are equally likely."""
    if length < num_frames:
        raise ValueError(f"a clip of {length} frames cannot give {num_frames}")
    frames = np.sort(rng.choice(length, num_frames, replace=False))
    return frames - frames[0]


SAMPLINGS = {"spans": sample_span, "uniform": sample_uniform}


def sample_real(length, num_frames, rng, max_num_frames=1024, sampling="spans"):
    """Which frames of a clip to show the discriminator: (frame indices int64 [T], times float64 [T]).

    A clip longer than max_num_frames is cut to a random window first, from whose start the times count.
    """
    window = int(rng.integers(0, length - max_num_frames + 1)) if length > max_num_frames else 0
    length = min(length, max_num_frames)
    relative = SAMPLINGS[sampling](length, num_frames, rng)
    times = rng.integers(0, length - relative[-1]) + relative  # the offset is in [0, length − span − 1]
    return window + times, times.astype(np.float64)


def sample_fake(lengths, batch, num_frames, rng, max_num_frames=1024, sampling="spans"):
    """Times for the generator: float64 [batch,T]. As sample_real, with a length drawn from the data's."""
    lengths = np.minimum(lengths, max_num_frames)
    lengths = lengths[lengths >= num_frames]
    if not len(lengths):
        raise ValueError(f"no clip has {num_frames} frames")
    t = np.empty((batch, num_frames))
    for row, length in zip(t, rng.choice(lengths, batch)):
        relative = SAMPLINGS[sampling](length, num_frames, rng)
        row[:] = rng.uniform(0, length - relative[-1] - 1) + relative
    return t


# -------------------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    frames: torch.Tensor  # uint8 [B,T,3,R,R]
    t: torch.Tensor  # float32 [B,T], in frames
    label: torch.Tensor  # float32 [B, num_labels], of `Clips.condition`; [B, 0] without labels


class _Batches:
    """Batch number k by index: the pure function that threads or worker processes evaluate ahead."""

    def __init__(self, clips, batch_size, num_frames, seed, mirror, max_num_frames, sampling, rank, world):
        self.clips, self.batch_size, self.num_frames = clips, batch_size, num_frames
        self.seed, self.mirror, self.max_num_frames, self.sampling = seed, mirror, max_num_frames, sampling
        self.rank, self.world = rank, world
        self.usable = np.flatnonzero(clips.lengths >= num_frames)
        self.reading = None  # [workers, 2]: each worker process's id and the clip that it is reading
        if not len(self.usable):
            longest = clips.lengths.max()
            raise UserError(f"{clips.path}: no clip has {num_frames} frames (the longest has {longest})")

    def __getitem__(self, k):
        clips, samples, orders = self.clips, [], {}
        first = (k * self.world + self.rank) * self.batch_size
        for i in range(first, first + self.batch_size):
            epoch, place = divmod(i, len(self.usable))
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([self.seed, 0, epoch]).permutation(self.usable)
            samples.append((orders[epoch][place], np.random.default_rng([self.seed, 1, i])))
        frames = np.empty((self.batch_size, self.num_frames, 3, clips.resolution, clips.resolution), np.uint8)
        t = np.empty((self.batch_size, self.num_frames), np.float32)
        label = np.empty((self.batch_size, clips.num_labels), np.float32)
        for b, (clip, rng) in enumerate(samples):
            if self.reading is not None:
                self.reading[torch.utils.data.get_worker_info().id, 1] = int(clip)
            indices, t[b] = sample_real(clips.lengths[clip], self.num_frames, rng, self.max_num_frames, self.sampling)
            images = clips.frames(clip, indices)
            frames[b] = images[..., ::-1] if self.mirror and rng.random() < 0.5 else images
            label[b] = clips.condition(clip)
        return Batch(torch.from_numpy(frames), torch.from_numpy(t), torch.from_numpy(label))


def batches(
    clips, batch_size, num_frames, seed, start=0, mirror=True, workers=0, max_num_frames=1024, device="cpu",
    sampling="spans", rank=0, world=1,
):  # fmt: skip
    """Yields Batch number start, start + 1, … on `device`, forever; close() it, or drop it, to stop.

    Each pass over the data takes every clip once, in an order that depends on (seed, pass). mirror: half of the clips
    are flipped left to right, all frames alike. sampling: "spans" (spec §8) or "uniform" (any frames of the clip).
    workers: processes that decode ahead; 0 uses one thread, enough for small models. rank, world: this process and how
    many there are; each has its own batch_size clips of a batch. Raises UserError where no clip has num_frames frames,
    a clip is damaged, or a worker process dies.
    """
    if sampling not in SAMPLINGS or not 0 <= rank < world:
        raise ValueError(f"sampling {sampling!r} of {list(SAMPLINGS)}, rank {rank} of {world}")
    # This complains now, not at the first batch.
    source = _Batches(clips, batch_size, num_frames, seed, mirror, max_num_frames, sampling, rank, world)
    pin = torch.device(device).type == "cuda"
    ahead = _by_processes(source, start, workers, pin) if workers else _by_thread(source, start, pin)
    return _upload(ahead, device) if pin else _deliver(ahead, device)


def _deliver(ahead, device):
    with closing(ahead):
        for batch in ahead:
            yield Batch(*(tensor.to(device) for tensor in batch))


def _upload(ahead, device):
    """Copies pinned batches to the GPU on a stream of their own, so that they need not wait for the step before them,
    whose kernels are still queued when the host asks for the next batch."""
    stream = torch.cuda.Stream(device)
    with closing(ahead):
        for batch in ahead:
            with torch.cuda.stream(stream):
                batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for tensor in batch:
                tensor.record_stream(current)  # else its memory could be given to the next copy too soon
            yield batch


def _by_thread(source, start, pin):
    def make(k):
        return Batch(*(tensor.pin_memory() for tensor in source[k])) if pin else source[k]

    pool = ThreadPoolExecutor(1)
    try:
        pending = deque(pool.submit(make, k) for k in (start, start + 1))
        for k in itertools.count(start + 2):
            yield pending.popleft().result()
            pending.append(pool.submit(make, k))
    finally:
        pool.shutdown(cancel_futures=True)


def _by_processes(source, start, workers, pin):
    source.reading = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()
    loader = torch.utils.data.DataLoader(
        _Reporting(source),
        batch_size=None,
        sampler=itertools.count(start),
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # else starting the loader would advance the global one, and resuming change a run
        worker_init_fn=functools.partial(_begin_worker, source.reading),
    )
    on_child = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, on_child)  # the loader's own would raise errors in the middle of a training step
    try:
        while True:
            try:
                batch = next(iterator)
            except (RuntimeError, OSError, EOFError) as error:  # what the loader says when a worker is gone
                raise _dead_worker(source) or error from None
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        iterator = None  # ends the workers even if an exception's traceback keeps this frame


def _begin_worker(reading, worker):
    """Signals that reach a whole process group or job are the training process's: it needs the workers to go on."""
    reading[worker, 0] = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _dead_worker(source):
    """The UserError for a worker process that is gone, or None if all of them live."""
    for _ in range(20):  # a dying process closes its connections a moment before it is gone
        alive = {child.pid for child in multiprocessing.active_children()}
        clips = [clip for process, clip in source.reading.tolist() if process and process not in alive]
        if clips:
            return UserError(f"{source.clips.path}: a loader process died (killed, or short of memory) while reading "
                             f"the clip {source.clips.names[clips[0]]}: try fewer --workers, or 0 for none")
        time.sleep(0.05)
    return None


class _Reporting(torch.utils.data.Dataset):
    """Hands UserErrors over as values: the DataLoader would wrap them in a worker's traceback."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, k):
        try:
            return self.source[k]
        except UserError as error:
            return error


# ----------------------------------------------------------------------------------------------------- opening any data


def open_data(path, dataset, resolution, cache=None):
    """Whatever the user has → Clips of the right resolution.

    path: a packed folder, or videos or frames in any form that prepare takes, which are packed once: beside the source,
    or under `cache` (default data/cache) when that is given or the place beside is read-only; packed again when the
    source changes. None: data/<dataset>, else for "sky" the built-in procedural sky. Raises UserError.
    """
    if path is None:
        found = [p for p in (Path("data", dataset), Path("data", f"{dataset}.zip")) if p.exists()]
        if not found and dataset == "sky":
            return _builtin_sky(resolution, Path(cache or "data"))
        if not found:
            raise UserError(
                f"no data: put videos or frames of '{dataset}' into data/{dataset}, or say where with --data PATH"
            )
        path = found[0]
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if {"index.json", "offsets.npy"} <= (files := set(os.listdir(path) if path.is_dir() else ())) or JOURNAL in files:
        clips = Clips(path)
        if clips.resolution != resolution:
            raise UserError(
                f"{path} holds frames of {clips.resolution} pixels, the model takes {resolution}; "
                f"change the model's resolution or prepare the videos again with --resolution {resolution}"
            )
        return clips
    origin = {"source": str(path.resolve()), "fingerprint": sources.fingerprint(path)}
    place = _cache_place(path, resolution, cache)
    return _cached(place, resolution, origin, lambda: sources.find_sources(path))


def _builtin_sky(resolution, folder):
    origin = {"source": "sky", "version": sky.VERSION, "clips": sky.CLIPS, "frames": sky.FRAMES}
    return _cached(folder / f"sky-builtin-{resolution}px.clips", resolution, origin, sky.clips, builtin=True)


def _cache_place(path, resolution, cache):
    path = path.resolve()
    name = f"{path.stem if path.is_file() else path.name}-{resolution}px.clips"
    # Root may write anywhere; a folder without any write permission is still meant to be left alone.
    writable = os.access(path.parent, os.W_OK) and path.parent.stat().st_mode & 0o222
    if cache is None and writable:
        return path.parent / name
    # Sources of the same name from different places must not take turns in one cache.
    return Path(cache or "data/cache") / f"{sha256(str(path).encode()).hexdigest()[:8]}-{name}"


def _cached(place, resolution, origin, find_sources, builtin=False):
    """The packed folder at `place` if it was made from `origin`, else made now."""
    try:
        clips = Clips(place)
        if clips.info.get("origin") == origin:
            return clips
    except UserError:
        pass  # not there, or of another version, or damaged: it is only a cache
    print(f"packing {origin['source']} at {resolution} pixels into {place} (once)")
    index = prepare.pack(find_sources(), place, resolution, extra={"origin": origin, "builtin": builtin}, replace=True)
    print(prepare.summary(index))
    return Clips(place)
