"""Packed clips → batches of frames and times: opening, conditions of a clip by its name, frame
sampling (spec §8), an endless reproducible loader.

Sample number i of a run is a pure function of (seed, i), so a run resumed at batch k goes on
exactly as if it had never stopped. Of `world` processes, each takes its part of every batch, in the
order of their ranks: together they make the run that one process would make with batches `world`
times as large.
"""

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

from mostgan.config import UserError
from mostgan.files import read_json
from mostgan.motion import condition_at
from mostgan.program import cores

SPANS = (2, 4, 8, 16, 32)  # frames between the first and the last frame of a sample
FORMAT, VERSION = "mostgan-clips", 3  # of packed folders; mostgan/prepare/pack.py tells the rest


# ------------------------------------------------------------------------------------- packed clips


def is_packed(path):
    """Whether a folder holds packed clips, of this version or an earlier one, rather than videos or
    pictures.
    """
    path = Path(path)
    if "made by" in read_json(path / "plan.json") or (path / "packing.jsonl").is_file():
        return True  # it was not finished
    try:
        with open(path / "index.json", "rb") as file:
            return FORMAT.encode() in file.read(200)
    except OSError:
        return False


def read_index(path):
    """The index of a packed folder, a dict. Raises UserError where there is none, or one of another
    version.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder of packed clips")
    if not (path / "index.json").is_file():
        if (path / "plan.json").is_file():
            raise UserError(f"{path} was not finished: the same prepare command goes on")
        raise UserError(f"{path} holds no packed clips")
    try:
        index = json.loads((path / "index.json").read_text(encoding="utf-8"))
        format, version = index["format"], index["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path / 'index.json'} is damaged; prepare {path} again") from None
    if (format, version) != (FORMAT, VERSION):
        formats = f"its format is {format} {version}, ours is {FORMAT} {VERSION}"
        told = f"{path} was packed by another version ({formats})"
        raise UserError(f"{told}; prepare the videos again")
    return index


class Clips:
    """An opened packed folder. Cheap to open and to pickle; nothing of a clip is kept open.

    path; resolution; fps (median of the clips); names, a list; lengths int64 [N]; labels: None,
    int64 [N] (classes) or float32 [N, C] (vectors); num_labels: 0, the number of classes, or C;
    frame_condition_dim: E, 0 without frame conditions; fingerprint: a checksum of all of it;
    builtin: whether this is the procedural sky; info: the index, a dict. Raises UserError naming
    the path where it is missing, of another version, or incomplete.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.info = read_index(self.path)
        try:
            self._read(self.info)
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.path / 'index.json'} is damaged; prepare {self.path} again"
            ) from None
        missing = {*self._files, *self.info["files"]}.difference(os.listdir(self.path))
        if missing:
            raise UserError(f"{self.path / min(missing)} is missing; prepare {self.path} again")
        if self.num_labels and self.labels is None:
            self.labels = self._read_vectors()

    def _read(self, info):
        clips = info["clips"]
        self.resolution, self.fingerprint = info["resolution"], info["fingerprint"]
        self.builtin, self._coding = info.get("builtin", False), info["coding"]
        self.names, self._files = clips["name"], clips["file"]
        self.lengths = np.array(clips["frames"], np.int64)
        self.rates = np.array(clips["fps"], np.float64)
        self.fps = float(np.median(self.rates))
        labels = info.get("labels") or {}
        self.num_labels = labels.get("size") or len(labels.get("classes", ()))
        self.labels = np.array(clips["label"], np.int64) if "classes" in labels else None
        self.frame_condition_dim = labels.get("frame_size", 0)
        if not len(self.names) == len(self._files) == len(self.lengths) == len(self.rates) > 0:
            raise ValueError("columns of different lengths")

    def _read_vectors(self):
        file = self.path / "labels.safetensors"
        try:
            labels = safetensors.numpy.load_file(file)["labels"]
        except (OSError, SafetensorError, KeyError, TypeError):
            labels = None
        if labels is None or labels.shape != (len(self), self.num_labels):
            raise UserError(f"{file} is damaged; prepare {self.path} again")
        return labels

    def __len__(self):
        return len(self.lengths)

    def __reduce__(self):
        return Clips, (self.path,)

    def condition(self, clip):
        """What a model is conditioned on: float32 [num_labels], of a class its one-hot vector (spec
        §13).
        """
        if self.labels is None:
            return np.zeros(0, np.float32)
        if self.labels.ndim == 2:
            return self.labels[clip]
        return np.eye(1, self.num_labels, int(self.labels[clip]), dtype=np.float32)[0]

    def frame_condition(self, clip, t):
        """The frame conditions of clip number `clip` at real times t [T], in frames: float32 [T,
        frame_condition_dim], as `condition_at` has them. Reads those rows and no others.
        """
        file, E = self.path / "frame_conditions.safetensors", self.frame_condition_dim
        if not E:
            return np.zeros((len(t), 0), np.float32)
        try:
            with open(file, "rb", buffering=0) as opened:
                begin = 8 + int.from_bytes(opened.read(8), "little")
                rows = np.memmap(opened, np.float32, "r", begin).reshape(-1, E)
            if len(rows) != self.lengths.sum():
                raise ValueError("it is cut off")
        except (OSError, ValueError, OverflowError):
            raise UserError(f"{file} is damaged; prepare {self.path} again") from None
        first = self.lengths[:clip].sum()
        return condition_at(rows[first : first + self.lengths[clip]], t)

    def frames(self, clip, indices):
        """Frames `indices` of clip number `clip` → uint8 [n, 3, R, R]; reads those and no others.

        Raises IndexError outside the clip, UserError naming the file where it is damaged.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.lengths[clip]:
            raise IndexError(
                f"clip {clip} has {self.lengths[clip]} frames; asked for {indices.tolist()}"
            )
        file, length = self.path / self._files[clip], int(self.lengths[clip])
        out = np.empty((len(indices), 3, self.resolution, self.resolution), np.uint8)
        try:
            read_clip(file, indices, length, self._coding, out)
        except (OSError, ValueError, SyntaxError) as error:
            text = f"{file} ({self.names[clip]}) is damaged ({error})"
            again = f"remove it, and prepare {self.path} again"
            raise UserError(" ".join(f"{text}; {again}".split())) from None
        return out


def read_clip(path, indices, length, coding, out):
    """Reads frames `indices` of a clip's file, which has `length` frames, into `out` [n, 3, R, R].

    The file is opened once and read where the frames lie, which is several times as fast as by the
    library: its tensors come after a header, `frames` alone, or `jpeg` and at the end `offsets`.
    """
    with open(path, "rb", buffering=0) as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        end = os.fstat(file.fileno()).st_size
        if coding == "raw":
            if end - begin != length * out[:1].nbytes and len(out):
                raise ValueError("it is cut off, or no clip of ours")
            for image, i in zip(out, indices):
                file.seek(begin + int(i) * image.nbytes)
                file.readinto(image)
            return
        offsets = end - 8 * (length + 1)
        total = int.from_bytes(_read_at(file, end - 8, 8), "little")
        if not 0 <= offsets - begin - total < 8:
            raise ValueError("it is cut off, or no clip of ours")
        for image, i in zip(out, indices):
            start, stop = np.frombuffer(_read_at(file, offsets + 8 * int(i), 16), np.int64)
            image[:] = decode_jpeg(_read_at(file, begin + int(start), int(stop - start)))


def _read_at(file, begin, size):
    file.seek(max(0, begin))
    return file.read(size)


def decode_jpeg(data):
    """The bytes of a JPEG → uint8 [3, H, W], by Pillow, as the other codebases of the field do."""
    image = Image.open(io.BytesIO(data), formats=["JPEG"])
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB")).transpose(2, 0, 1)


# ------------------------------------------------------------------------------ conditions by name


def read_conditions(label, words):
    """--label and --condition of a program → the conditions that `render` takes, a dict.

    label: a class, or None; words: FOLDER:NAME, the conditions of clip NAME of a packed folder, at
    its frames; or FILE:NAME, those in a file as prepare takes it (of one clip: FILE), a row for
    each frame; or the numbers of a clip's vector, or nothing. UserError if they are none of these.
    """
    if not words:
        return {"label": label}
    with contextlib.suppress(ValueError):
        return {"label": [float(number) for number in words]}
    if len(words) > 1 or not words[0]:
        raise UserError(f"--condition {' '.join(words)}: neither a file nor numbers")
    # Either name may have colons.
    ends = [i for i, letter in enumerate(words[0] + ":") if letter == ":" and words[0][:i]]
    there = [end for end in ends if Path(words[0][:end]).exists()]
    if not there:
        raise UserError(f"--condition {words[0]}: there is no such file or folder")
    path, name = Path(words[0][: there[-1]]), words[0][there[-1] + 1 :]
    if path.is_dir():
        return _given(*_of_packed(Clips(path), name), label)
    try:
        entries = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    names = sorted({key.removesuffix("/frames") for key in entries})
    if not name and len(names) == 1:
        (name,) = names
    if name not in names:
        raise UserError(_no_clip(path, name, names))
    return _given(entries.get(name), entries.get(f"{name}/frames"), label)


def _no_clip(path, name, names):
    """What is wrong with a --condition whose clip, `name`, is not among those that a file has."""
    if not names:
        return f"--condition: {path} has no conditions"
    asked = f"has no clip {name}" if name else f"has {len(names)} clips"
    return f"--condition: {path} {asked}; give one, such as {path}:{names[0]}"


def _given(of_clip, of_frames, label):
    if of_clip is not None and label is not None:
        raise UserError("--label and --condition exclude each other: the clip has a vector")
    label = label if of_clip is None else torch.as_tensor(of_clip).float()
    return {"label": label, "frame_condition": of_frames}


def _of_packed(clips, name):
    """The vector of a clip in a packed folder, and those of its frames; None without them."""
    if name not in clips.names:
        raise UserError(_no_clip(clips.path, name, clips.names))
    clip = clips.names.index(name)
    rows = clips.frame_condition(clip, np.arange(clips.lengths[clip]))
    of_frames = torch.from_numpy(rows) if clips.frame_condition_dim else None
    return clips.condition(clip) if clips.num_labels else None, of_frames


# ----------------------------------------------------------------------------------- frame sampling


def sample_span(length, num_frames, rng):
    """Frames of one sample relative to its first: int64 [T], 0 … span ascending, T−2 distinct ones
    strictly between.

    The span is uniform over those of SPANS that fit into the clip and hold num_frames, else just
    num_frames − 1.
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
    """As sample_span, without its spans: once the offset is drawn too, any T frames of the clip are
    equally likely.
    """
    if length < num_frames:
        raise ValueError(f"a clip of {length} frames cannot give {num_frames}")
    frames = np.sort(rng.choice(length, num_frames, replace=False))
    return frames - frames[0]


SAMPLINGS = {"spans": sample_span, "uniform": sample_uniform}


def sample_real(length, num_frames, rng, max_num_frames=1024, sampling="spans"):
    """Which frames of a clip to show the discriminator: (frame indices int64 [T], times float64
    [T]).

    A clip longer than max_num_frames is cut to a random window first, from whose start the times
    count.
    """
    window = int(rng.integers(0, length - max_num_frames + 1)) if length > max_num_frames else 0
    length = min(length, max_num_frames)
    relative = SAMPLINGS[sampling](length, num_frames, rng)
    # The offset is in [0, length − span − 1].
    times = rng.integers(0, length - relative[-1]) + relative
    return window + times, times.astype(np.float64)


def sample_fake(lengths, batch, num_frames, rng, max_num_frames=1024, sampling="spans"):
    """Times for the generator: float64 [batch,T]. As sample_real, with a length drawn from the
    data's.
    """
    lengths = np.minimum(lengths, max_num_frames)
    lengths = lengths[lengths >= num_frames]
    if not len(lengths):
        raise ValueError(f"no clip has {num_frames} frames")
    t = np.empty((batch, num_frames))
    for row, length in zip(t, rng.choice(lengths, batch)):
        relative = SAMPLINGS[sampling](length, num_frames, rng)
        row[:] = rng.uniform(0, length - relative[-1] - 1) + relative
    return t


# ------------------------------------------------------------------------------------------ batches


class Batch(NamedTuple):
    frames: torch.Tensor  # uint8 [B,T,3,R,R]
    t: torch.Tensor  # float32 [B,T], in frames
    # float32 [B, num_labels]: one-hot of classes, vectors as they are, [B, 0] without labels
    label: torch.Tensor
    frame_condition: torch.Tensor  # float32 [B, T, frame_condition_dim]


def usable_clips(clips, num_frames):
    """The clips that have so many frames, by number: int64 [n]. UserError where none has."""
    usable = np.flatnonzero(clips.lengths >= num_frames)
    if not len(usable):
        longest = clips.lengths.max()
        raise UserError(
            f"{clips.path}: no clip has {num_frames} frames (the longest has {longest})"
        )
    return usable


class _Batches:
    """Batch number k by index: the pure function that threads or workers evaluate ahead."""

    def __init__(
        self, clips, batch_size, num_frames, seed, mirror, max_num_frames, sampling, rank, world
    ):
        self.clips, self.batch_size, self.num_frames = clips, batch_size, num_frames
        self.seed, self.mirror, self.sampling = seed, mirror, sampling
        self.max_num_frames, self.rank, self.world = max_num_frames, rank, world
        self.usable = usable_clips(clips, num_frames)
        self.reading = None  # [workers, 2]: a worker process's id and the clip that it is reading

    def __getitem__(self, k):
        clips, samples, orders = self.clips, [], {}
        first = (k * self.world + self.rank) * self.batch_size
        for i in range(first, first + self.batch_size):
            epoch, place = divmod(i, len(self.usable))
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([self.seed, 0, epoch]).permutation(
                    self.usable
                )
            samples.append((orders[epoch][place], np.random.default_rng([self.seed, 1, i])))
        frames = np.empty(
            (self.batch_size, self.num_frames, 3, clips.resolution, clips.resolution), np.uint8
        )
        t = np.empty((self.batch_size, self.num_frames), np.float32)
        label = np.empty((self.batch_size, clips.num_labels), np.float32)
        of_frames = np.empty((*t.shape, clips.frame_condition_dim), np.float32)
        for b, (clip, rng) in enumerate(samples):
            if self.reading is not None:
                self.reading[torch.utils.data.get_worker_info().id, 1] = int(clip)
            indices, t[b] = sample_real(
                clips.lengths[clip], self.num_frames, rng, self.max_num_frames, self.sampling
            )
            images = clips.frames(clip, indices)
            frames[b] = images[..., ::-1] if self.mirror and rng.random() < 0.5 else images
            label[b] = clips.condition(clip)
            of_frames[b] = clips.frame_condition(clip, indices)
        return Batch(*map(torch.from_numpy, (frames, t, label, of_frames)))


def batches(
    clips,
    batch_size,
    num_frames,
    seed,
    start=0,
    mirror=True,
    workers=0,
    max_num_frames=1024,
    device="cpu",
    sampling="spans",
    rank=0,
    world=1,
):
    """Yields Batch number start, start + 1, … on `device`, forever; close() it, or drop it, to
    stop.

    Each pass over the data takes every clip once, in an order that depends on (seed, pass). mirror:
    half of the clips are flipped left to right, all frames alike. sampling: "spans" (spec §8) or
    "uniform" (any frames of the clip). workers: processes that decode ahead, as many as there are
    cores at most; 0 uses one thread, enough for small models. rank, world: this process and how
    many there are; each has its own batch_size clips of a batch. Raises UserError where no clip has
    num_frames frames, a clip is damaged, or a worker process dies.
    """
    if sampling not in SAMPLINGS or not 0 <= rank < world:
        raise ValueError(f"sampling {sampling!r} of {list(SAMPLINGS)}, rank {rank} of {world}")
    # This complains now, not at the first batch.
    source = _Batches(
        clips, batch_size, num_frames, seed, mirror, max_num_frames, sampling, rank, world
    )
    pin, workers = torch.device(device).type == "cuda", min(workers, cores())
    ahead = (
        _by_processes(source, start, workers, pin) if workers else _by_thread(source, start, pin)
    )
    return _upload(ahead, device) if pin else _deliver(ahead, device)


def _deliver(ahead, device):
    with closing(ahead):
        for batch in ahead:
            yield Batch(*(tensor.to(device) for tensor in batch))


def _upload(ahead, device):
    """Copies pinned batches to the GPU on a stream of their own, so that they need not wait for the
    step before them, whose kernels are still queued when the host asks for the next batch.
    """
    stream = torch.cuda.Stream(device)
    with closing(ahead):
        for batch in ahead:
            with torch.cuda.stream(stream):
                batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            for tensor in batch:
                # Else its memory could be given to the next copy too soon.
                tensor.record_stream(current)
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
        # else starting the loader would advance the global one, and resuming change a run
        generator=torch.Generator(),
        worker_init_fn=functools.partial(_begin_worker, source.reading),
    )
    on_child = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # The loader's own would raise errors in the middle of a training step.
        signal.signal(signal.SIGCHLD, on_child)
    try:
        while True:
            try:
                batch = next(iterator)
            except (
                RuntimeError,
                OSError,
                EOFError,
            ) as error:  # what the loader says when a worker is gone
                raise _dead_worker(source) or error from None
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        iterator = None  # ends the workers even if an exception's traceback keeps this frame


def _begin_worker(reading, worker):
    """Signals that reach a whole process group or job are the training process's: it needs the
    workers to go on.
    """
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
        clips = [
            clip for process, clip in source.reading.tolist() if process and process not in alive
        ]
        if clips:
            return UserError(
                f"{source.clips.path}: a loader process died (killed, or short of memory) while "
                "reading "
                f"the clip {source.clips.names[clips[0]]}: try fewer --workers, or 0 for none"
            )
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
