"""A run and its folder: its configuration, starting it and going on with it, and what stops it, on
purpose or not. progress.py has what it writes and says on its way.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

from mostgan import checkpoint, distributed
from mostgan.config import ModelConfig, TrainConfig, UserError
from mostgan.data import usable_clips
from mostgan.device import pick_device
from mostgan.files import read_json, write_whole
from mostgan.pieces import processes_of
from mostgan.program import is_out_of_memory

# What weights, random streams and the loader's position depend on, and the presets, which chose all
# else at the start.
FIXED = ("preset", "dataset", "start_from", "conditional", "seed", "batch_clips")
VERSION = 2  # of what a run's steps draw at random: a run goes on with the version it began with


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
    named, and the one before is taken; UserError where nothing fits.
    """
    # On other nodes than that of the failure, torchrun restarts processes without counting.
    (restarted,) = distributed.any_of(distributed.restarted())
    found = None
    if distributed.main():
        path = _run_or_checkpoint(out, resume, restarted)
        found = _resume(path) if path else None
    told = distributed.from_main(f"{found.run}\n{found.checkpoint or ''}" if found else "")
    if not told:
        return None
    run, checkpoint_path = told.split("\n")
    return Resume(Path(run), Path(checkpoint_path) if checkpoint_path else None)


def _run_or_checkpoint(out, resume, restarted):
    """The path that is to be gone on with, or None: a new run."""
    if resume and out is not None:
        raise UserError(f"--resume {resume} goes on in that run's own folder: leave out --out")
    if resume:
        return Path(resume)
    if resume is None and not restarted:
        return None
    if resume is None:  # what torchrun has started again may not have made its folder yet
        out = out or _launched_by(distributed.launch())
        return out if out is not None and (out / "config.json").exists() else None
    if out is None:
        newest = checkpoint.newest_of_all()
        if newest is None:
            raise UserError("no run in runs/ to go on with: start one, or name one with --resume")
        return newest.parent
    return out if (out / "config.json").exists() else None


def _resume(path):
    """The Resume of a run folder, or of one of its checkpoints. UserError where it is neither."""
    if not (path / "config.json").exists():
        raise UserError(f"there is no run or checkpoint at {path}")
    is_model = (path / "model.safetensors").exists()
    if is_model and not (path / "training.json").exists():
        raise UserError(
            f"{path} is an imported checkpoint, not a run to go on with: start a new one from it "
            f"with: python train.py --start-from {path}"
        )
    if not is_model and not path.name.startswith("checkpoint-"):
        return Resume(path, checkpoint.newest_whole(path))
    if wrong := checkpoint.damage(path):
        newest = f"go on from the newest whole one with --resume {path.parent}"
        raise UserError(f"{path} is damaged: {wrong}; {newest}")
    return Resume(path.parent, path)


def _launched_by(launch, runs="runs"):
    """The newest run that this torchrun started, or None."""
    configs = Path(runs).glob("*/config.json")
    own = [path for path in configs if read_json(path).get("torchrun") == launch]
    return max(own, key=lambda path: path.stat().st_mtime).parent if own else None


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

    Prints what changed. Raises UserError naming the fields that do not fit.
    """
    run, old = resume.run, read_config(resume.run)
    _check_data(resume, read_json(run / "config.json"), clips)
    new = dataclasses.replace(config, data=_data_path(config, clips))
    before, now = _fields(old), _fields(new)
    changed = [name for name in before if before[name] != now[name]]
    told = {name: f"{name} {before[name]} → {now[name]}" for name in changed}
    wrong = [told[name] for name in changed if _is_fixed(name)]
    if wrong:
        raise UserError(
            f"{run} cannot go on with another {', '.join(wrong)}: leave that out, or start a new "
            "run"
        )
    if changed:
        print(f"changed since {run} was started: {', '.join(told.values())}")
    _write_config(run, config, clips)
    checkpoint.tidy(run)
    step = -1
    if resume.checkpoint is not None:
        step = int(resume.checkpoint.name.removeprefix("checkpoint-"))
    for path in checkpoint.set_aside(run, step):
        print(f"{path.name} is not of this course any more: set aside")


def _fields(config):
    """All fields of a TrainConfig by name, those of its model as model.<name>."""
    fields = dict(vars(config))
    return fields | {f"model.{name}": value for name, value in vars(fields.pop("model")).items()}


def _is_fixed(name):
    return name in FIXED or name.startswith("model.") and name != "model.fps"


def _check_data(resume, described, clips):
    """UserError where the data are not those that a run was trained on, unless the command line
    names them.
    """
    before = described.get("data_fingerprint")
    if before in (None, clips.fingerprint):
        return
    run, path, count = resume.run, clips.info.get("origin") or clips.path, described.get("clips")
    if not resume.names_data:
        raise UserError(
            f"{run} was trained on other clips than {path} has now ({count} then, {len(clips)} "
            "now): name the data to go on with by --data, or put back the former ones"
        )
    print(
        f"warning: {run} goes on with other data than before: {path}, {len(clips)} clips instead "
        f"of {count}"
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
    described = {"version": VERSION} | dataclasses.asdict(config) | data
    if distributed.launch():
        described["torchrun"] = distributed.launch()
    write_whole(run / "config.json", json.dumps(described, indent=2) + "\n")


def lock(run, option="--out"):
    """Keep other processes from training in a folder until this one ends. UserError if one does
    already; option: that names another folder.
    """
    handle = os.open(run / ".lock", os.O_CREAT | os.O_WRONLY, 0o644)  # stays open
    try:
        # Unlike flock's, this lock is not its forked workers' too.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is training in {run}: stop it, or choose another {option}"
        ) from None
    except OSError:
        pass  # a file system without locks


def read_config(run):
    """The TrainConfig of a run folder; UserError if it has none."""
    path = run / "config.json"
    try:
        values = json.loads(path.read_text())
        if "batch_clips" in values and values.get("version") != VERSION:
            raise UserError(
                f"{run} was started by another version of MoStGAN-V, and cannot go on: start a "
                f"new run from its newest checkpoint with: python train.py --start-from {run}"
            )
        fields = {field.name for field in dataclasses.fields(TrainConfig)} - {"model"}
        chosen = {name: value for name, value in values.items() if name in fields}
        return TrainConfig(ModelConfig(**values["model"]), **chosen)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


# ------------------------------------------------------------------------------------ configuration


def with_data(config, clips):
    """The configuration with what the data decides: the sizes of conditions, and the frame rate."""
    if config.conditional and not clips.num_labels + clips.frame_condition_dim:
        other = "" if config.start_from else ", or leave out --conditional"
        raise UserError(
            f"a conditional model needs labels or conditions, but {clips.path} has none: prepare "
            f"the clips with --labels or --conditions{other}"
        )
    model = dataclasses.replace(
        config.model,
        num_labels=clips.num_labels if config.conditional else 0,
        frame_condition_dim=clips.frame_condition_dim if config.conditional else 0,
        fps=config.model.fps or clips.fps,
    )
    usable_clips(clips, model.frames_per_clip)  # complains now, before there is a folder
    return dataclasses.replace(config, model=model)


def with_shares(config):
    """The batch in pieces enough for every process to have as many; see distributed.py."""
    processes = distributed.size()
    if config.batch_clips % processes:
        raise UserError(
            f"{processes} processes cannot share a batch of {config.batch_clips} clips: "
            "choose --batch-clips to be a multiple"
        )
    split = config.batch_split
    while config.batch_clips % split or split % processes:
        split += 1
    if split != config.batch_split:
        distributed.say(
            f"batch_split is {split} instead of {config.batch_split}, for {processes} processes to "
            "share"
        )
    return dataclasses.replace(config, batch_split=split)


def fine_tuning(config, path):
    """config with the model of the checkpoint at path, and with an average that keeps what the
    checkpoint's has.
    """
    if Path(path).is_file() and not path.endswith((".json", ".safetensors")):
        raise UserError(
            f"{path} is a file, and a checkpoint is a folder. Import a released snapshot with: "
            f"python -m mostgan.checkpoint import {path} runs/released --training"
        )
    model = dataclasses.replace(checkpoint.read_config(checkpoint.find(path)), fps=None)
    conditional = model.num_labels + model.frame_condition_dim > 0
    return dataclasses.replace(config, model=model, conditional=conditional, ema_rampup=0.0)


# ---------------------------------------------------------------------------- what stops a training


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


@contextlib.contextmanager
def memory_advice(config, run):
    """Turns running out of memory into a UserError that names the next larger batch_split that is
    possible; or on a CPU, where pieces run side by side, to take one after the other.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        clips, group, processes = config.batch_clips, config.model.mbstd_group, distributed.size()
        again = f"no larger --batch-split is possible than {config.batch_split}: "
        again += "start with a smaller model"
        for split in range(config.batch_split + 1, clips + 1):
            piece = clips // split
            if clips % split == 0 == split % processes and piece % min(group, piece) == 0:
                again = f"go on with: {distributed.resume_command(run)} --batch-split {split}"
                break
        told = f"{clips // config.batch_split} clips at a time"
        if processes_of(config, pick_device()) > 1:
            told += " in each of several processes"
            again = f"go on with one: OMP_NUM_THREADS=1 {distributed.resume_command(run)}"
        raise UserError(f"out of memory with {told}; {again}") from None
