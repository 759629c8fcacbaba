"""Checkpoints: safetensors and JSON only, complete or absent.

A checkpoint is a folder: model.safetensors (the averaged generator) and config.json (its
ModelConfig) are all that sampling needs; training.safetensors and training.json hold the rest of
the training state, checksums.json the size and SHA-256 of each of them. best.json beside the
checkpoints of a run names the best by a metric, if one was computed. An imported checkpoint
(released.py) has model.safetensors and config.json, too, and beside them, as far as they were asked
for, discriminator.safetensors, last_generator.safetensors (not averaged) and
class_means.safetensors.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import uuid
from importlib import import_module
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mostgan.config import ModelConfig, UserError
from mostgan.discriminator import Discriminator
from mostgan.files import read_json, sha256_of, write_whole
from mostgan.model import Generator

__all__ = [
    "find",
    "from_released_names",
    "load",
    "load_discriminator",
    "load_state",
    "read_tensors",
    "read_training",
    "save",
]

CHECKPOINT_NAME = "checkpoint-{:06d}"
BUILT_IN = Path(__file__).parents[1] / "pretrained" / "sky64"
MODEL_FILES = ("config.json", "model.safetensors")
FILES = (*MODEL_FILES, "training.json", "training.safetensors")


def __getattr__(name):
    """from_released_names is imported when it is asked for: the core needs no released files."""
    if name != "from_released_names":
        raise AttributeError(f"module 'mostgan.checkpoint' has no attribute {name!r}")
    return import_module("mostgan.checkpoint.released").from_released_names


def save(folder, step, config, model, tensors, scalars, keep=2, metric=None):
    """Write checkpoint `step` into folder, whole or not at all; drop all but the newest `keep` and
    the best.

    config: the generator's ModelConfig; model: its averaged state, name → tensor; tensors: name →
    tensor and scalars: JSON values, the rest of the training state; metric: see mark_best. Returns
    the checkpoint's path. Raises OSError if it cannot be written (a full disk); all older
    checkpoints are then still there.
    """
    folder = Path(folder)
    path, temporary = folder / CHECKPOINT_NAME.format(step), folder / f".saving-{uuid.uuid4().hex}"
    try:
        temporary.mkdir()
        for name, state in (("model", model), ("training", tensors)):
            write_tensors(temporary / f"{name}.safetensors", state)
        for name, values in (("config", dataclasses.asdict(config)), ("training", scalars)):
            write_json(temporary / f"{name}.json", values)
        write_json(
            temporary / "checksums.json", {name: _checksum(temporary / name) for name in FILES}
        )
        # On the disk before it gets its name, or a power cut could leave the name without the
        # content.
        for file in [*temporary.iterdir(), temporary]:
            fsync(file)
        if path.exists():
            _remove(path)
        temporary.rename(path)
        fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if metric is not None:
        mark_best(path, metric)
    best = best_checkpoint(folder)
    for old in _checkpoints(folder)[:-keep]:
        if old != best:
            _remove(old)
    return path


def mark_best(path, metric):
    """Note that the checkpoint at path scored `metric`, lower being better as for FVD. A run's best
    is never dropped.

    Returns whether it is the best so far. Call it whenever the score is known, or pass it to
    `save`.
    """
    path = Path(path)
    note = path.parent / "best.json"
    best = read_json(note).get("metric", math.inf) if best_checkpoint(path.parent) else math.inf
    if not metric < best:
        return False
    write_whole(note, json.dumps({"checkpoint": path.name, "metric": float(metric)}) + "\n")
    return True


def best_checkpoint(run):
    """The best checkpoint of a run by the metric given to mark_best, or None."""
    name = read_json(Path(run) / "best.json").get("checkpoint")
    return Path(run) / name if name and (Path(run) / name).is_dir() else None


def write_tensors(path, tensors):
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        path.chmod(0o644)  # safetensors makes files that only their owner reads
    except SafetensorError as error:  # a full disk, most likely; it says all there is to know
        raise OSError(str(error).removeprefix("Error while serializing: ")) from None


def write_json(path, values):
    path.write_text(json.dumps(values, indent=2) + "\n")


def _checksum(path):
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path):
    """Remove a checkpoint so that, killed at any moment, none is left that looks whole and is
    not.
    """
    doomed = path.with_name(f".removing-{uuid.uuid4().hex}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def tidy(run):
    """Remove what killed processes left half-written or half-removed in a run folder."""
    for leftover in [*run.glob(".saving-*"), *run.glob(".removing-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def set_aside(run, step):
    """Rename the checkpoints of a run after `step`, which training from there will make anew.
    Returns the new paths.

    Else, after the next interruption, the newest would be one of a course that was abandoned, or a
    damaged one.
    """
    moved = []
    for path in _checkpoints(run):
        if _step(path) > step:
            target = path.with_name(f"aside-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def _step(path):
    return int(path.name.removeprefix("checkpoint-"))


def _checkpoints(run, file=""):
    """The checkpoints in a run folder that hold `file`, oldest first."""
    named = (p for p in Path(run).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name))
    return sorted((p for p in named if (p / file).exists()), key=_step)


def damage(path, names=FILES):
    """What is wrong with the named files of the checkpoint at path, or None: every byte is as it
    was saved.
    """
    try:
        saved = json.loads((path / "checksums.json").read_text())
        for name in names:
            if not (path / name).exists():
                return f"{name} is missing"
            now = _checksum(path / name)
            if now["bytes"] != saved[name]["bytes"]:
                return f"{name} has {now['bytes']} bytes of {saved[name]['bytes']}"
            if now["sha256"] != saved[name]["sha256"]:
                return f"{name} is not what was saved (its checksum differs)"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return "checksums.json is damaged"
    return None


def newest_whole(run, warn=print):
    """The newest undamaged checkpoint of a run, or None if it has none at all; damaged ones are
    named and passed over.

    Raises UserError if all of them are damaged.
    """
    found = _checkpoints(run)
    for path in reversed(found):
        wrong = damage(path)
        if wrong is None:
            return path
        warn(f"warning: {path} is damaged and passed over: {wrong}")
    if found:
        raise UserError(f"every checkpoint of {run} is damaged: remove them to start over")
    return None


def newest_of_all(runs="runs"):
    """The newest checkpoint of all runs, or None."""
    newest = [
        checkpoint
        for run in Path(runs).glob("*")
        for checkpoint in _checkpoints(run, "model.safetensors")[-1:]
    ]
    return max(newest, key=lambda checkpoint: checkpoint.stat().st_mtime, default=None)


def find(path=None):
    """The checkpoint folder that path means: itself, or the newest in a run folder; None: the
    newest of all runs, or without any the small model that comes with this package.

    Raises UserError if there is none.
    """
    if path is None:
        return newest_of_all() or BUILT_IN
    named = path = Path(path)
    if path.is_file() and path.suffix in (".safetensors", ".json"):
        path = path.parent
    if (path / "model.safetensors").exists():
        return path
    if not path.is_dir() or not _checkpoints(path, "model.safetensors"):
        raise UserError(
            f"{named} is neither a checkpoint (a folder with model.safetensors) nor a run with one"
        )
    return _checkpoints(path, "model.safetensors")[-1]


def load(path=None, device="cpu"):
    """The generator of a checkpoint, ready to sample. path: as `find` takes it. Returns an
    eval-mode Generator.

    Raises UserError on a missing, damaged or wrong checkpoint.
    """
    path = find(path)
    if (path / "checksums.json").exists() and (wrong := damage(path, MODEL_FILES)):
        raise UserError(f"{path} is damaged: {wrong}")
    generator = Generator(read_config(path))
    load_state(generator, read_tensors(path / "model.safetensors"), path)
    if (path / "class_means.safetensors").exists():
        generator.mapping.class_means = read_tensors(path / "class_means.safetensors")["w"]
    return generator.to(device).eval().requires_grad_(False)


def load_state(module, state, path):
    """module.load_state_dict, with a UserError that names the checkpoint if the two do not fit."""
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path} does not fit its config.json: {detail}") from None


def read_tensors(path):
    """name → tensor of a safetensors file; UserError if it is damaged or missing."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_training(path):
    """(tensors, scalars) of a checkpoint's training state; UserError if it has none."""
    path = find(path)
    if not (path / "training.json").exists():
        raise UserError(
            f"{path} holds a model but no training state: it can be sampled from, not resumed"
        )
    scalars = read_file(path / "training.json", json.loads)
    return read_tensors(path / "training.safetensors"), scalars


def read_file(path, parse):
    try:
        return parse(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def load_discriminator(path, device="cpu"):
    """The discriminator beside an imported generator, or of a training checkpoint. UserError if
    there is none.
    """
    path = find(path)
    discriminator = Discriminator(read_config(path))
    state = read_networks(path).get("D")
    if state is None:
        raise UserError(
            f"{path} has no discriminator: import the released file with --discriminator or "
            "--training"
        )
    load_state(discriminator, state, path)
    return discriminator.to(device)


def read_config(path):
    """The ModelConfig of the checkpoint at path; UserError if it is missing or damaged."""
    return read_file(path / "config.json", lambda text: ModelConfig(**json.loads(text)))


def read_networks(path):
    """The states that a checkpoint has, of "ema" (the averaged generator), "G" and "D". path: as
    `find` takes it.
    """
    path = find(path)
    if (path / "checksums.json").exists() and (wrong := damage(path)):
        raise UserError(f"{path} is damaged: {wrong}")
    states = {"ema": read_tensors(path / "model.safetensors")}
    for name, file in (("G", "last_generator"), ("D", "discriminator")):
        if (path / f"{file}.safetensors").exists():
            states[name] = read_tensors(path / f"{file}.safetensors")
    if (path / "training.safetensors").exists():
        tensors = read_tensors(path / "training.safetensors")
        states |= {name: part(tensors, name) for name in ("G", "D")}
    return states


def part(tensors, name):
    """The tensors whose names begin with `name` and a dot, by the rest of their names."""
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }
