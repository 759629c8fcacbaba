"""files.py, and everything that writes a file which must be whole: on the disk before it has its
name, and not there at all before.
"""

import json
import os

import numpy as np
import pytest
import torch
from conftest import CPU, MODEL, make_config
from made_clips import moving, pack, write_pictures

from mostgan import checkpoint
from mostgan.config import UserError
from mostgan.data import Clips
from mostgan.files import whole_file, whole_folder, write_whole
from mostgan.metrics.sets import write_sums
from mostgan.model import Generator
from mostgan.progress import Stats
from mostgan.run import start_run, what_to_resume
from mostgan.video import VideoWriter, write_png


def frames_of(length):
    return moving(length, 32, 32)


def a_checkpoint(folder):
    generator = Generator(MODEL)
    return checkpoint.save(folder, 3, MODEL, generator.state_dict(), {}, {"step": 3}, metric=2.0)


def write_video(path):
    with VideoWriter(path, 25, comment="how") as video:
        video.write(frames_of(3))


def packed_folder(path):
    write_pictures(path.parent / "src" / "a", frames_of(4))
    write_pictures(path.parent / "src" / "b", frames_of(5))
    (path.parent / "labels.csv").write_text("a,0.5,1\nb,2,3\n")
    pack(path.parent / "src", path, 32, labels=path.parent / "labels.csv")


def statistics(path):
    stats = Stats(path.parent, CPU)
    stats.add(loss=torch.tensor(1.0))
    stats.write(1, frames=1)
    stats.drop_after(5)


WRITERS = {
    "text.txt": lambda path: write_whole(path, "é"),
    "a.png": lambda path: write_png(path, frames_of(1)[0]),
    "a.mp4": write_video,
    "a.gif": write_video,
    "a.webp": write_video,
    "a.npy": write_video,
    "frames": write_video,
    "sums.safetensors": lambda path: write_sums(path, {"a": torch.ones(3)}),
    "checkpoint-000003": lambda path: a_checkpoint(path.parent),
    "clips": packed_folder,
    "stats.jsonl": statistics,
}
INSIDE = {
    "frames": {"000000.png", "000001.png", "000002.png"},
    "checkpoint-000003": {*checkpoint.FILES, "checksums.json"},
}
BESIDE = {"a.npy": ["a.npy.json"], "checkpoint-000003": ["best.json"]}


@pytest.mark.parametrize("name", WRITERS)
def test_what_has_its_name_is_on_the_disk(tmp_path, renamed, name):
    WRITERS[name](tmp_path / name)
    if name == "clips":
        made = {path.name for path in (tmp_path / name).iterdir()}
        assert {"index.json", "preview.png", "labels.safetensors"} < made
        assert made <= {path.name for path in renamed if path.parent == tmp_path / name}
        return
    assert renamed[tmp_path / name] == INSIDE.get(name, {""})
    assert all(tmp_path / beside in renamed for beside in BESIDE.get(name, []))


def test_a_runs_configuration_is_on_the_disk(packed, tmp_path, renamed):
    start_run(tmp_path / "run", make_config(packed), Clips(packed))
    assert renamed == {tmp_path / "run" / "config.json": {""}}


def test_a_checkpoints_name_is_on_the_disk(tmp_path, monkeypatch):
    """The folder that it is in is synced too, after it has its name."""
    seen, fsync = [], checkpoint.fsync

    def note(path):
        seen.append((path, sorted(file.name for file in tmp_path.glob("checkpoint-*"))))
        fsync(path)

    monkeypatch.setattr(checkpoint, "fsync", note)
    a_checkpoint(tmp_path)
    assert seen[-1] == (tmp_path, ["checkpoint-000003"])
    assert all(named == [] for _, named in seen[:-1])


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_an_error_leaves_the_old_one_and_nothing_else(tmp_path, whole):
    path = tmp_path / "it"
    for content in (b"old", b"new"):
        try:
            with whole(path) as target:
                if whole is whole_file:
                    target.write(content)
                else:
                    (target / "inside").write_bytes(content)
                assert content == b"old" or path.exists()  # the old one stays to the end
                if content == b"new":
                    raise ValueError
        except ValueError:
            assert content == b"new"
    file = path if whole is whole_file else path / "inside"
    assert file.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["it"]


def test_a_part_that_was_left_by_a_killed_process_has_no_final_name(tmp_path):
    with whole_file(tmp_path / "a.json") as file:
        file.write(b"half")
        file.flush()
        (name,) = os.listdir(tmp_path)
        assert name.startswith(".") and name.endswith(".part")
    assert np.array_equal(os.listdir(tmp_path), ["a.json"])


def test_the_newest_run_is_the_one_saved_last(tmp_path, monkeypatch):
    """Whatever the runs are called. Without any it is the model that comes with the package."""
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find(None) == checkpoint.BUILT_IN
    with pytest.raises(UserError, match="no run in runs/"):
        what_to_resume(None, "")
    for age, name in enumerate(("00001-b", "00002-c", "00000-a")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        path = checkpoint.save(tmp_path / "runs" / name, age, MODEL, {}, {}, {})
        (path.parent / "config.json").write_text(json.dumps({}))
        os.utime(path, (1e9 + age, 1e9 + age))
    assert checkpoint.find(None).parent.name == "00000-a"
    assert what_to_resume(None, "").run.name == "00000-a"
