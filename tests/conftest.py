"""What the tests of several rooms share: a tiny model, packed clips, a short training, programs."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# Without a GPU the Triton kernels are tested by Triton's interpreter, which has to be chosen before
# they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests have one thread, and so have the programs that they start: they run side by side (pytest
# -n), and what they replace in train.py is not replaced in processes that it starts.
os.environ["OMP_NUM_THREADS"] = "1"

import train as training
from mostgan import checkpoint
from mostgan.config import ModelConfig, TrainConfig
from mostgan.prepare import pack_sky

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
MODEL = ModelConfig(
    resolution=32,
    channel_base=128,
    channel_max=8,
    z_dim=16,
    w_dim=16,
    motion_noise_dim=16,
    motion_code_dim=16,
    num_frequencies=8,
    motion_vector_dim=8,
    motion_styles=2,
    motion_resolutions=(16,),
    discriminator_hidden_dim=16,
    mbstd_group=2,
)


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """A packed folder: eight procedural clips of 40 frames at 32²."""
    folder = tmp_path_factory.mktemp("data") / "sky.clips"
    pack_sky(folder, 32, count=8, frames=40)
    return folder


@pytest.fixture(autouse=True)
def own_signals():
    """A program's signal handlers do not outlive the test that runs it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def quiet(monkeypatch):
    """No grids, which take longer than the training."""
    monkeypatch.setattr(training, "save_grids", lambda *args: None)
    monkeypatch.setattr(training, "save_real_grid", lambda *args: None)


def make_config(packed, steps=1, **changes):
    """A run of `steps` steps of 4 clips × 3 frames, with ADA moving, accumulation and frequent
    R1.
    """
    values = dict(
        preset="tiny",
        data=str(packed),
        batch_clips=4,
        batch_split=2,
        precision="float32",
        compile=False,
        workers=0,
        augment="bgc",
        ada_kclips=0.1,
        ada_interval=2,
        r1_interval=2,
        total_kframes=0.012 * steps,
        log_kframes=0.012,
        snapshot_kframes=100,
    )
    return dataclasses.replace(TrainConfig(MODEL), **values | changes)


def options_of(packed, steps, **changes):
    """The command line's words for make_config(packed, steps, **changes)."""
    config, words = make_config(packed, steps, **changes), ["--preset", "tiny"]
    pairs = {name: value for name, value in vars(config).items() if name not in ("model", "preset")}
    of_model, usual = vars(config.model), vars(ModelConfig())
    pairs |= {name: value for name, value in of_model.items() if value != usual[name]}
    for name, value in pairs.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            values = value if isinstance(value, tuple) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def run_program(*args, cwd, env=None):
    """Runs a script of the repository: subprocess's result, with text."""
    command = [sys.executable, str(ROOT / args[0]), *map(str, args[1:])]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def tensors_of(run):
    """(all tensors, all values but the time) of a run's newest checkpoint."""
    path = checkpoint.find(run)
    tensors, scalars = checkpoint.read_training(path)
    scalars.pop("seconds")
    return tensors | load_file(path / "model.safetensors"), scalars


def same_bits(a, b):
    """Whether two results of tensors_of are equal."""
    return (
        a[1] == b[1]
        and a[0].keys() == b[0].keys()
        and all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    )


@contextmanager
def file_size_limit(size):
    """As a full disk: writing beyond `size` bytes of a file fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def stats_of(run):
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


@pytest.fixture
def renamed(monkeypatch):
    """{path: names of the files in it, or {""} for a file} of what takes its name meanwhile, of
    which every byte was synced to the disk before. Anything else fails.
    """
    synced, found, fsync = {}, {}, os.fsync

    def note(handle):
        fsync(handle)
        about = os.fstat(handle)
        synced[about.st_ino] = about.st_size

    def watched(rename):
        def called(old, new, **options):
            # A folder that makes room for another, or is on its way out, need not be synced.
            if not Path(new).name.startswith("."):
                files = sorted(Path(old).iterdir()) if os.path.isdir(old) else [Path(old)]
                for file in files:
                    assert synced.get(file.stat().st_ino) == file.stat().st_size, (
                        f"{file}: unsynced"
                    )
                is_folder = os.path.isdir(old)
                found[Path(new)] = {file.name if is_folder else "" for file in files}
            return rename(old, new, **options)

        return called

    monkeypatch.setattr(os, "fsync", note)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    return found
