"""The packed folder: its format, cutting, crops, masks, splitting, the command; interruptions,
damage, checking."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_clips as made
import numpy as np
import pytest
from made_clips import command, files_of, moving, numbered, numbers, write_pictures, write_video
from PIL import Image
from safetensors import safe_open

from mostgan import files, prepare
from mostgan.config import UserError
from mostgan.data import Clips
from mostgan.prepare import sky
from mostgan.prepare.clips import jobs_of
from mostgan.prepare.reading import Settings, Source

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Sources of several kinds, of which one is a film in four clips, and the folder that one
    uninterrupted run makes."""
    folder = tmp_path_factory.mktemp("whole")
    make_sources(folder / "src")
    made.pack(folder / "src", folder / "dst", 32, clip_length=12)
    return folder


def make_sources(src):
    for k in range(4):
        write_pictures(src / f"clip{k}", moving(8, 32, 32, seed=k))
    write_video(src / "film.mp4", numbered(48, 32, 32), options={"g": "6"})
    made.write_animation(src / "moves.gif", numbered(6, 32, 32), [40] * 6)


# ------------------------------------------------------------------------------------------- format


def test_the_files_of_a_packed_folder(whole):
    clips = Clips(whole / "dst")
    index = json.loads((whole / "dst" / "index.json").read_text(encoding="utf-8"))
    table = index["clips"]
    assert (index["format"], index["version"], index["resolution"], index["coding"]) == (
        "mostgan-clips",
        3,
        32,
        "raw",
    )
    assert len({len(column) for column in table.values() if column is not None}) == 1
    assert sorted(path.name for path in (whole / "dst").iterdir()) == sorted(
        [*table["file"], "index.json", "preview.png"]
    )
    assert len(clips) == len(set(clips.names)) == len(set(table["file"])) == 9
    for k, file in enumerate(table["file"]):
        with safe_open(whole / "dst" / file, "numpy") as tensors:
            about = tensors.metadata()
            assert list(about) == ["clip"] and list(tensors.keys()) == ["frames"]
            frames = tensors.get_tensor("frames")
        about = json.loads(about["clip"])
        assert frames.dtype == np.uint8 and frames.shape == (clips.lengths[k], 3, 32, 32)
        assert (frames == clips.frames(k, range(clips.lengths[k]))).all()
        for key in ("name", "source", "label", "fps", "start"):
            assert about[key] == (table[key] or [None] * 9)[k], key
        assert about["frames"] == clips.lengths[k] and about["time"] == pytest.approx(
            table["start"][k] / 25
        )
    with Image.open(whole / "dst" / "preview.png") as preview:
        assert np.asarray(preview.convert("L")).std() > 10


def test_same_input_same_bytes(whole, tmp_path):
    """Whatever the number of processes, at another place, and of files that were copied, so that
    only their times changed."""
    made.pack(whole / "src", tmp_path / "two", 32, clip_length=12, jobs=2)
    assert files_of(tmp_path / "two") == files_of(whole / "dst")
    shutil.copytree(whole / "src", tmp_path / "elsewhere" / "src")
    for path in (tmp_path / "elsewhere").rglob("*.*"):
        os.utime(path, (10**9, 10**9))
    made.pack(tmp_path / "elsewhere" / "src", tmp_path / "copied", 32, clip_length=12)
    expected, found = files_of(whole / "dst"), files_of(tmp_path / "copied")
    different = [name for name in expected if found.get(name) != expected[name]]
    assert different == [] and len(found) == len(expected)


def test_the_fingerprint_is_of_the_packed_data(whole, tmp_path):
    index = json.loads((whole / "dst" / "index.json").read_text())
    made.pack(whole / "src", tmp_path / "other", 32, clip_length=11)
    made.pack(whole / "src", tmp_path / "coarse", 16, clip_length=12)
    others = [
        json.loads((tmp_path / name / "index.json").read_text()) for name in ("other", "coarse")
    ]
    assert len({index["fingerprint"], *(other["fingerprint"] for other in others)}) == 3
    int(index["fingerprint"], 16)


def test_the_same_command_again_does_nothing_and_other_settings_are_refused(whole, tmp_path):
    shutil.copytree(whole / "dst", tmp_path / "dst")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()}
    made.pack(whole / "src", tmp_path / "dst", 32, clip_length=12)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()} == before
    for settings in ({"resolution": 16}, {"clip_length": 10}, {"fps": 5}, {"crop": "none"}):
        with pytest.raises(UserError) as error:
            made.pack(
                whole / "src", tmp_path / "dst", **{"resolution": 32, "clip_length": 12} | settings
            )
        assert "\n" not in str(error.value) and str(tmp_path / "dst") in str(error.value)
    assert files_of(tmp_path / "dst") == files_of(whole / "dst")


def test_a_folder_that_holds_something_else_is_left_alone(whole, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="mine"):
        made.pack(whole / "src", tmp_path / "mine", 16)
    assert files_of(tmp_path / "mine") == {"thesis.txt": b"precious"}
    with pytest.raises(UserError, match="thesis"):
        made.pack(whole / "src", tmp_path / "mine" / "thesis.txt", 16)
    with pytest.raises(UserError, match="thesis"):
        made.pack(whole / "src", tmp_path / "mine" / "thesis.txt" / "below", 16)
    assert files_of(tmp_path / "mine") == {"thesis.txt": b"precious"}


@pytest.mark.parametrize("name", ["plan.json", "index.json"])
@pytest.mark.parametrize("text", ["{}", "[1]", '{"clips": [], "version": 2}', "no JSON"])
def test_what_has_only_the_names_of_our_files_is_left_alone(whole, tmp_path, name, text):
    dst = tmp_path / "dst"
    dst.mkdir()
    for other in ("model.safetensors", "film.part", "a.unpacked"):
        (dst / other).write_text("precious")
    (dst / name).write_text(text)
    before = files_of(dst)
    with pytest.raises(UserError, match="dst"):
        made.pack(whole / "src", dst, 16)
    assert files_of(dst) == before


def test_many_clips_of_a_large_source_are_made_by_few_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr("mostgan.prepare.clips.JOB_FRAMES", 1)
    np.save(tmp_path / "a.npy", np.zeros((9000, 1, 1, 3), np.uint8))
    settings = Settings(16, "raw", clip_length=3)
    source = Source("a.npy", "array", str(tmp_path), ["a.npy"])
    source.look(settings)
    jobs = jobs_of(source, settings)
    assert 100 < len(jobs) < 600 and jobs[-1].count is None
    assert all(a.first + a.count == b.first for a, b in zip(jobs, jobs[1:]))
    assert jobs[-1].first < 3000


def test_the_help_explains_every_option(capfd):
    _, out, _ = command(capfd, "--help")
    out = " ".join(out.replace("\u2502", " ").split())
    for told in (
        "keep every frame exactly",
        "stop at the first source",
        "verify this packed folder",
    ):
        assert re.search(rf"--\S+( \S+)? {told}", out), out
    assert "SRC" in out and "Args" not in out


def test_folders_packed_by_earlier_versions_get_one_line(whole, tmp_path, capfd):
    old = tmp_path / "old.clips"
    old.mkdir()
    clip = {"name": "a", "label": None, "fps": 25, "frames": 3, "crc32": 0}
    index = {
        "format": "mostgan-clips",
        "version": 2,
        "resolution": 32,
        "fps": 25,
        "clips": [clip],
        "skipped": [],
    }
    index["shards"] = [{"file": "shard-00000.bin", "bytes": 9}]
    (old / "index.json").write_text(json.dumps(index))
    (old / "shard-00000.bin").write_bytes(bytes(9))
    np.save(old / "offsets.npy", np.arange(4) * 3)
    for use in (
        Clips,
        lambda path: prepare.open_data(path, "sky", 32),
        prepare.check,
        lambda path: made.pack(whole / "src", path, 32),
    ):
        with pytest.raises(UserError, match=r"old\.clips") as error:
            use(old)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="prepare"):
        Clips(old)
    assert command(capfd, "--check", old)[0] == 2


# --------------------------------------------------------------------------------- cutting, framing


def test_long_sources_are_cut_on_a_grid(tmp_path):
    frames = moving(23, 32, 32)
    write_pictures(tmp_path / "src" / "long", frames)
    write_pictures(tmp_path / "src" / "short", frames[:5])
    np.save(tmp_path / "src" / "array.npy", frames[:9])
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32, clip_length=7)
    table = index["clips"]
    # Two frames are left of `long`, and of `array`: no clip, as training takes three.
    assert clips.lengths.tolist() == [7, 7, 7, 7, 5]
    assert list(zip(table["source"], table["start"])) == [
        ("array.npy", 0),
        ("long", 0),
        ("long", 7),
        ("long", 14),
        ("short", 0),
    ]
    assert (clips.frames(3, range(7)).transpose(0, 2, 3, 1) == frames[14:21]).all()
    assert prepare.check(tmp_path / "dst") == []
    whole, clips = made.pack(tmp_path / "src", tmp_path / "uncut", 32)
    assert clips.lengths.tolist() == [9, 23, 5] and clips.names == ["array.npy", "long", "short"]
    for length in (0, 2, -5):
        with pytest.raises(UserError, match=str(length)):
            made.pack(tmp_path / "src", tmp_path / "new", 32, clip_length=length)


@pytest.mark.parametrize("form", ["pictures", "video"])
@pytest.mark.parametrize("crop", ["none", "center", (5, 3, 20, 30), (6, 4, 18, 20)])
def test_crops(tmp_path, form, crop):
    frames = np.zeros((3, 40, 60, 3), np.uint8)
    frames[:, :, :10], frames[:, :, 50:], frames[:, 3:33, 5:25] = (
        (255, 0, 0),
        (0, 0, 255),
        (9, 200, 77),
    )
    if form == "pictures":
        write_pictures(tmp_path / "a", frames)
    else:
        write_video(tmp_path / "a.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    (src,) = tmp_path.glob("a*")
    _, clips = made.pack(src, tmp_path / "dst", 24, crop=crop)
    image = clips.frames(0, [1])[0].transpose(1, 2, 0)
    if crop == "none":  # both ends are there
        assert (image[-1, 0] == (255, 0, 0)).all() and (image[-1, -1] == (0, 0, 255)).all()
    elif crop == "center":  # columns 10 to 49 are
        assert (image[-1] == 0).all() and (image[12, 2] == (9, 200, 77)).all()
    else:
        assert (image == (9, 200, 77)).all()


def test_a_box_outside_the_picture_is_refused(tmp_path, capfd):
    write_pictures(tmp_path / "a", moving(3))
    write_video(tmp_path / "b.mp4", moving(3))
    for src in ("a", "b.mp4"):
        with pytest.raises(UserError) as error:
            made.pack(tmp_path / src, tmp_path / "dst", 16, crop=(30, 0, 20, 20))
        assert "\n" not in str(error.value) and "48x40" in str(error.value)
    for text in ("1,2,3", "a", "0,0,0,5", "-1,0,5,5", "1,2,3,4,5", "1.5,0,5,5"):
        status, _, error = command(
            capfd, tmp_path / "a", tmp_path / "dst", "--resolution", "16", f"--crop={text}"
        )
        assert (
            status == 2 and error.startswith("error: ") and text in error and error.count("\n") == 1
        )


@pytest.mark.parametrize("form", ["videos", "pictures"])
def test_masks_give_one_square_that_holds_the_face_in_every_frame(tmp_path, form):
    frames, masks = moving(6, 64, 96), np.zeros((6, 64, 96, 3), np.uint8)
    for k in range(
        6
    ):  # a face of 12 x 16 that moves by 4 pixels a frame: the box is 32 x 16, the square 32
        masks[k, 24:40, 20 + 4 * k : 32 + 4 * k] = 255
    write_pictures(tmp_path / "src" / "youtube" / "000", frames)
    write_pictures(tmp_path / "src" / "youtube" / "001", frames)
    if form == "videos":
        write_video(tmp_path / "masks" / "000_003.mp4", masks)
    else:
        write_pictures(tmp_path / "masks" / "000_003", masks)
    index, clips = made.pack(tmp_path / "src", tmp_path / "dst", 32, masks=tmp_path / "masks")
    assert len(clips) == 1
    assert (clips.frames(0, range(6)).transpose(0, 2, 3, 1) == frames[:, 16:48, 20:52]).all()
    assert made.notes_on(index, "001", "mask")
    with pytest.raises(UserError, match="mask"):
        made.pack(
            tmp_path / "src" / "youtube" / "001", tmp_path / "new", 32, masks=tmp_path / "masks"
        )
    write_pictures(tmp_path / "black" / "000", masks * 0)
    with pytest.raises(UserError, match="black"):
        made.pack(tmp_path / "src" / "youtube", tmp_path / "new", 32, masks=tmp_path / "black")
    write_pictures(tmp_path / "small" / "000", masks[:, ::2, ::2])
    with pytest.raises(UserError, match="48x32"):
        made.pack(tmp_path / "src" / "youtube", tmp_path / "new", 32, masks=tmp_path / "small")


def test_the_split_depends_on_names_alone(tmp_path):
    for k in range(40):
        write_pictures(tmp_path / "src" / f"clip{k}", moving(3, 8, 8, seed=k))
    parts = {}
    for part in ("train", "test"):
        _, clips = made.pack(tmp_path / "src", tmp_path / part, 8, split=part, test_share=0.4)
        parts[part] = clips.names
    assert sorted(parts["train"] + parts["test"]) == sorted(f"clip{k}" for k in range(40))
    assert 6 <= len(parts["test"]) <= 26
    for k in range(0, 40, 2):
        shutil.rmtree(tmp_path / "src" / f"clip{k}")
    _, clips = made.pack(tmp_path / "src", tmp_path / "fewer", 8, split="test", test_share=0.4)
    assert clips.names == [name for name in parts["test"] if int(name.removeprefix("clip")) % 2]
    with pytest.raises(UserError, match="test"):
        made.pack(tmp_path / "src", tmp_path / "none", 8, split="test", test_share=1e-9)


# -------------------------------------------------------------------------------------- the command


def test_the_summary_has_a_line_for_every_note(tmp_path, capfd):
    src = tmp_path / "src"
    for k in range(20):
        write_pictures(src / f"c{k:02d}", moving(5, 20, 20, seed=k))
    (src / "broken.mp4").write_bytes(b"junk")
    (src / "LICENSE").write_text("text")
    write_video(src / "short.mp4", numbered(2))
    status, out, error = command(capfd, src, tmp_path / "dst", "--resolution", 16)
    assert status == 0 and "Traceback" not in error
    assert "20 clips" in out and "100 frames" in out and "broken.mp4" in out and "short.mp4" in out
    index = json.loads((tmp_path / "dst" / "index.json").read_text())
    for note in index["notes"]:
        assert sorted(note) == ["count", "names", "what", "why"] and len(note["names"]) <= 10
        (line,) = [
            line for line in out.splitlines() if note["what"] in line and note["why"] in line
        ]
        assert str(note["count"]) in line
    with Image.open(tmp_path / "dst" / "preview.png") as preview:
        assert preview.width > 100 and np.asarray(preview.convert("L")).std() > 10
    status, out, error = command(capfd, src, tmp_path / "strict", "--resolution", 16, "--strict")
    assert status == 2 and error.strip().split("\n")[-1].startswith("error: ") and ".mp4" in error
    assert not (tmp_path / "strict" / "index.json").exists()


def test_bad_commands_get_one_line(tmp_path, capfd):
    write_pictures(tmp_path / "a", moving(3))
    base = (tmp_path / "a", tmp_path / "dst")
    cases = [
        (),
        base,
        (*base, "--resolution", 2),
        (*base, "--resolution", 99999),
        (*base, "--resolution", 16, "--fps", 0),
        (*base, "--resolution", 16, "--fps", "nan"),
        (*base, "--resolution", 16, "--clip-length", 2),
        (*base, "--resolution", 16, "--masks", tmp_path / "none"),
        (*base, "--resolution", 16, "--labels", "none.csv"),
        (*base, "--resolution", 16, "--split", "test", "--test-share", 2),
        (tmp_path / "none", tmp_path / "dst", "--resolution", 16),
        (tmp_path / "a", tmp_path / "a", "--resolution", 16),
        ("--check", tmp_path / "none"),
        ("--check", tmp_path / "a"),
        (*base, "--resolution", 16, "--masks", tmp_path / "a", "--crop", "none"),
    ]
    for arguments in cases:
        status, out, error = command(capfd, *arguments)
        assert (
            status == 2 and out == "" and error.startswith("error: ") and error.count("\n") == 1
        ), arguments
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a"], arguments
    assert len(list((tmp_path / "a").iterdir())) == 3


def layout(folder):
    """What the README's commands name, in the layout of each original data set, in small."""
    for video in ("2DdEe2nfpoY", "-3aB_x"):  # names of YouTube: some begin with a dash
        for clip in (1, 2):
            name = f"{video}_frames_{{:08d}}"
            write_pictures(
                folder / f"sky_train/{video}/{video}_{clip}", moving(4, 36, 64), ".jpg", name
            )
    faces = np.zeros((4, 64, 96, 3), np.uint8)
    faces[:, 20:40, 30:50] = 255
    for k in range(2):
        write_video(
            folder / f"original_sequences/youtube/c23/videos/{k:03d}.mp4", moving(4, 64, 96)
        )
        write_video(
            folder / f"manipulated_sequences/Deepfakes/masks/videos/{k:03d}_{1 - k:03d}.mp4", faces
        )
    write_video(
        folder / "jelly.mp4", numbered(50, 16, 16)[np.arange(1030) % 50], 30, options={"g": "60"}
    )
    for k in range(3):
        write_video(folder / f"celebvhq/processed/--abc{k}_{k}.mp4", moving(4, 64, 64))
        write_video(folder / f"horseback/{k}.mp4", moving(4, 36, 64), 30)
    for action in ("ApplyEyeMakeup", "YoYo"):
        for k in (1, 2):
            path = folder / f"UCF-101/{action}/v_{action}_g01_c{k:02d}.avi"
            write_video(path, moving(4, 48, 64), codec="mpeg4")
    return {"sky": 4, "ffs": 2, "jelly": 3, "celebv": 3, "ucf101": 4, "horse": 3}


def test_the_commands_of_the_readme(tmp_path, monkeypatch, capfd):
    expected, done = layout(tmp_path), []
    monkeypatch.chdir(tmp_path)
    for line in re.findall(
        r"`python -m mostgan\.prepare ([^`]*--resolution 256[^`]*)`",
        (ROOT / "mostgan/prepare/README.md").read_text(),
    ):
        arguments = line.replace("--resolution 256", "--resolution 32").split()
        status, out, error = command(capfd, *arguments)
        assert status == 0, (line, error)
        clips = Clips(arguments[1])
        name = Path(arguments[1]).name
        assert len(clips) == expected[name] and clips.fps in (25, 30), (line, clips.names)
        assert not clips.info["notes"], clips.info["notes"]
        if name == "jelly":
            assert clips.lengths.tolist() == [512, 512, 6] and numbers(clips, 1)[:3] == [12, 13, 14]
        if name == "ucf101":
            assert clips.info["labels"]["classes"] == [
                "ApplyEyeMakeup",
                "YoYo",
            ] and clips.labels.tolist() == [0, 0, 1, 1]
        done.append(name)
    assert sorted(done) == sorted(expected)


# ----------------------------------------------------------------------------------------- checking


def test_check_says_so_when_all_is_well(whole, capfd):
    assert prepare.check(whole / "dst") == []
    status, out, error = command(capfd, "--check", whole / "dst")
    assert status == 0 and error == "" and out


@pytest.mark.parametrize("kind", ["clip", "index.json", "preview.png", "labels.safetensors"])
def test_a_flipped_byte_and_a_file_cut_off_are_found_and_named(tmp_path, capfd, kind):
    src = tmp_path / "src"
    for k in range(3):
        write_pictures(src / f"clip{k}", moving(4, 140, 140, seed=k))
    vectors = {f"clip{k}": [k + 0.5, 2.0] for k in range(3)}
    (src / "dataset.json").write_text(json.dumps({"labels": vectors}))
    index, _ = made.pack(src, tmp_path / "whole", 140)
    assert index["coding"] == "jpeg"
    names = [index["clips"]["file"][1]] if kind == "clip" else [kind]
    for name in names:
        data = (tmp_path / "whole" / name).read_bytes()
        places = random.Random(0).sample(range(len(data)), 12)
        for damage in [*places, 0, len(data) - 1, "cut", "gone", "longer"]:
            dst = tmp_path / f"{name}-{damage}"
            shutil.copytree(tmp_path / "whole", dst)
            if damage == "gone":
                (dst / name).unlink()
            elif damage in ("cut", "longer"):
                (dst / name).write_bytes(data[:-1] if damage == "cut" else data + b"\0")
            else:
                flipped = data[damage] ^ 1 << damage % 7
                (dst / name).write_bytes(data[:damage] + bytes([flipped]) + data[damage + 1 :])
            status, out, error = command(capfd, "--check", dst)
            # A flip in the digit of the version makes another version of it, which is as good a
            # refusal.
            assert status == 2 and (name in error or "version" in error or damage == "gone"), (
                damage,
                error,
            )
            assert "Traceback" not in error and all(
                line.startswith("error: ") for line in error.splitlines()
            )
            shutil.rmtree(dst)


def test_check_names_every_damaged_and_missing_file(whole, tmp_path, capfd):
    shutil.copytree(whole / "dst", tmp_path / "dst")
    first, second, third, *_ = sorted((tmp_path / "dst").glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    third.write_bytes(bytes(third.stat().st_size))
    status, _, error = command(capfd, "--check", tmp_path / "dst")
    assert status == 2 and len(error.splitlines()) >= 3
    assert all(path.name in error for path in (first, second, third))
    assert len(prepare.check(tmp_path / "dst")) == 3


def test_the_same_command_mends_what_check_complains_of(whole, tmp_path, monkeypatch):
    """`--check` names files; who removes them and gives the command again has all of them again, as
    of those that are cut off. Interrupted meanwhile, it still does.
    """
    shutil.copytree(whole / "dst", tmp_path / "dst")
    cut, gone, *_ = sorted((tmp_path / "dst").glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    (tmp_path / "dst" / "preview.png").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.Path, "unlink", interrupted)
        made.pack(whole / "src", tmp_path / "dst", 32, clip_length=12)
    assert len(prepare.check(tmp_path / "dst")) == 3
    made.pack(whole / "src", tmp_path / "dst", 32, clip_length=12)
    assert prepare.check(tmp_path / "dst") == [] and files_of(tmp_path / "dst") == files_of(
        whole / "dst"
    )


def interrupted(*args, **options):
    raise KeyboardInterrupt


def test_a_damaged_index_has_all_made_anew(whole, tmp_path):
    """Nothing tells then which of the clips are whole."""
    shutil.copytree(whole / "dst", tmp_path / "dst")
    index, clip = tmp_path / "dst" / "index.json", next((tmp_path / "dst").glob("*.safetensors"))
    data = clip.read_bytes()
    clip.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    index.write_text(index.read_text().replace('"resolution": 32', '"resolution": 33'))
    assert "index.json is damaged" in prepare.check(tmp_path / "dst")[0]
    made.pack(whole / "src", tmp_path / "dst", 32, clip_length=12)
    assert prepare.check(tmp_path / "dst") == [] and files_of(tmp_path / "dst") == files_of(
        whole / "dst"
    )


# -------------------------------------------------------------------------------------- interrupted


def interrupt_after(monkeypatch, count, error=KeyboardInterrupt):
    """The (count + 1)-th time that a file is to take its name, the program is interrupted."""
    real, done = os.replace, []

    def replace(*arguments):
        if len(done) >= count:
            raise error
        done.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(files.os, "replace", replace)
    return done


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8, 10, 11])
def test_an_interrupted_packing_goes_on_and_ends_the_same(whole, tmp_path, monkeypatch, count):
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        interrupt_after(patch, count)
        with pytest.raises(KeyboardInterrupt):
            made.pack(whole / "src", dst, 32, clip_length=12)
    assert not (dst / "index.json").exists() and set(tmp_path.iterdir()) <= {dst}
    with pytest.raises(UserError):
        Clips(dst)
    there = (
        {path.name: path.stat().st_ino for path in dst.glob("*.safetensors")}
        if dst.exists()
        else {}
    )
    assert len(there) >= count - 2  # each clip is there as soon as it is done
    made.pack(whole / "src", dst, 32, clip_length=12)
    assert files_of(dst) == files_of(whole / "dst")
    assert {
        name: (dst / name).stat().st_ino for name in there
    } == there  # what was done is not done again


@pytest.mark.parametrize(
    "change",
    ["settings", "a source", "a clip cut off", "a source gone", "another source", "labels"],
)
def test_what_changed_meanwhile_is_done_again(tmp_path, monkeypatch, change):
    src, dst = tmp_path / "src", tmp_path / "dst"
    make_sources(src)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            made.pack(src, dst, 32, clip_length=12)
    settings = {"clip_length": 12}
    if change == "settings":
        settings = {"clip_length": 10, "fps": 12}
    if change == "a source":
        Image.fromarray(moving(1, 32, 32, seed=9)[0]).save(src / "clip1" / "003.png")
        write_video(src / "film.mp4", numbered(40, 32, 32)[::-1], options={"g": "6"})
    if change == "a clip cut off":
        clip = sorted(dst.glob("*.safetensors"))[0]
        clip.write_bytes(clip.read_bytes()[:-50])
    if change == "a source gone":
        shutil.rmtree(src / "clip0")
        (src / "film.mp4").unlink()
    if change == "another source":
        write_pictures(src / "clip00", moving(8, 32, 32, seed=7))
    if change == "labels":
        settings["labels"] = tmp_path / "labels.csv"
        (tmp_path / "labels.csv").write_text(
            "".join(f"clip{k},{k % 2}\n" for k in range(4)) + "film,5\nmoves,6\n"
        )
    made.pack(src, dst, 32, **settings)
    made.pack(src, tmp_path / "fresh", 32, **settings)
    assert files_of(dst) == files_of(tmp_path / "fresh") and prepare.check(dst) == []


def test_strict_does_not_take_up_what_was_left_out(whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "src", tmp_path / "src")
    (tmp_path / "src" / "broken.mp4").write_bytes(b"junk")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            made.pack(tmp_path / "src", tmp_path / "dst", 32)
    with pytest.raises(UserError, match=r"broken\.mp4"):
        made.pack(tmp_path / "src", tmp_path / "dst", 32, strict=True)
    (tmp_path / "src" / "broken.mp4").unlink()
    assert len(made.pack(tmp_path / "src", tmp_path / "dst", 32, strict=True)[1]) == 6


def start(src, dst, *more, **options):
    """The command as a process group of its own."""
    arguments = [
        sys.executable,
        "-m",
        "mostgan.prepare",
        str(src),
        str(dst),
        "--resolution",
        "32",
        *more,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def group_is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    # Those that ended and whom nobody waited for do not count.
    states = [
        path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")
    ]
    return not any(int(state[2]) == group and state[0] != "Z" for state in states)


def test_kills_at_random_moments(whole, tmp_path):
    """Three here, of the first process alone; its workers end with it. bench/damage.py does twenty
    on larger data."""
    dst, rng = tmp_path / "place" / "dst", random.Random(0)
    dst.parent.mkdir()
    for _ in range(3):
        process = start(whole / "src", dst, "--clip-length", "12")
        wait_for(lambda process=process: process.poll() is not None or dst.exists())
        time.sleep(rng.uniform(0, 1.0))
        process.kill()
        process.communicate()
        assert wait_for(lambda process=process: group_is_gone(process.pid), 20)
    process = start(whole / "src", dst, "--clip-length", "12")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert files_of(dst) == files_of(whole / "dst") and list(dst.parent.iterdir()) == [dst]


def test_control_c_is_one_line_and_leaves_no_process(tmp_path):
    write_video(
        tmp_path / "film.mp4", made.flat(np.arange(12_000) % 200 + 20, 16, 16), options={"g": "10"}
    )
    process = start(tmp_path / "film.mp4", tmp_path / "dst", "--clip-length", "4")
    assert wait_for(
        lambda: list((tmp_path / "dst").glob("*.safetensors")) or process.poll() is not None
    )
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error, error
    assert len(error.strip().splitlines()) == 1 and not (tmp_path / "dst" / "index.json").exists()
    assert wait_for(lambda: group_is_gone(process.pid), 20)


def test_two_at_once_do_not_mix(whole, tmp_path):
    """The first one stops in the middle of a clip; the second one is told to wait, and nothing is
    lost."""
    program = "import sys, time; from mostgan import files, prepare; "
    program += "files.os.replace = lambda *names: time.sleep(60); "
    program += "prepare.prepare(sys.argv[1], sys.argv[2], 32, jobs=1)"
    arguments = [sys.executable, "-c", program, str(whole / "src"), str(tmp_path / "dst")]
    process = subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert wait_for(lambda: (tmp_path / "dst").exists() and list((tmp_path / "dst").iterdir()))
        with pytest.raises(UserError, match="another process"):
            made.pack(whole / "src", tmp_path / "dst", 32)
    finally:
        process.kill()
        process.wait()
    made.pack(whole / "src", tmp_path / "dst", 32)
    assert prepare.check(tmp_path / "dst") == []


def test_a_full_disk_is_one_line_and_is_gone_on_with(whole, tmp_path):
    """A limit on the size of a file stands in for the disk: that, too, fails in the midst of a
    write."""
    limit = max(path.stat().st_size for path in (whole / "dst").glob("*.safetensors")) - 1000

    def few_bytes():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(whole / "src", tmp_path / "dst", "--clip-length", "12", preexec_fn=few_bytes)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in error, error
    assert error.strip().split("\n")[-1].startswith("error: ") and "File too large" in error
    assert not (tmp_path / "dst" / "index.json").exists()
    made.pack(whole / "src", tmp_path / "dst", 32, clip_length=12)
    assert files_of(tmp_path / "dst") == files_of(whole / "dst")


# ---------------------------------------------------------------------------------- damaged sources


def damaged(folder, count=12):
    """Whole files of several kinds, cut off, with flipped bytes, and under wrong names; one that is
    good."""
    rng, src = random.Random(0), folder / "src"
    write_video(folder / "whole" / "v.mp4", moving(12))
    write_video(folder / "whole" / "v.mkv", moving(12))
    write_video(folder / "whole" / "v.avi", moving(12), codec="mpeg4")
    made.write_animation(folder / "whole" / "v.gif", moving(6), [40] * 6)
    made.write_animation(folder / "whole" / "v.webp", moving(6), [40] * 6)
    data = {file.suffix: file.read_bytes() for file in sorted((folder / "whole").iterdir())}
    write_video(src / "good.mp4", numbered(9))
    for k in range(count):
        suffix = rng.choice(sorted(data))
        broken = bytearray(data[suffix])
        if k % 2:
            del broken[rng.randrange(1, len(broken)) :]
        else:
            for _ in range(rng.choice([1, 10, 100])):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
        (src / f"{k:02d}{suffix}").write_bytes(broken)
    wrong = {
        "zero.mp4": b"",
        "text.mp4": b"I am text\n" * 99,
        "wrong.gif": data[".mp4"],
        "wrong.avi": data[".mp4"],
    }
    for name, content in wrong.items():
        (src / name).write_bytes(content)
    return src


def test_damaged_sources_are_named_and_the_rest_is_used(tmp_path, capfd):
    """Twelve here; bench/damage.py does forty, each alone."""
    src = damaged(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, error = command(capfd, src, tmp_path / "dst", "--resolution", 32)
    assert status == 0 and "Traceback" not in error + out and "Warning" not in error
    index, clips = (
        json.loads((tmp_path / "dst" / "index.json").read_text()),
        Clips(tmp_path / "dst"),
    )
    assert numbers(clips, clips.names.index("good.mp4")) == list(range(9))
    for path in src.iterdir():
        assert path.name in clips.names or made.notes_on(index, path.name), path.name
    assert made.notes_on(index, "zero.mp4") and made.notes_on(index, "text.mp4")
    assert prepare.check(tmp_path / "dst") == []
    assert [
        path
        for path in sorted(tmp_path.rglob("*"))
        if tmp_path / "dst" not in [path, *path.parents]
    ] == before


# --------------------------------------------------------------------------------- the built-in sky


def test_the_built_in_sky(tmp_path):
    with made.one_core():
        prepare.pack_sky(tmp_path / "sky", 16, count=3, frames=4)
    clips = Clips(tmp_path / "sky")
    assert clips.lengths.tolist() == [4, 4, 4] and clips.resolution == 16 and not clips.builtin
    assert (clips.frames(1, range(4)) == sky.make_clip(1, 16, 4)).all()
