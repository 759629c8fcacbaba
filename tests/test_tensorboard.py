"""TensorBoard's events, read by TensorBoard itself: the values of stats.jsonl and the grids."""

import io

import numpy as np
import pytest
import torch
from conftest import make_config, stats_of
from PIL import Image

import train as training
from mostgan import checkpoint, tensorboard
from mostgan.config import UserError
from mostgan.tensorboard import Board


def events_of(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0: all of them, not a sample
    return EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0}).Reload()


def assert_as_recorded(run):
    """Each value of each line of stats.jsonl once, at its frame, and no other."""
    events, lines = events_of(run), stats_of(run)
    told = {name: [] for line in lines for name in line}
    for line in lines:
        for name, value in line.items():
            told[name].append((line["frames"], float(np.float32(value))))
    del told["frames"]
    assert set(events.Tags()["scalars"]) == told.keys()
    for name, values in told.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == values, name
    return lines


def resumed(run, packed, steps, **changes):
    resume = training.what_to_resume(None, run)
    training.train(make_config(packed, steps, tensorboard=True, **changes), resume=resume)


def test_a_run_that_is_gone_on_with_has_each_value_once(packed, tmp_path, quiet):
    run, often = tmp_path / "run", {"snapshot_kframes": 0.024}
    training.train(make_config(packed, 3, tensorboard=True, **often), run)
    assert len(assert_as_recorded(run)) == 3
    # Killed after step 3: the newest checkpoint is that of step 2.
    (run / "checkpoint-000003").rename(tmp_path / "gone")
    resumed(run, packed, 5, **often)
    assert len(assert_as_recorded(run)) == 5
    # Killed before its first checkpoint: all is made anew.
    for path in run.glob("checkpoint-*"):
        path.rename(tmp_path / f"gone-{path.name}")
    resumed(run, packed, 2, **often)
    assert len(assert_as_recorded(run)) == 2


def test_a_run_that_had_no_events_gets_those_of_its_past(packed, tmp_path, quiet):
    training.train(make_config(packed, 2), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    resumed(tmp_path / "run", packed, 3)
    assert len(assert_as_recorded(tmp_path / "run")) == 3


def test_steps_without_tensorboard_are_made_up_for(packed, tmp_path, quiet):
    run = tmp_path / "run"
    training.train(make_config(packed, 2, tensorboard=True), run)
    training.train(make_config(packed, 4), resume=training.what_to_resume(None, run))
    resumed(run, packed, 5)
    assert len(assert_as_recorded(run)) == 5


def test_pictures_are_not_read_for_that(tmp_path, monkeypatch):
    """Those of a long run are gigabytes."""
    board = Board(tmp_path, 0)
    for step in (24, 48):
        board.add_line({"frames": step, "loss_G": step / 10})
        pictures = torch.randint(256, (1, 4, 3, 64, 64), dtype=torch.uint8)
        board.add_grid("samples", pictures, 1, 1, step, 25)
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    whole = file.read_bytes()
    for data in (whole, whole + b"\5\0\0", whole + bytes(4) + whole[4:50]):  # cut off, damaged
        file.write_bytes(data)
        events = tensorboard.events_of(tmp_path / "tensorboard")
        assert {step: round(of["loss_G"], 4) for step, of in events.items()} == {24: 2.4, 48: 4.8}
    read = [event for event in tensorboard.small_events(file) if event.summary.value]
    assert len(read) == 2  # neither stills nor moving ones


def test_events_of_another_course_are_taken_back(packed, tmp_path, quiet):
    """Steps 3 and 4 with TensorBoard, and then again without, and otherwise."""
    run, often = tmp_path / "run", {"snapshot_kframes": 0.024, "keep_checkpoints": 9}
    training.train(make_config(packed, 4, tensorboard=True, **often), run)
    (run / "checkpoint-000004").rename(tmp_path / "gone")
    again = make_config(packed, 4, diversity_weight=5.0, **often)
    training.train(again, resume=training.what_to_resume(None, run))
    resumed(run, packed, 5, diversity_weight=5.0, **often)
    assert len(assert_as_recorded(run)) == 5


def test_grids_are_pictures_and_move(tmp_path):
    clips = torch.randint(256, (16, 5, 3, 32, 32), dtype=torch.uint8)
    board = Board(tmp_path, 0)
    board.add_grid("samples", clips, 4, 4, 1200, 12.5)
    board.close()
    events = events_of(tmp_path)
    assert set(events.Tags()["images"]) == {"samples/frames", "samples/clips"}
    (still,), (moving,) = (events.Images(f"samples/{name}") for name in ("frames", "clips"))
    assert still.step == moving.step == 1200
    picture = np.asarray(Image.open(io.BytesIO(still.encoded_image_string)))
    assert picture.shape == (8 * 32, 5 * 32, 3)
    assert np.array_equal(picture[:32, 32:64], clips[0, 1].permute(1, 2, 0))
    video = Image.open(io.BytesIO(moving.encoded_image_string))
    assert (video.format, video.size, video.n_frames) == ("GIF", (128, 128), 5)
    assert video.info["duration"] == 80 and video.info["loop"] == 0
    assert (moving.width, moving.height) == (128, 128)


def test_training_shows_its_grids(packed, tmp_path):
    training.train(make_config(packed, 1, tensorboard=True), tmp_path / "run")
    told = events_of(tmp_path / "run").Tags()["images"]
    names = {f"{grid}/{kind}" for grid in ("samples", "shared-motion") for kind in KINDS}
    assert set(told) == names


KINDS = ("frames", "clips")


def test_without_the_package_one_line_says_what_to_install(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("mostgan.program.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mostgan\[tensorboard\]'"):
        training.train(make_config(packed, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_the_events_and_not_the_training(
    packed, tmp_path, quiet, monkeypatch, capsys
):
    from torch.utils.tensorboard import SummaryWriter

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", full)
    training.train(make_config(packed, 2, tensorboard=True), tmp_path / "run")
    assert capsys.readouterr().out.count("No space left") == 1
    assert len(stats_of(tmp_path / "run")) == 2
    assert checkpoint.find(tmp_path / "run").name == "checkpoint-000002"
