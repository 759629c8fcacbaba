"""Several processes make the run of one; loader processes and their signals."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    make_config,
    options_of,
    stats_of,
    tensors_of,
)

import train as training
from mostgan import distributed
from mostgan.config import UserError
from mostgan.data import Clips, batches
from mostgan.run import Resume, what_to_resume

pytestmark = pytest.mark.usefixtures("quiet")


def test_a_batch_is_cut_into_pieces_for_every_process(packed, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 4)
    assert (
        training.with_shares(make_config(packed, 1, batch_clips=16, batch_split=1)).batch_split == 4
    )
    assert (
        training.with_shares(make_config(packed, 1, batch_clips=16, batch_split=8)).batch_split == 8
    )
    with pytest.raises(UserError, match="4 processes cannot share a batch of 18"):
        training.with_shares(make_config(packed, 1, batch_clips=18, batch_split=1))


def apart(a, b, keys):
    """‖a − b‖ / ‖b‖ of those tensors, the largest."""
    pairs = [(a[0][key].double(), b[0][key].double()) for key in keys]
    return max(float((x - y).norm() / y.norm().clamp(min=1e-12)) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pieces, of_parameters, of_biases, of_loss", [(2, 0, 0, 0), (4, 1e-5, 1e-3, 5e-6)]
)
def test_two_processes_make_the_run_of_one(
    packed, tmp_path, request, pieces, of_parameters, of_biases, of_loss
):
    """Five steps with R1 every second step and ADA; then two saved, one resumes. With a piece each
    the bits are the same; with two each, gradients accumulate before they are added up.

    Float32 sums depend on their order: one process adds ((1 + 2) + 3) + 4, two (1 + 2) + (3 + 4).
    Adam without momentum divides a gradient by its size, so rounding is amplified where gradients
    nearly vanish. The measure is therefore the norm of the difference of a parameter tensor,
    relative to the tensor's: up to 6.5e-6, as a processor adds. Biases start at zero, and five
    steps are all that they have: relative to that, rounding is larger, up to 6e-4.
    """
    changes = dict(batch_clips=8, batch_split=pieces, total_kframes=0.12)
    changes |= dict(snapshot_kframes=0.072, log_kframes=0.024)
    arguments = [str(ROOT / "train.py"), *options_of(packed, 1, **changes)]
    arguments += ["--out", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *arguments],
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sample with") == 1  # only the first process speaks
    config = dataclasses.replace(training.read_config(tmp_path / "two"), data=str(packed))
    assert config.batch_split == pieces
    threads = torch.get_num_threads()
    # As the two had: a product over two threads is added up in another order.
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    training.train(config, tmp_path / "one")
    resume = what_to_resume(None, str(tmp_path / "two" / "checkpoint-000003"))
    shutil.copytree(resume.run, tmp_path / "mixed")
    mixed = Resume(tmp_path / "mixed", tmp_path / "mixed" / resume.checkpoint.name)
    training.train(config, None, mixed)
    one, two, mixed = (tensors_of(tmp_path / name) for name in ("one", "two", "mixed"))
    parameters = [key for key in one[0] if key.startswith(("G.", "D."))]
    biases = [key for key in parameters if key.endswith("bias")]
    for other in (two, mixed):
        difference = apart(other, one, [key for key in parameters if key not in biases])
        assert difference <= of_parameters and (difference > 0) == (pieces == 4)
        assert apart(other, one, biases) <= of_biases
        assert other[1] == one[1]  # ADA's p and the sum of signs
    for a, b in zip(stats_of(tmp_path / "two"), stats_of(tmp_path / "one")):
        assert (
            a["loss_D"] == pytest.approx(b["loss_D"], rel=0, abs=of_loss) and a["step"] == b["step"]
        )


def test_a_dead_loader_names_the_clip(packed):
    clips = Clips(packed)
    data = batches(clips, 4, 3, seed=0, workers=1)
    next(data)
    (worker,) = [child for child in children(os.getpid())]
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match="loader process died") as error:
        for _ in range(20):
            next(data)
    assert any(name in str(error.value) for name in clips.names) and "--workers" in str(error.value)


def test_a_loader_outlives_the_signals_of_its_group(packed):
    data = batches(Clips(packed), 4, 3, seed=0, workers=1)
    next(data)
    (worker,) = children(os.getpid())
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.kill(worker, number)
    # Not from its parent: from a shell, as a job's end is.
    subprocess.run(["sh", "-c", f"kill -TERM {worker}"], check=True)
    time.sleep(0.2)
    for _ in range(10):
        next(data)
    assert children(os.getpid()) == [worker]
    data.close()
    deadline = time.monotonic() + 20
    while children(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children(os.getpid())


def children(process):
    """Live children of a process (Linux)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found
