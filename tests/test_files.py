"""Whatever is written under a final name is on the disk before it gets the name."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import CPU, MODEL, make_config

import train as training
from mostgan import checkpoint
from mostgan.config import UserError
from mostgan.data import Clips
from mostgan.files import whole_file, whole_folder, write_whole
from mostgan.progress import Stats
from mostgan.run import continue_run, start_run, what_to_resume


@pytest.fixture
def on_disk(monkeypatch):
    """Fails where something takes a name that does not begin with a dot, before its content, or
    that of the files in it, was synced. Yields the names that were given.
    """
    synced, named = set(), []
    fsync = os.fsync

    def noted(handle):
        status = os.fstat(handle)
        synced.add((status.st_dev, status.st_ino))
        fsync(handle)

    def watch(module, name):
        rename = getattr(module, name)

        def renamed(source, target):
            files = [source, *source.iterdir()] if source.is_dir() else [source]
            if not os.path.basename(target).startswith("."):
                for file in files[1:] or files:
                    status = file.stat()
                    assert (status.st_dev, status.st_ino) in synced, (file, target)
                named.append(os.path.basename(target))
            return rename(source, target)

        monkeypatch.setattr(module, name, renamed)

    monkeypatch.setattr(os, "fsync", noted)
    watch(os, "replace")
    watch(Path, "rename")
    return named


def test_a_file_and_a_folder(tmp_path, on_disk):
    write_whole(tmp_path / "a", "text")
    with whole_folder(tmp_path / "b") as folder:
        (folder / "c").write_text("text")
        assert not (tmp_path / "b").exists()
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a") as file:
        file.write(b"half")
        assert (tmp_path / "a").read_text() == "text"  # the former one, until the end
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "text"
    assert on_disk == ["a", "b"] and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_what_a_run_writes(packed, tmp_path, on_disk):
    config, clips = make_config(packed), Clips(packed)
    run = start_run(tmp_path / "run", config, clips)
    checkpoint.save(run, 3, MODEL, {"a": torch.ones(2)}, {}, {"frames": 0}, metric=1.0)
    continue_run(what_to_resume(None, str(run)), config, clips)
    stats = Stats(run, CPU)
    stats.path.write_text('{"frames": 12}\n{"frames": 24}\n{"fra')
    stats.drop_after(12)
    assert stats.path.read_text() == '{"frames": 12}\n'
    assert on_disk == [
        "config.json",
        "checkpoint-000003",
        "best.json",
        "config.json",
        "stats.jsonl",
    ]


def test_the_newest_run_is_the_one_saved_last(tmp_path, monkeypatch):
    """Whatever the runs are called. A checkpoint without a run beside it does as well."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        checkpoint.find(None)
    for age, name in enumerate(("00001-b", "00002-c", "00000-a")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        path = checkpoint.save(tmp_path / "runs" / name, age, MODEL, {}, {}, {})
        (path.parent / "config.json").write_text(json.dumps({}))
        os.utime(path, (1e9 + age, 1e9 + age))
    assert checkpoint.find(None).parent.name == "00000-a"
    assert training.what_to_resume(None, "").run.name == "00000-a"
