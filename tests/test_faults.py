"""Nothing lost: resuming, checkpoints, faults, signals, several processes."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mostgan
import train as training
from mostgan import augment, checkpoint, distributed
from mostgan.checkpoint.training import Saver
from mostgan.config import ModelConfig, TrainConfig, UserError
from mostgan.data import Clips, batches
from mostgan.prepare import pack_sky
from mostgan.run import Resume, Stats, StopSignal, continue_run, what_to_resume

ROOT = Path(__file__).parent.parent
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
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Eight procedural clips of 40 frames at 32²."""
    folder = tmp_path_factory.mktemp("data") / "sky.clips"
    pack_sky(folder, 32, count=8, frames=40)
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No grids, which take longer than the training; signal handlers stay pytest's own."""
    monkeypatch.setattr(training, "save_grids", lambda *args: None)
    monkeypatch.setattr(training, "save_real_grid", lambda *args: None)
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_config(packed, steps, **changes):
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


def tensors(run):
    """All tensors and values of a run's newest checkpoint but the time."""
    path = checkpoint.find(run)
    values, scalars = checkpoint.read_training(path)
    scalars.pop("seconds")
    return values | load_file(path / "model.safetensors"), scalars


def equal(a, b):
    return (
        a[1] == b[1]
        and a[0].keys() == b[0].keys()
        and all(torch.equal(a[0][key], b[0][key]) for key in a[0])
    )


def stats(run):
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


# resuming


class StopAfter:
    """A signal that comes in the n-th step of this start."""

    def __init__(self, steps):
        self.left = steps

    @property
    def requested(self):
        self.left -= 1
        return self.left == 0


def test_any_number_of_stops_gives_the_same_bits(packed, tmp_path, monkeypatch, capsys):
    """Three stops (in the first step, after an ADA adjustment, before one) against none: every
    tensor and value.
    """
    config = make_config(packed, 7)
    training.train(config, tmp_path / "whole")
    resume = None
    for steps in (1, 3, 1, 0):  # stopped at steps 1, 4 and 5
        monkeypatch.setattr(training, "StopSignal", lambda run, steps=steps: StopAfter(steps))
        training.train(config, None if resume else tmp_path / "stopped", resume)
        resume = what_to_resume(tmp_path / "stopped", "")
        assert resume.run == tmp_path / "stopped"
    assert resume.checkpoint.name == "checkpoint-000007"
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "stopped"))
    assert tensors(tmp_path / "whole")[1]["ada_p"] > 0  # ADA did take part
    assert capsys.readouterr().out.count("go on with: python train.py --resume") == 3
    lines = stats(tmp_path / "stopped")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    for a, b in zip(lines, stats(tmp_path / "whole")):
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
    adjust = training.adjust_ada

    def adjust_until(state, config):
        if state.step == 6:
            raise SystemExit
        adjust(state, config)

    monkeypatch.setattr(training, "adjust_ada", adjust_until)
    with pytest.raises(SystemExit):
        training.train(config, tmp_path / "killed")
    monkeypatch.setattr(training, "adjust_ada", adjust)
    with open(tmp_path / "killed" / "stats.jsonl", "a") as file:
        file.write('{"step": 6, "fra')
    (tmp_path / "killed" / ".saving-0").mkdir()
    resume = what_to_resume(None, str(tmp_path / "killed"))
    training.train(config, None, resume)
    assert resume.checkpoint.name == "checkpoint-000004"
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "killed"))
    assert [line["step"] for line in stats(tmp_path / "killed")] == list(range(1, 9))
    assert not list((tmp_path / "killed").glob(".saving-*"))


def test_a_run_killed_before_its_first_save_starts_over(packed, tmp_path):
    config = make_config(packed, 2)
    assert what_to_resume(tmp_path / "run", "") is None  # the same command starts a run …
    training.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-000002")
    resume = what_to_resume(tmp_path / "run", "")  # … and goes on with it
    assert resume == Resume(tmp_path / "run", None)
    training.train(config, tmp_path / "run", resume)
    assert [line["step"] for line in stats(tmp_path / "run")] == [1, 2]


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
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["generator_lr"] == 0.001
    )  # kept for the next time


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


# checkpoints


def save(folder, step, **options):
    values = {"a": torch.arange(1000.0) + step}
    return checkpoint.save(
        folder, step, MODEL, values, {"b": torch.ones(3)}, {"step": step}, **options
    )


def test_the_last_k_and_the_best_are_kept(tmp_path):
    for step, score in (
        (1, None),
        (2, 60.0),
        (3, 50.0),
        (4, 70.0),
        (5, None),
        (1000005, float("nan")),
        (6, None),
    ):
        save(tmp_path, step, keep=2, metric=score)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-000003", "checkpoint-000006", "checkpoint-1000005"]
    assert checkpoint.best_checkpoint(tmp_path).name == "checkpoint-000003"
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "checkpoint": "checkpoint-000003",
        "metric": 50.0,
    }
    assert checkpoint.find(tmp_path).name == "checkpoint-1000005"  # by number, not by name
    assert checkpoint.mark_best(tmp_path / "checkpoint-000006", 40)
    assert not checkpoint.mark_best(tmp_path / "checkpoint-1000005", 41)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("file", [*checkpoint.FILES, "checksums.json"])
@pytest.mark.parametrize(
    "harm", [truncate, flip, os.unlink], ids=["truncated", "flipped byte", "missing"]
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, file, harm):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    if (harm, file) == (
        truncate,
        "checksums.json",
    ):  # its last byte is a line feed that nothing needs
        truncate(new / file)
    harm(new / file)
    said = []
    assert checkpoint.newest_whole(tmp_path, said.append) == old
    assert len(said) == 1 and str(new) in said[0] and (file in said[0] or file == "checksums.json")
    with pytest.raises(UserError, match="damaged"):
        (tmp_path / "config.json").touch()
        what_to_resume(None, str(new))
    shutil.rmtree(old)
    with pytest.raises(UserError, match="every checkpoint"):
        checkpoint.newest_whole(tmp_path, said.append)


def test_a_damaged_model_is_not_sampled_from(packed, tmp_path):
    training.train(make_config(packed, 1), tmp_path / "run")
    mostgan.load(tmp_path / "run")
    flip(tmp_path / "run" / "checkpoint-000001" / "model.safetensors")
    with pytest.raises(UserError, match="checkpoint-000001 is damaged: model.safetensors"):
        mostgan.load(tmp_path / "run")


@contextmanager
def file_size_limit(size):
    """As a full disk: writing beyond `size` bytes of a file fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_loses_no_checkpoint(packed, tmp_path, monkeypatch):
    state = training.new_state(make_config(packed, 1), CPU)
    before, said = save(tmp_path, 0), []
    saver = Saver(tmp_path, before, minutes=0.001, keep=1, say=said.append)
    with file_size_limit(20_000):
        state.step = 1
        saver.start(state)
        assert not saver.finish()
    assert "could not save" in said[0] and str(before) in said[0] and "\n" not in said[0]
    assert checkpoint.damage(before) is None and saver.saved == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000000"]
    time.sleep(0.1)
    assert saver.due()  # again, later
    saver.start(state)
    assert saver.finish() and saver.saved == tmp_path / "checkpoint-000001" and not before.exists()
    monkeypatch.setattr("mostgan.state.LAST_RETRY_SECONDS", 0.01)
    with file_size_limit(20_000), pytest.raises(UserError, match="make room and go on"):
        state.step = 2
        saver.start(state)
        saver.last(state)
    assert checkpoint.damage(saver.saved) is None


def test_a_full_disk_costs_no_line_of_stats(tmp_path):
    said = []
    stats_, path = Stats(tmp_path, CPU, said.append), tmp_path / "stats.jsonl"
    for i in range(3):
        stats_.add(x=torch.tensor(float(i)))
        with file_size_limit(100 if i == 1 else 2**30):
            stats_.write(1, step=i, frames=i)
    assert (
        [line["step"] for line in stats(tmp_path)] == [0, 1, 2]
        and "could not write" in said[0]
        and len(said) == 1
    )
    path.write_text(path.read_text() + '{"frames": 3')
    stats_.drop_after(1)
    assert [line["step"] for line in stats(tmp_path)] == [0, 1]


def test_a_state_that_is_not_finite_replaces_no_good_one(packed, tmp_path):
    state, said = training.new_state(make_config(packed, 1), CPU), []
    saver = Saver(tmp_path, None, 10, 1, said.append)
    state.D.b4.out.weight.data[0] = float("inf")
    saver.start(state)
    assert not saver.finish() and "D.b4.out.weight" in said[0] and not list(tmp_path.iterdir())


def test_saves_come_by_the_minute_and_do_not_wait(packed, tmp_path):
    config = make_config(packed, 6, save_minutes=1e-6, keep_checkpoints=9)
    training.train(config, tmp_path / "run")
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) > 2
    state, finished = training.new_state(config, CPU), []
    saver = Saver(tmp_path, None, 10, 1, print)
    saver._write = lambda *args: time.sleep(0.3) or finished.append(time.monotonic())
    saver.start(state)
    started = time.monotonic()
    state.step += 1  # training goes on meanwhile
    saver.finish()
    assert started < finished[0]


# steps that are not finite, memory, loaders, signals


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
    monkeypatch.setattr(
        training,
        "objectives",
        lambda config: objectives(config)._replace(
            **{phase: Broken(getattr(objectives(config), phase), *args)}
        ),
    )


objectives = training.objectives


@pytest.mark.parametrize("phase, network", [("generator", "G"), ("discriminator", "D")])
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    packed, tmp_path, monkeypatch, phase, network, capsys
):
    for name, steps in (("two", 2), ("three", 3)):
        if name == "three":
            broken_training(monkeypatch, phase, [5, 6])  # both pieces of step 3
        training.train(make_config(packed, steps, r1_interval=10), tmp_path / name)
    two, three = (tensors(tmp_path / name)[0] for name in ("two", "three"))
    kept = {key: torch.equal(two[key], three[key]) for key in two}
    assert all(kept[key] for key in kept if key.startswith((f"{network}.", f"adam_{network}."))), (
        "it was left out"
    )
    other = "DG".replace(network, "")
    assert not any(
        kept[key] for key in kept if key.startswith(f"adam_{other}.") and key.endswith("step")
    )
    assert all(value.isfinite().all() for value in three.values())
    lines = stats(tmp_path / "three")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1]
    assert lines[2]["loss_D"] is (None if network == "D" else lines[2]["loss_D"])  # JSON has no NaN
    assert "1 optimizer steps before step 3 were left out" in capsys.readouterr().out


def test_one_gradient_that_is_not_finite_leaves_all_as_it_was(packed):
    state, stats_ = training.new_state(make_config(packed, 1), CPU), Stats(Path("."), CPU)
    for p in state.D.parameters():
        p.grad = torch.ones_like(p)
    state.D.b4.out.weight.grad[0, 0] = float("inf")
    old = [p.detach().clone() for p in state.D.parameters()]
    assert training.optimize(state.adam_D, "D", torch.tensor(1.0), stats_) == 1
    assert all(torch.equal(p, q) for p, q in zip(state.D.parameters(), old))
    for p in state.D.parameters():
        p.grad = torch.ones_like(p)
    assert training.optimize(state.adam_D, "D", torch.tensor(1.0), stats_) == 0
    assert not any(torch.equal(p, q) for p, q in zip(state.D.parameters(), old))
    assert stats_.counts["skipped_steps"] == 1 and stats_.skips.phases["D"]["longest"] == 1


def test_too_many_in_a_row_stop_the_run_with_a_diagnosis(packed, tmp_path, monkeypatch):
    config = make_config(packed, 12, skip_limit=3, snapshot_kframes=0.024)
    broken_training(monkeypatch, "discriminator", range(7, 100))
    with pytest.raises(UserError) as error:
        training.train(config, tmp_path / "run")
    text = str(error.value)
    assert "4 steps of D in a row" in text and "loss nan" in text and "\n" not in text
    assert re.search(r"(\d+) of \1 parameters: b32", text)
    assert f"last good checkpoint is {tmp_path / 'run' / 'checkpoint-00000'}" in text


def test_out_of_memory_names_the_batch_split_to_use(packed, tmp_path, monkeypatch):
    broken_training(monkeypatch, "generator", [2], torch.OutOfMemoryError("CUDA out of memory"))
    config = make_config(
        packed, 4, batch_clips=12, batch_split=1, model=dataclasses.replace(MODEL, mbstd_group=3)
    )
    with pytest.raises(UserError, match=r"12 clips at a time; go on with: .*run --batch-split 2$"):
        training.train(config, tmp_path / "run")
    broken_training(monkeypatch, "generator", [2], torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="no larger --batch-split"):
        training.train(dataclasses.replace(config, batch_split=12), tmp_path / "other")


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


def command(packed, out, steps):
    model = [
        word
        for name, value in vars(MODEL).items()
        if value != getattr(ModelConfig(), name)
        for word in (
            f"--{name.replace('_', '-')}",
            *map(str, value if isinstance(value, tuple) else [value]),
        )
    ]
    config, default = make_config(packed, steps), TrainConfig(preset="tiny")
    given = (
        "data",
        "batch_clips",
        "batch_split",
        "augment",
        "ada_kclips",
        "ada_interval",
        "r1_interval",
        "total_kframes",
        "log_kframes",
    )
    assert config.dataset == default.dataset
    options = [
        word
        for name in given
        for word in (f"--{name.replace('_', '-')}", str(getattr(config, name)))
    ]
    return [
        str(ROOT / "train.py"),
        "--preset",
        "tiny",
        *options,
        *model,
        "--out",
        str(out),
        "--resume",
    ]


@pytest.mark.slow
def test_a_second_sigint_stops_at_once_and_a_sigterm_saves(packed, tmp_path):
    arguments = command(packed, tmp_path / "run", 100_000)

    def start(*more):
        process = subprocess.Popen(
            [sys.executable, *arguments, *more],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        deadline, lines = time.monotonic() + 60, tmp_path / "run" / "stats.jsonl"
        old = lines.stat().st_mtime if lines.exists() else 0
        while not (lines.exists() and lines.stat().st_mtime > old) and time.monotonic() < deadline:
            time.sleep(0.02)
        return process

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


def test_deterministic_augmentation_is_the_same_augmentation(packed):
    """With --deterministic, ADA's resampling takes another way backwards: the same numbers, by
    algorithms that may.
    """
    frames = torch.rand(4, 9, 32, 32)
    params = augment.draw("bgc", 1.0, 4, 32, 32, torch.Generator().manual_seed(0))
    gradients = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            x = frames.clone().requires_grad_()
            augment.apply(x, params).square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        gradients.append(x.grad)
    assert not torch.equal(*gradients), "the other way was not taken"
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-5)


# several processes


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
def test_two_processes_make_the_run_of_one(packed, tmp_path, request):
    """Five steps with accumulation (two pieces each), R1 every second step and ADA; then two saved,
    one resumes.

    Float32 sums depend on their order: one process adds ((1 + 2) + 3) + 4, two (1 + 2) + (3 + 4).
    Adam without momentum divides a gradient by its size, so rounding is amplified where gradients
    nearly vanish. The measure is therefore the norm of the difference of a parameter tensor,
    relative to the tensor's. Biases start at zero, and five steps are all
    that they have: relative to that, rounding is larger. (With two pieces, a + b = b + a:
    bench/faults.py, same bits.)
    """
    changes = {
        "batch_clips": 8,
        "batch_split": 4,
        "save_minutes": 10.0,
        "snapshot_kframes": 0.072,
        "total_kframes": 0.12,
        "log_kframes": 0.024,
    }
    arguments = command(packed, tmp_path / "two", 1)
    arguments += [
        word
        for name, value in changes.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
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
    assert config.batch_split == 4
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # as the two had: a product over two threads is added up in another order
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    training.train(config, tmp_path / "one")
    resume = what_to_resume(None, str(tmp_path / "two" / "checkpoint-000003"))
    shutil.copytree(resume.run, tmp_path / "mixed")
    mixed = Resume(tmp_path / "mixed", tmp_path / "mixed" / resume.checkpoint.name)
    training.train(config, None, mixed)
    one, two, mixed = (tensors(tmp_path / name) for name in ("one", "two", "mixed"))
    parameters = [key for key in one[0] if key.startswith(("G.", "D."))]
    biases = [key for key in parameters if key.endswith("bias")]
    for other in (two, mixed):
        assert 0 < apart(other, one, [key for key in parameters if key not in biases]) < 1e-6
        assert apart(other, one, biases) < 1e-4
        assert other[1] == one[1]  # ADA's p and the sum of signs
    for a, b in zip(stats(tmp_path / "two"), stats(tmp_path / "one")):
        assert a["loss_D"] == pytest.approx(b["loss_D"], abs=2e-6) and a["step"] == b["step"]
