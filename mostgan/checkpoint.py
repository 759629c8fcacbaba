"""Checkpoints: safetensors and JSON only, complete or absent.

A checkpoint is a folder: model.safetensors (the averaged generator) and config.json (its ModelConfig) are all that
sampling needs; training.safetensors and training.json hold the rest of the training state.
"""

import dataclasses
import json
import os
import shutil
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mostgan.config import ModelConfig, UserError
from mostgan.model import Generator
from mostgan.released import from_released_names

CHECKPOINT_NAME = "checkpoint-{:06d}"


def save(folder, step, ema, tensors, scalars, keep=2):
    """Write checkpoint `step` into folder, whole or not at all, and drop all but the newest `keep`. Returns its path.

    ema: the averaged generator; tensors: name → tensor and scalars: JSON values, the rest of the training state.
    """
    folder = Path(folder)
    path, temporary = folder / CHECKPOINT_NAME.format(step), folder / f".saving-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        save_file({k: v.contiguous() for k, v in ema.state_dict().items()}, temporary / "model.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / "training.safetensors")
        (temporary / "config.json").write_text(json.dumps(dataclasses.asdict(ema.config), indent=2) + "\n")
        (temporary / "training.json").write_text(json.dumps(scalars, indent=2) + "\n")
        for file in [*temporary.iterdir(), temporary]:
            _fsync(file)
        if path.exists():  # the same step, saved again after a resume: the same content
            shutil.rmtree(path)
        temporary.rename(path)
        _fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _checkpoints(run):
    """Complete checkpoints in a run folder, oldest first."""
    return sorted(p for p in run.glob("checkpoint-*") if (p / "model.safetensors").exists())


def find(path=None, runs="runs"):
    """The checkpoint folder that path means: itself, or the newest in a run folder; None: the newest of all runs.

    Raises UserError if there is none.
    """
    if path is None:
        newest = sorted((c for run in Path(runs).glob("*") for c in _checkpoints(run)[-1:]),
                        key=lambda checkpoint: checkpoint.stat().st_mtime)
        if not newest:
            raise UserError(f"no checkpoint in {runs}/: make one with `python train.py --dataset sky`, "
                            "or name one with --checkpoint")
        return newest[-1]
    path = Path(path)
    if path.is_file():
        path = path.parent
    if (path / "model.safetensors").exists():
        return path
    if not path.is_dir() or not _checkpoints(path):
        raise UserError(f"{path} is neither a checkpoint (a folder with model.safetensors) nor a run that has one")
    return _checkpoints(path)[-1]


def load(path=None, device="cpu"):
    """The generator of a checkpoint, ready to sample. path: as `find` takes it. Returns an eval-mode Generator.

    Raises UserError on a missing, damaged or wrong checkpoint.
    """
    path = find(path)
    generator = Generator(_read(path / "config.json", lambda text: ModelConfig(**json.loads(text))))
    load_state(generator, read_tensors(path / "model.safetensors"), path)
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
        raise UserError(f"{path} holds a model but no training state: it can be sampled from, not resumed")
    return read_tensors(path / "training.safetensors"), _read(path / "training.json", json.loads)


def _read(path, parse):
    try:
        return parse(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None

