"""A run folder: its config, going on with it, stats.jsonl, sample grids, and stopping cleanly."""

import dataclasses
import fcntl
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mostgan import checkpoint, distributed
from mostgan.config import ModelConfig, TrainConfig, UserError
from mostgan.device import peak_memory_mb
from mostgan.faults import Skips
from mostgan.video import VideoWriter, film_strips, grid, write_png

GRID_SIDE, GRID_FRAMES = 4, 32  # a snapshot shows 4 × 4 clips of 32 frames …
STRIP_FRAMES = 8  # … and its png these many frames of each, in a row
SHARED_MOTION_SEED = 10_000  # of the grid whose clips all move alike
# What weights, random streams and the loader's position depend on, and the presets, which chose all
# else at the start.
FIXED = ("preset", "dataset", "start_from", "conditional", "seed", "batch_clips")


class Resume(NamedTuple):
    """A run to go on with, and from where: None is from its start, where it was interrupted before
    its first save. names_data: whether the command line says which data, so that they may be others
    than before.
    """

    run: Path
    checkpoint: Path | None
    names_data: bool = False


def what_to_resume(out, resume):
    """The Resume that the command line means, or None: a new run. What the main process finds holds
    for all.

    out: the run folder or None; resume: None, the path of a run or checkpoint, or "": the run in
    out, if there is one already, else the newest of all runs. A torchrun that restarts its
    processes gives them the same command line again, and means its own run. Damaged checkpoints are
    named and passed over; UserError where nothing fits.
    """
    # On other nodes than that of the failure, torchrun restarts processes without counting.
    (restarted,) = distributed.any_of(distributed.restarted())
    if not distributed.main():
        found = distributed.from_main("")
        return (
            Resume(*(Path(path) if path else None for path in found.split("\n"))) if found else None
        )
    found = _what_to_resume(out, resume, restarted)
    distributed.from_main(f"{found.run}\n{found.checkpoint or ''}" if found else "")
    return found


def _what_to_resume(out, resume, restarted):
    if resume is None and restarted:
        resume, out = "", out or _launched_by(distributed.launch())
        if out is None:  # interrupted before it made its folder
            return None
    if resume is None or resume == "" and out is not None and not (out / "config.json").exists():
        return None
    if resume and out is not None:
        raise UserError(f"--resume {resume} goes on in that run's own folder: leave out --out")
    path = (
        out
        if resume == "" and out is not None
        else Path(resume)
        if resume
        else checkpoint.find(None).parent
    )
    if not (path / "config.json").exists():
        raise UserError(f"there is no run or checkpoint at {path}")
    if (path / "model.safetensors").exists() and not (path / "training.json").exists():
        raise UserError(
            f"{path} is an imported checkpoint, not a run to go on with: start a new one from it "
            "with: "
            f"python train.py --start-from {path}"
        )
    if not (path / "model.safetensors").exists() and not path.name.startswith("checkpoint-"):
        return Resume(path, checkpoint.newest_whole(path))
    if wrong := checkpoint.damage(path):
        raise UserError(
            f"{path} is damaged: {wrong}; go on from the newest whole one with --resume "
            f"{path.parent}"
        )
    return Resume(path.parent, path)


def _launched_by(launch, runs="runs"):
    """The newest run that this torchrun started, or None."""
    configs = sorted(Path(runs).glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    return next(
        (
            p.parent
            for p in reversed(configs)
            if json.loads(p.read_text()).get("torchrun") == launch
        ),
        None,
    )


def open_run(out, resume, config, clips):
    """The run folder, made (see start_run) or made ready to be gone on with (see continue_run) by
    the main process.
    """
    if not distributed.main():
        return Path(distributed.from_main(""))
    run = start_run(out, config, clips) if resume is None else resume.run
    lock(run)
    if resume is not None:
        continue_run(resume, config, clips)
    distributed.from_main(str(run))
    return run


def start_run(out, config, clips):
    """Make the run folder: out, or runs/<n>-<dataset>-<preset>. Returns its path; UserError if it
    holds a run.
    """
    if out is None:
        runs = Path("runs")
        numbers = [int(m.group(1)) for p in runs.glob("*") if (m := re.match(r"(\d+)-", p.name))]
        data = config.dataset + ("-builtin" if clips.builtin else "")
        out = runs / f"{max(numbers, default=-1) + 1:05d}-{data}-{config.preset}"
    if (out / "config.json").exists():
        raise UserError(
            f"{out} already holds a run: go on with --resume {out}, or choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_config(out, config, clips)
    return out


def continue_run(resume, config, clips):
    """Make a run folder ready to be gone on with: its config may have changed where the state does
    not depend on it.

    Prints what changed. Raises UserError naming the fields that do not fit, or if another process
    trains there.
    """
    run, old = resume.run, read_config(resume.run)
    described = json.loads((run / "config.json").read_text())
    _check_data(resume, described, clips)
    new = dataclasses.replace(config, data=_data_path(config, clips))
    before, now = (
        {name: getattr(c, name) for name in vars(c) if name != "model"}
        | {f"model.{name}": value for name, value in vars(c.model).items()}
        for c in (old, new)
    )
    changed = {
        name: f"{name} {before[name]} → {now[name]}" for name in before if before[name] != now[name]
    }
    wrong = [
        text
        for name, text in changed.items()
        if name in FIXED or name.startswith("model.") and name != "model.fps"
    ]
    if wrong:
        raise UserError(
            f"{run} cannot go on with another {', '.join(wrong)}: leave that out, or start a new "
            "run"
        )
    if changed:
        print(f"changed since {run} was started: {', '.join(changed.values())}")
    _write_config(run, config, clips)
    checkpoint.tidy(run)
    step = (
        -1 if resume.checkpoint is None else int(resume.checkpoint.name.removeprefix("checkpoint-"))
    )
    for path in checkpoint.set_aside(run, step):
        print(f"{path.name} is not of this course any more: set aside")


def _check_data(resume, described, clips):
    """UserError where the data are not those that a run was trained on, unless the command line
    names them.
    """
    before = described.get("data_fingerprint")
    if before in (None, clips.fingerprint):
        return
    run, path = resume.run, clips.info.get("origin") or clips.path
    if not resume.names_data:
        raise UserError(
            f"{run} was trained on other clips than {path} has now ({described.get('clips')} then, "
            f"{len(clips)} now): name the data to go on with by --data, or put back the former ones"
        )
    print(
        f"warning: {run} goes on with other data than before: {path}, {len(clips)} clips instead "
        "of "
        f"{described.get('clips')}"
    )


def _data_path(config, clips):
    """Where the clips come from: what was packed, or the packed folder that was named; None is the
    built-in sky.
    """
    if config.data is None and clips.builtin:
        return None
    return clips.info.get("origin") or str(clips.path.resolve())


def _write_config(run, config, clips):
    data = {"builtin_data": clips.builtin, "data": _data_path(config, clips), "clips": len(clips)}
    data["data_fingerprint"] = clips.fingerprint
    described = dataclasses.asdict(config) | data
    if distributed.launch():
        described["torchrun"] = distributed.launch()
    write_text(run / "config.json", json.dumps(described, indent=2) + "\n")


def lock(run):
    """Keep other processes from training in a run folder until this one ends. UserError if one does
    already.
    """
    handle = os.open(run / ".lock", os.O_CREAT | os.O_WRONLY, 0o644)  # stays open
    try:
        fcntl.lockf(
            handle, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # unlike flock's, not its forked workers' too
    except BlockingIOError:
        raise UserError(
            f"another process is training in {run}: stop it, or choose another --out"
        ) from None
    except OSError:
        pass  # a file system without locks


def read_config(run):
    """The TrainConfig of a run folder; UserError if it has none."""
    try:
        values = json.loads((run / "config.json").read_text())
        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        model = ModelConfig(**values["model"])
        return TrainConfig(
            **{key: value for key, value in values.items() if key in fields} | {"model": model}
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {run / 'config.json'}: {error}") from None


def write_text(path, text):
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Stats:
    """Means, and counts, since the last line of stats.jsonl. Values stay on their device until a
    line is written.

    Means are over all processes, and over the values that are finite. The main process writes.
    """

    def __init__(self, run, device, say=print):
        self.path, self.device, self.say = run / "stats.jsonl", device, say
        self.values, self.counts, self.since = {}, {}, time.perf_counter()
        self.skips, self.unwritten = Skips(), []  # unwritten: lines that a full disk did not take

    def add(self, **values):
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach().float().mean())

    def add_count(self, **values):
        """Count what every process sees alike."""
        for name, value in values.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def write(self, frames_since, **more):
        """Append a line: the means, `more`, frames/s over frames_since frames, peak memory. Returns
        it as a dict.

        Every process must call it. A mean without finite values is NaN, in the file null.
        """
        now = time.perf_counter()
        line = more | self._means() | {name: int(value) for name, value in self.counts.items()}
        line["frames_per_second"] = round(frames_since / (now - self.since), 2)
        line["peak_memory_mb"] = round(peak_memory_mb(self.device), 1)
        self.values, self.counts, self.since = {}, {}, now
        if distributed.main():
            written = {name: None if value != value else value for name, value in line.items()}
            self.unwritten.append(json.dumps(written) + "\n")
            self._append()
        return line

    def _means(self):
        if not self.values:
            return {}
        stacked = [torch.stack(values) for values in self.values.values()]
        sums = torch.stack([values.nan_to_num(0, 0, 0).sum() for values in stacked])
        finite = torch.stack([values.isfinite().sum() for values in stacked]).float()
        distributed.sum_([sums, finite])
        return {
            name: round(total / count, 6) if count else float("nan")
            for name, total, count in zip(self.values, sums.tolist(), finite.tolist())
        }

    def _append(self):
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.writelines(self.unwritten)
            self.unwritten = []
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)  # no half line
            self.say(
                f"warning: could not write {self.path}: {error.strerror}; kept, to be written with "
                "the next line"
            )

    def drop_after(self, frames):
        """Remove lines past `frames`, which a run resumed from there writes again, and what is not
        a whole line.
        """
        if distributed.main() and self.path.exists():
            kept = []
            for line in self.path.read_text(errors="replace").splitlines(keepends=True):
                try:
                    if line.endswith("\n") and json.loads(line)["frames"] <= frames:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    pass
            write_text(self.path, "".join(kept))


def save_grids(run, generator, clips, frames_done, fps, say=print):
    """Sample grids with fixed latents: one where every clip moves by itself, one where all share
    their motion.

    clips: the real clips, whose classes or condition vectors the generated ones take. A disk that
    is full is said, and does not stop the training.
    """
    count = GRID_SIDE**2
    label = None
    if generator.config.num_labels:
        classes = clips.labels.ndim == 1
        label = [
            i % clips.num_labels if classes else clips.condition(i % len(clips)).tolist()
            for i in range(count)
        ]
    moment = f"{frames_done // 1000:06d}k" + (str(frames_done) if 0 < frames_done < 1000 else "")
    for name, motion_seed in (("samples", None), ("shared-motion", SHARED_MOTION_SEED)):
        windows = generator.render(
            0, frames=GRID_FRAMES, clips=count, motion_seed=motion_seed, label=label, window=4
        )
        made, path = torch.cat(list(windows), dim=1), run / f"{name}-{moment}"
        try:
            write_grid(path, made, fps)
        except OSError as error:
            say(f"warning: could not write {path.name}: {error}")


def save_real_grid(run, clips, fps):
    """The same grid of real clips: their first frames."""
    chosen = np.linspace(0, len(clips) - 1, min(len(clips), GRID_SIDE**2)).astype(int)
    length = (
        min(GRID_FRAMES, *(int(clips.lengths[i]) for i in chosen))
        if len(chosen) > 1
        else int(clips.lengths[0])
    )
    length = min(length, GRID_FRAMES)
    write_grid(
        run / "real",
        torch.from_numpy(np.stack([clips.frames(i, np.arange(length)) for i in chosen])),
        fps,
    )


def write_grid(path, clips, fps):
    """uint8 [n, T, 3, H, W] → path.mp4, all clips side by side, and path.png, a row of frames over
    time per clip.
    """
    with VideoWriter(path.with_suffix(".mp4"), fps) as video:
        video.write(grid(clips, GRID_SIDE, GRID_SIDE))
    write_png(path.with_suffix(".png"), film_strips(clips[: 2 * GRID_SIDE], STRIP_FRAMES))


class StopSignal:
    """SIGINT (Ctrl-C), SIGTERM or SIGUSR1: `requested` is set, and the step is finished and saved.

    A second SIGINT ends the process at once. Checkpoints under their final names are whole at any
    moment.
    """

    def __init__(self, run):
        self.requested, self.interrupted, self.run = False, False, run
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.interrupted and number == signal.SIGINT:
            again = distributed.resume_command(self.run)
            print(f"\nstopped at once; go on from the last checkpoint with: {again}", flush=True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.requested, self.interrupted = True, number == signal.SIGINT
