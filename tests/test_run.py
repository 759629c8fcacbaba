"""run.py and progress.py: going on with a run, to the bit; steps that are not finite; signals."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    CPU,
    MODEL,
    ROOT,
    file_size_limit,
    make_config,
    options_of,
    same_bits,
    stats_of,
    tensors_of,
)

import mostgan.loss
import train as training
from mostgan import checkpoint
from mostgan.config import UserError
from mostgan.data import Clips
from mostgan.progress import Skips, Stats
from mostgan.run import Resume, StopSignal, continue_run, what_to_resume

pytestmark = pytest.mark.usefixtures("quiet")


class StopAfter:
    """A signal that comes in the n-th step of this start."""

    def __init__(self, steps):
        self.left = steps

    @property
    def requested(self):
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_any_number_of_stops_gives_the_same_bits(packed, tmp_path, monkeypatch, capsys, precision):
    """Three stops (in the first step, after an ADA adjustment, before one) against none: every
    tensor and value.
    """
    config = make_config(packed, 7, precision=precision)
    training.train(config, tmp_path / "whole")
    resume = None
    for steps in (1, 3, 1, 0):  # stopped at steps 1, 4 and 5
        monkeypatch.setattr(training, "StopSignal", lambda run, steps=steps: StopAfter(steps))
        training.train(config, None if resume else tmp_path / "stopped", resume)
        resume = what_to_resume(tmp_path / "stopped", "")
        assert resume.run == tmp_path / "stopped"
    assert resume.checkpoint.name == "checkpoint-000007"
    assert same_bits(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "stopped"))
    assert tensors_of(tmp_path / "whole")[1]["ada_p"] > 0  # ADA did take part
    assert capsys.readouterr().out.count("go on with: python train.py --resume") == 3
    lines = stats_of(tmp_path / "stopped")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    for a, b in zip(lines, stats_of(tmp_path / "whole")):
        assert all(
            a[key] == b[key]
            for key in a
            if key not in ("seconds", "frames_per_second", "peak_memory_mb")
        )


def test_a_killed_run_goes_on_from_its_last_checkpoint(packed, tmp_path, monkeypatch):
    """Killed in step 6 after a save at 4: lines and half-written files after it are dropped, what
    is lost is redone.
    """
    training.train(make_config(packed, 8), tmp_path / "whole")
    config = make_config(packed, 8, snapshot_kframes=0.048, workers=1)
    weight = training.ema_weight

    def weight_until(config, step):
        if step == 6:
            raise SystemExit
        return weight(config, step)

    monkeypatch.setattr(training, "ema_weight", weight_until)
    with pytest.raises(SystemExit):
        training.train(config, tmp_path / "killed")
    monkeypatch.setattr(training, "ema_weight", weight)
    with open(tmp_path / "killed" / "stats.jsonl", "a") as file:
        file.write('{"step": 6, "fra')
    (tmp_path / "killed" / ".saving-0").mkdir()
    resume = what_to_resume(None, str(tmp_path / "killed"))
    training.train(config, None, resume)
    assert resume.checkpoint.name == "checkpoint-000004"
    assert same_bits(tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "killed"))
    assert [line["step"] for line in stats_of(tmp_path / "killed")] == list(range(1, 9))
    assert not list((tmp_path / "killed").glob(".saving-*"))


def test_a_run_killed_before_its_first_save_starts_over(packed, tmp_path):
    config = make_config(packed, 2)
    assert what_to_resume(tmp_path / "run", "") is None  # the same command starts a run …
    training.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-000002")
    resume = what_to_resume(tmp_path / "run", "")  # … and goes on with it
    assert resume == Resume(tmp_path / "run", None)
    training.train(config, tmp_path / "run", resume)
    assert [line["step"] for line in stats_of(tmp_path / "run")] == [1, 2]


def test_resuming_an_older_checkpoint_leaves_the_later_ones_aside(packed, tmp_path, capsys):
    training.train(
        make_config(packed, 3, snapshot_kframes=0.012, keep_checkpoints=3), tmp_path / "run"
    )
    later = make_config(packed, 2, generator_lr=0.001)
    training.train(later, None, what_to_resume(None, str(tmp_path / "run" / "checkpoint-000001")))
    out = capsys.readouterr().out
    assert "generator_lr 0.0025 → 0.001" in out and "checkpoint-000003 is not of this course" in out
    assert checkpoint.find(tmp_path / "run").name == "checkpoint-000002"
    assert (tmp_path / "run" / "aside-checkpoint-000003").is_dir()
    # Kept for the next time.
    assert json.loads((tmp_path / "run" / "config.json").read_text())["generator_lr"] == 0.001


def test_a_config_that_does_not_fit_is_refused_by_field(packed, tmp_path):
    training.train(make_config(packed, 1), tmp_path / "run")
    resume, model = (
        what_to_resume(tmp_path / "run", ""),
        dataclasses.replace(MODEL, motion_styles=3),
    )
    wrong = make_config(packed, 2, model=model, seed=1)
    with pytest.raises(UserError, match=r"seed 0 → 1, model.motion_styles 2 → 3") as error:
        continue_run(resume, wrong, Clips(packed))
    assert "total_kframes" not in str(error.value)
    with pytest.raises(UserError, match="leave out --out"):
        what_to_resume(tmp_path / "other", str(tmp_path / "run"))
    with pytest.raises(UserError, match="no run or checkpoint at"):
        what_to_resume(None, str(tmp_path / "nowhere"))


def test_a_restart_by_torchrun_goes_on_with_its_own_run(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    for out in (None, "other"):
        training.train(make_config(packed, 1), out and Path(out))
    Path("runs/00001-another").mkdir()
    Path("runs/00001-another/config.json").write_text('{"torchrun": "8 on this machine"}')
    assert what_to_resume(None, None) is None  # not restarted
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert what_to_resume(None, None).checkpoint == Path("runs/00000-sky-tiny/checkpoint-000001")
    assert what_to_resume(Path("other"), None).checkpoint == Path("other/checkpoint-000001")


def test_two_processes_do_not_train_in_one_folder(packed, tmp_path):
    training.train(make_config(packed, 1), tmp_path / "run")
    program = "import sys; from pathlib import Path; from mostgan.run import lock; "
    program += "lock(Path(sys.argv[1]))"
    other = [sys.executable, "-c", program, tmp_path / "run"]
    done = subprocess.run(other, cwd=ROOT, text=True, capture_output=True)
    assert "another process is training" in done.stderr  # this one, which trained there and lives
    (tmp_path / "run" / ".lock").unlink()
    subprocess.run(other, cwd=ROOT, check=True)


def test_a_full_disk_costs_no_line_of_stats_of(tmp_path):
    said = []
    stats_, path = Stats(tmp_path, CPU, said.append), tmp_path / "stats.jsonl"
    for i in range(3):
        stats_.add(x=torch.tensor(float(i)))
        with file_size_limit(100 if i == 1 else 2**30):
            stats_.write(1, step=i, frames=i)
    assert (
        [line["step"] for line in stats_of(tmp_path)] == [0, 1, 2]
        and "could not write" in said[0]
        and len(said) == 1
    )
    path.write_text(path.read_text() + '{"frames": 3')
    stats_.drop_after(1)
    assert [line["step"] for line in stats_of(tmp_path)] == [0, 1]


class Broken:
    """An objective of which chosen steps give a loss that is not finite; or raise."""

    def __init__(self, objective, bad, error=None):
        self.objective, self.bad, self.error, self.calls = objective, bad, error, 0

    def __call__(self, *args):
        self.calls += 1
        values = self.objective(*args)
        if self.calls in self.bad:
            if self.error:
                raise self.error
            return (values[0] * float("nan"), *values[1:])
        return values


def broken_training(monkeypatch, phase, *args):
    objective = getattr(mostgan.loss, f"{phase}_objective")
    monkeypatch.setattr(training, f"{phase}_objective", Broken(objective, *args))


@pytest.mark.parametrize("phase, network", [("generator", "G"), ("discriminator", "D")])
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    packed, tmp_path, monkeypatch, phase, network, capsys
):
    for name, steps in (("two", 2), ("three", 3)):
        if name == "three":
            broken_training(monkeypatch, phase, [5, 6])  # both pieces of step 3
        training.train(make_config(packed, steps, r1_interval=10), tmp_path / name)
    two, three = (tensors_of(tmp_path / name)[0] for name in ("two", "three"))
    kept = {key: torch.equal(two[key], three[key]) for key in two}
    assert all(kept[key] for key in kept if key.startswith((f"{network}.", f"adam_{network}."))), (
        "it was left out"
    )
    other = "DG".replace(network, "")
    assert not any(
        kept[key] for key in kept if key.startswith(f"adam_{other}.") and key.endswith("step")
    )
    assert all(value.isfinite().all() for value in three.values())
    lines = stats_of(tmp_path / "three")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1]
    assert lines[2]["loss_D"] is (None if network == "D" else lines[2]["loss_D"])  # JSON has no NaN
    assert "1 optimizer steps before step 3 were left out" in capsys.readouterr().out


def test_one_gradient_that_is_not_finite_leaves_all_as_it_was(packed):
    state = training.new_state(make_config(packed, 1), CPU)
    stats, skips = Stats(Path("."), CPU), Skips()
    for p in state.D.parameters():
        p.grad = torch.ones_like(p)
    state.D.b4.out.weight.grad[0, 0] = float("inf")
    old = [p.detach().clone() for p in state.D.parameters()]
    assert training.optimize(state.adam_D, "D", torch.tensor(1.0), stats, skips) == 1
    assert all(torch.equal(p, q) for p, q in zip(state.D.parameters(), old))
    for p in state.D.parameters():
        p.grad = torch.ones_like(p)
    assert training.optimize(state.adam_D, "D", torch.tensor(1.0), stats, skips) == 0
    assert not any(torch.equal(p, q) for p, q in zip(state.D.parameters(), old))
    assert stats.counts["skipped_steps"] == 1 and skips.phases["D"]["longest"] == 1


def test_too_many_in_a_row_stop_the_run_with_a_diagnosis(packed, tmp_path, monkeypatch):
    config = make_config(packed, 12, skip_limit=3, snapshot_kframes=0.024)
    broken_training(monkeypatch, "discriminator", range(7, 100))
    with pytest.raises(UserError) as error:
        training.train(config, tmp_path / "run")
    text = str(error.value)
    assert "4 steps of D in a row" in text and "loss nan" in text and "\n" not in text
    assert re.search(r"(\d+) of \1 parameters \(b32", text)
    assert f"last good checkpoint, {tmp_path / 'run' / 'checkpoint-00000'}" in text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_out_of_memory_names_the_batch_split_to_use(packed, tmp_path, monkeypatch, error):
    broken_training(monkeypatch, "generator", [2], error)
    config = make_config(
        packed, 4, batch_clips=12, batch_split=1, model=dataclasses.replace(MODEL, mbstd_group=3)
    )
    with pytest.raises(UserError, match=r"12 clips at a time; go on with: .*run --batch-split 2$"):
        training.train(config, tmp_path / "run")
    broken_training(monkeypatch, "generator", [2], error)
    with pytest.raises(UserError, match="no larger --batch-split"):
        training.train(dataclasses.replace(config, batch_split=12), tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted(number):
    stop = StopSignal("run")
    assert not stop.requested
    os.kill(os.getpid(), number)
    time.sleep(0.01)
    assert stop.requested


@pytest.mark.parametrize(
    "numbers, ended",
    [
        ((signal.SIGINT, signal.SIGINT), signal.SIGINT),
        ((signal.SIGTERM, signal.SIGINT), 0),
        ((signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1), 0),
    ],
    ids=["Ctrl-C twice", "job's end and Ctrl-C", "job's end, said often"],
)
def test_only_a_second_sigint_ends_the_process_at_once(numbers, ended):
    child = os.fork()
    if child == 0:
        StopSignal("run")
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) == bool(ended) and (not ended or os.WTERMSIG(status) == ended)


def started(run, packed, threads):
    """A long training as a process, with a group of its own, that has taken a step."""
    arguments = [*options_of(packed, 100_000), "--out", str(run), "--resume"]
    lines = run / "stats.jsonl"
    old = lines.stat().st_mtime if lines.exists() else 0
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (lines.exists() and lines.stat().st_mtime > old) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lines.exists() and lines.stat().st_mtime > old
    return process


@pytest.mark.slow
def test_a_signal_to_every_process_of_a_training_is_for_the_first(packed, tmp_path):
    """A terminal's Ctrl-C and a job's end reach the processes that take pieces, too. And a kill
    leaves none of them behind.
    """
    run = tmp_path / "run"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = started(run, packed, threads=2)
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "go on with:" in out and "Traceback" not in out, out
    process = started(run, packed, threads=2)
    process.kill()
    out, _ = process.communicate(timeout=60)  # ends when no process has its output open
    assert "Traceback" not in out, out


@pytest.mark.slow
def test_a_second_sigint_stops_at_once_and_a_sigterm_saves(packed, tmp_path):
    def start():
        return started(tmp_path / "run", packed, threads=1)

    process = start()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert f"go on with: python train.py --resume {tmp_path / 'run'}" in out
    saved = checkpoint.find(tmp_path / "run")

    process = start()
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)  # two at once may be delivered as one
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    if process.returncode != 0:  # else the step was over before the second came
        assert (
            process.returncode == -signal.SIGINT
            and "stopped at once" in out
            and "Traceback" not in out
        )
    assert checkpoint.damage(checkpoint.find(tmp_path / "run")) is None
    assert saved.is_dir() or checkpoint.find(tmp_path / "run") != saved
