"""checkpoint/: whole or absent, damage, the best and the newest, saving while training goes on."""

import json
import os
import shutil
import time

import pytest
import torch
from conftest import CPU, MODEL, file_size_limit, make_config

import mostgan
import train as training
from mostgan import checkpoint
from mostgan.checkpoint.training import Saver
from mostgan.config import UserError
from mostgan.run import what_to_resume

pytestmark = pytest.mark.usefixtures("quiet")


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
    monkeypatch.setattr("mostgan.checkpoint.training.LAST_RETRY_SECONDS", 0.01)
    with file_size_limit(20_000), pytest.raises(UserError, match="make room and go on"):
        state.step = 2
        saver.start(state)
        saver.last(state)
    assert checkpoint.damage(saver.saved) is None


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


def test_without_a_path_the_newest_of_all_runs_is_meant(tmp_path):
    """By the time at which it was saved, whatever its number."""
    for age, (run, step) in enumerate((("b", 5), ("a", 9), ("c", 2))):
        (tmp_path / run).mkdir()
        path = save(tmp_path / run, step)
        os.utime(path, (1000 - age, 1000 - age))
    assert checkpoint.newest_of_all(tmp_path) == tmp_path / "b" / "checkpoint-000005"
    os.utime(tmp_path / "c" / "checkpoint-000002", (2000, 2000))
    assert checkpoint.newest_of_all(tmp_path).parent.name == "c"


def test_a_state_is_read_as_it_was_saved(packed, tmp_path):
    """Networks, Adam's moments and step, and every value, each by itself."""
    config = make_config(packed)
    state = training.new_state(config, CPU)
    for number, adam in enumerate((state.adam_G, state.adam_D)):
        for i, p in enumerate(adam.param_groups[0]["params"]):
            p.data.fill_(number + i)
            p.grad = torch.full_like(p, 2.0 + number)
        adam.step()
    state.ema.mapping.w_avg.fill_(7)
    state.step, state.frames, state.seconds, state.ada_p, state.ada_sign = 3, 36, 1.5, 0.25, -1.5
    saver = Saver(tmp_path, None, 10, 1, print)
    saver.start(state)
    saver.last(state)
    read = training.new_state(config, CPU)
    training.load_state(read, checkpoint.find(tmp_path))
    for name in ("step", "frames", "seconds", "ada_p", "ada_sign"):
        assert getattr(read, name) == getattr(state, name), name
    for name in ("G", "D", "ema"):
        ours, theirs = (getattr(of, name).state_dict() for of in (read, state))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    for name in ("adam_G", "adam_D"):
        ours, theirs = (getattr(of, name).state_dict()["state"] for of in (read, state))
        assert ours.keys() == theirs.keys() and len(theirs) > 5
        for i, moments in theirs.items():
            assert all(torch.equal(ours[i][key], value) for key, value in moments.items())
