"""data.py: opening packed clips, sampling frames, batches; opening whatever the user has, caches,
the run's data."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import made_clips as made
import numpy as np
import pytest
import torch
from made_clips import moving, numbered, numbers, write_pictures, write_video
from PIL import Image
from safetensors.numpy import load_file
from test_prepare_sources import make_archive

import train as training
from mostgan.config import ModelConfig, TrainConfig, UserError
from mostgan.data import SPANS, Clips, batches, sample_fake, sample_real, sample_span
from mostgan.prepare import open_data, pack_sky, sky
from mostgan.run import what_to_resume

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Seven clips of 3 … 60 frames at 32 pixels, and their frames."""
    folder = tmp_path_factory.mktemp("packed")
    lengths = [3, 5, 9, 17, 20, 33, 60]
    for k, length in enumerate(lengths):
        write_pictures(folder / "src" / f"clip{k}", moving(length, 32, 32, seed=k))
    _, clips = made.pack(folder / "src", folder / "dst", 32)
    return clips, [
        moving(length, 32, 32, seed=k).transpose(0, 3, 1, 2) for k, length in enumerate(lengths)
    ]


# opening packed clips


def test_what_clips_say_about_themselves(packed):
    clips, frames = packed
    assert len(clips) == 7 and clips.resolution == 32 and clips.fps == 25
    assert clips.names == [f"clip{k}" for k in range(7)]
    assert clips.lengths.dtype == np.int64 and clips.lengths.tolist() == [
        len(clip) for clip in frames
    ]
    assert clips.labels is None and clips.num_labels == 0 and clips.condition(3).shape == (0,)
    assert not clips.builtin and clips.info["clips"]["name"] == clips.names


def test_any_frame_in_any_order_is_the_one_of_the_source(packed):
    clips, frames = packed
    for k, original in enumerate(frames):
        found = clips.frames(k, range(len(original)))
        assert found.dtype == np.uint8 and (found == original).all()  # raw at this size
        order = np.random.default_rng(k).permutation(len(original))
        assert (clips.frames(k, order) == original[order]).all()
        assert (clips.frames(k, [1, 1, 0]) == original[[1, 1, 0]]).all()
    assert clips.frames(0, []).shape == (0, 3, 32, 32)
    for clip, wrong in ((0, [3]), (1, [-1])):
        with pytest.raises(IndexError):
            clips.frames(clip, wrong)


def test_frames_of_jpegs_are_what_pillow_decodes(tmp_path):
    write_pictures(tmp_path / "src" / "a", moving(5, 150, 150))
    _, clips = made.pack(tmp_path / "src", tmp_path / "dst", 140)
    tensors = load_file(tmp_path / "dst" / clips.info["clips"]["file"][0])
    offsets = tensors["offsets"]
    assert offsets.dtype == np.int64 and offsets.shape == (6,) and offsets[0] == 0
    for k in range(5):
        data = tensors["jpeg"][offsets[k] : offsets[k + 1]].tobytes()
        expected = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
        assert (clips.frames(0, [k])[0] == expected).all()


def test_frames_are_read_and_no_others(packed, tmp_path):
    """Rubbish everywhere else in the file is not noticed."""
    shutil.copytree(packed[0].path, tmp_path / "dst")
    clips = Clips(tmp_path / "dst")
    file = tmp_path / "dst" / clips.info["clips"]["file"][6]
    data, size = bytearray(file.read_bytes()), 3 * 32 * 32
    begin = data.index(packed[1][6].tobytes())
    for k in set(range(60)) - {7, 30, 31}:
        data[begin + k * size : begin + (k + 1) * size] = b"\xaa" * size
    file.write_bytes(data)
    assert (clips.frames(6, [31, 7, 30]) == packed[1][6][[31, 7, 30]]).all()


def test_clips_can_be_pickled_and_shared_between_threads(packed):
    clips, frames = packed
    again = pickle.loads(pickle.dumps(clips))
    assert (again.frames(6, range(60)) == frames[6]).all() and len(pickle.dumps(clips)) < 5000
    wrong = []

    def read():
        for _ in range(5):
            if not (clips.frames(6, range(60)) == frames[6]).all():
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not wrong


def test_no_file_stays_open(packed):
    clips, _ = packed
    before = len(os.listdir("/proc/self/fd"))
    for k in range(7):
        clips.frames(k, [0, 1, 2])
    assert len(os.listdir("/proc/self/fd")) <= before


DAMAGES = [
    "gone",
    "folder",
    "version",
    "not json",
    "columns",
    "clip gone",
    "clip cut",
    "clip rubbish",
    "clip of another size",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_packed_folders_are_named(packed, tmp_path, damage):
    dst = tmp_path / "dst"
    shutil.copytree(packed[0].path, dst)
    index, clip = dst / "index.json", dst / packed[0].info["clips"]["file"][0]
    if damage == "gone":
        index.unlink()
    if damage == "folder":
        shutil.rmtree(dst)
    if damage == "version":
        index.write_text(index.read_text().replace('"version": 3', '"version": 7'))
    if damage == "not json":
        index.write_text(index.read_text()[:-20])
    if damage == "columns":
        table = json.loads(index.read_text())
        table["clips"]["frames"].pop()
        index.write_text(json.dumps(table))
    if damage == "clip gone":
        clip.unlink()
    if damage == "clip cut":
        clip.write_bytes(clip.read_bytes()[:-1])
    if damage == "clip rubbish":
        clip.write_bytes(bytes(clip.stat().st_size))
    if damage == "clip of another size":
        _, other = made.pack(packed[0].path.parent / "src", tmp_path / "other", 16)
        shutil.copy(tmp_path / "other" / other.info["clips"]["file"][0], clip)
    with pytest.raises(UserError, match=str(dst)) as error:
        Clips(dst).frames(0, [0])
    assert "\n" not in str(error.value)
    assert damage != "version" or "7" in str(error.value)
    assert not damage.startswith("clip") or clip.name in str(error.value)


def test_36000_clips_are_opened_in_little_memory(tmp_path):
    """As many as CelebV-HQ has. Their files are empty: opening looks into none. bench/loader.py
    measures the time."""
    write_pictures(tmp_path / "src" / "clip", made.smallest())
    index, _ = made.pack(tmp_path / "src", tmp_path / "dst", 16)
    n, table = 36_000, index["clips"]
    for name, column in table.items():
        table[name] = column and column * n
    table["file"] = [
        f"celebvhq-processed-video-{k:05d}-0123abcd-00000.safetensors" for k in range(n)
    ]
    table["name"] = table["source"] = [f"celebvhq/processed/M2Ohb0FAaJU_{k}.mp4" for k in range(n)]
    (tmp_path / "dst" / "index.json").write_text(json.dumps(index, indent=1))
    for file in table["file"]:
        os.close(os.open(tmp_path / "dst" / file, os.O_CREAT))
    program = (
        "import resource, sys, time\n"
        "from mostgan.data import Clips\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, begun = peak(), time.perf_counter()\n"
        "clips = Clips(sys.argv[1])\n"
        "print(len(clips), time.perf_counter() - begun, peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "dst"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    count, seconds, megabytes = map(float, done.stdout.split())
    assert count == n and megabytes <= 40 and seconds < 10, done.stdout


# frame sampling (spec §8)


@pytest.mark.parametrize("length", [3, 4, 5, 8, 16, 17, 33, 40])
def test_spans_offsets_and_the_frames_between(length):
    rng = np.random.default_rng(0)
    drawn = np.array([sample_real(length, 3, rng)[0] for _ in range(4000)])
    assert (np.diff(drawn, axis=1) > 0).all() and drawn.min() >= 0 and drawn.max() < length
    spans, fitting = drawn[:, 2] - drawn[:, 0], [s for s in SPANS if s <= length - 1]
    assert sorted(set(spans)) == fitting
    for span in fitting:
        here = drawn[spans == span]
        assert abs(len(here) / len(drawn) - 1 / len(fitting)) < 0.04  # each span as often
        assert set(here[:, 0]) == set(range(length - span))  # offsets 0 … L − span − 1
        assert set(here[:, 1] - here[:, 0]) == set(range(1, span))  # strictly between
        counts = np.bincount(here[:, 0], minlength=length - span)
        assert counts.max() < 2 * counts.mean() + 30 and counts.min() > counts.mean() / 2 - 30


def test_other_numbers_of_frames():
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert sample_span(20, 1, rng).tolist() == [0]
        assert len(sample_span(20, 2, rng)) == 2 and sample_span(20, 2, rng)[1] in SPANS
        five = sample_span(50, 5, rng)
        assert (
            five[0] == 0
            and five[-1] in (4, 8, 16, 32)
            and len(set(five)) == 5
            and (np.diff(five) > 0).all()
        )
        assert sample_span(7, 7, rng).tolist() == [
            0,
            1,
            2,
            3,
            4,
            5,
            6,
        ]  # span 6 is none of the usual ones
    assert {int(sample_real(5, 1, rng)[0][0]) for _ in range(200)} == {0, 1, 2, 3, 4}
    with pytest.raises(ValueError):
        sample_span(2, 3, rng)


def test_every_window_of_a_long_clip_is_taken():
    """Of 12 frames, 10 at most: windows start at frames 0, 1 and 2, and the last frame is shown."""
    rng = np.random.default_rng(0)
    shown = [sample_real(12, 3, rng, max_num_frames=10) for _ in range(500)]
    assert {int(frames[0] - times[0]) for frames, times in shown} == {0, 1, 2}
    assert max(frames[-1] for frames, _ in shown) == 11


def test_long_clips_are_windowed():
    rng = np.random.default_rng(0)
    draws = [sample_real(5000, 3, rng) for _ in range(3000)]
    frames, times = np.array([d[0] for d in draws]), np.array([d[1] for d in draws])
    assert times.dtype == np.float64 and times.min() >= 0 and times.max() <= 1023 < frames.max()
    window = frames - times
    assert (
        (window == window[:, :1]).all()
        and window.min() < 200
        and 3776 < window.max() <= 5000 - 1024
    )
    index, t = sample_real(1024, 3, rng)
    assert (index == t).all()


def test_times_for_the_generator():
    rng = np.random.default_rng(0)
    t = sample_fake(np.array([2, 10, 5000]), 4000, 3, rng)  # the clip of 2 frames is never drawn
    assert t.shape == (4000, 3) and t.dtype == np.float64 and t.min() >= 0 and t.max() < 1023
    steps = np.diff(t, axis=1)
    assert np.allclose(steps, steps.round()) and (steps >= 1 - 1e-9).all()
    assert (np.abs(t[:, 0] - t[:, 0].round()) > 1e-6).mean() > 0.99  # the offset is real
    spans = (t[:, 2] - t[:, 0]).round()
    # Half of the draws are the clip of 10 frames (spans 2, 4, 8), half the long one (all five).
    expected = {2: 4 / 15, 4: 4 / 15, 8: 4 / 15, 16: 0.1, 32: 0.1}
    assert all(abs((spans == span).mean() - share) < 0.04 for span, share in expected.items())
    assert sample_fake(np.array([3]), 2, 3, rng).tolist() == [[0, 1, 2], [0, 1, 2]]
    with pytest.raises(ValueError):
        sample_fake(np.array([2]), 1, 3, rng)


def test_uniform_sampling():
    rng = np.random.default_rng(0)
    drawn = np.array([sample_real(7, 3, rng, sampling="uniform")[0] for _ in range(7000)])
    sets, counts = np.unique(drawn, axis=0, return_counts=True)
    assert (
        (np.diff(sets, axis=1) > 0).all()
        and len(sets) == 35
        and 130 < counts.min() < counts.max() < 275
    )
    frames, times = sample_real(5000, 3, rng, sampling="uniform")
    assert frames[-1] < 5000 and times[-1] < 1024 and (np.diff(frames - times) == 0).all()
    t = sample_fake(np.array([7, 90]), 3000, 3, rng, sampling="uniform")
    steps = np.diff(t, axis=1)
    assert (
        t.min() >= 0 and t.max() <= 89 and np.allclose(steps, steps.round()) and (steps > 0.5).all()
    )
    assert len(np.unique(steps.round())) > 40  # no spans
    with pytest.raises(ValueError):
        sample_real(2, 3, rng, sampling="uniform")


def test_unknown_sampling_and_rank_are_refused(packed):
    for wrong in ({"sampling": "any"}, {"rank": 2, "world": 2}):
        with pytest.raises(ValueError):
            batches(packed[0], 4, 3, seed=0, **wrong)


# batches


def take(iterator, n):
    out = [next(iterator) for _ in range(n)]
    iterator.close()
    return out


def same(a, b):
    return all((x == y).all() for x, y in zip(a, b))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_deterministic_and_resume_exactly(packed, workers):
    clips, _ = packed
    whole = take(batches(clips, 4, 3, seed=5), 8)
    again = take(batches(clips, 4, 3, seed=5, workers=workers), 8)
    resumed = take(batches(clips, 4, 3, seed=5, start=3, workers=workers), 5)
    assert all(same(a, b) for a, b in zip(whole, again)) and all(
        same(a, b) for a, b in zip(whole[3:], resumed)
    )
    assert not same(whole[0], take(batches(clips, 4, 3, seed=6), 1)[0])
    halves = [
        take(batches(clips, 2, 3, seed=5, start=1, rank=rank, world=2, workers=workers), 7)
        for rank in (0, 1)
    ]
    for batch, first, second in zip(
        whole[1:], *halves
    ):  # two processes share what one would take alone
        assert same([x[:2] for x in batch], first) and same([x[2:] for x in batch], second)
    frames, t, label, _ = whole[0]
    assert frames.shape == (4, 3, 3, 32, 32) and frames.dtype == torch.uint8
    assert t.shape == (4, 3) and t.dtype == torch.float32 and (t.diff(dim=1) > 0).all()
    assert label.shape == (4, 0) and label.dtype == torch.float32


def test_each_pass_takes_every_clip_once_and_half_are_mirrored(packed):
    clips, _ = packed
    coded = [clips.frames(c, range(n)) for c, n in enumerate(clips.lengths)]
    seen, mirrored = [], []
    for frames, t, *_ in take(batches(clips, 7, 3, seed=0), 30):
        for images, times in zip(frames.numpy(), t.numpy().astype(int)):
            for c, flip in ((c, flip) for c in range(7) for flip in (False, True)):
                if times[-1] < clips.lengths[c]:
                    expected = coded[c][times]
                    if (images == (expected[..., ::-1] if flip else expected)).all():
                        seen.append(c)
                        mirrored.append(flip)
                        break
            else:
                pytest.fail(
                    "a sample is neither a clip's frames at its times nor their mirror image"
                )
    passes = np.array(seen).reshape(30, 7)
    assert (np.sort(passes, axis=1) == np.arange(7)).all() and len({tuple(p) for p in passes}) > 25
    assert 0.38 < np.mean(mirrored) < 0.62
    assert (
        np.array(mirrored).reshape(30, 7).std(axis=1) > 0
    ).mean() > 0.8  # drawn for each clip of a batch alone
    plain = take(batches(clips, 7, 3, seed=0, mirror=False), 1)[0]
    first = take(batches(clips, 7, 3, seed=0), 1)[0]
    flips = [not (a == b).all() for a, b in zip(plain.frames, first.frames)]
    assert flips == mirrored[:7] and (plain.t == first.t).all()


def test_clips_too_short_for_a_sample_are_left_out(packed):
    clips, _ = packed
    assert next(batches(clips, 5, 9, seed=0)).frames.shape[1] == 9  # five of the seven clips
    with pytest.raises(UserError, match="no clip has 61 frames"):
        batches(clips, 4, 61, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_consumer_as_they_are(packed, tmp_path, workers):
    shutil.copytree(packed[0].path, tmp_path / "dst")
    clips = Clips(tmp_path / "dst")
    for file in (tmp_path / "dst").glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match="damaged") as error:
        next(batches(clips, 2, 3, seed=0, workers=workers))
    assert "\n" not in str(error.value)


def test_stopping_leaves_no_thread_and_no_state(packed):
    before, state = threading.active_count(), torch.random.get_rng_state()
    iterator = batches(packed[0], 4, 3, seed=0)
    next(iterator)
    iterator.close()
    take(batches(packed[0], 4, 3, seed=0, workers=1), 1)
    assert (torch.random.get_rng_state() == state).all()
    deadline = time.monotonic() + 20  # the DataLoader's own threads take a moment to end
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_program_that_forgets_to_close_exits(packed, workers):
    program = (
        "from mostgan.data import *\n"
        f"iterator = batches(Clips({str(packed[0].path)!r}), 4, 3, seed=0, workers={workers})\n"
        "print(next(iterator).frames.shape)"
    )
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0 and "32, 32" in done.stdout, done.stderr


# opening whatever the user has


def write_source(path, kind, frames, name="a"):
    """The same clip as a folder of pictures, a video or an archive."""
    if kind == "folder":
        write_pictures(path / name, frames)
    elif kind == "mp4":
        write_video(path, frames)
    else:
        files = {}
        for k, image in enumerate(frames):
            data = io.BytesIO()
            Image.fromarray(image).save(data, "PNG")
            files[f"{name}/{k:03d}.png"] = data.getvalue()
        make_archive(path, files)


@pytest.fixture
def one_core(monkeypatch):
    """Packing starts no workers: they would take longer than what they do here."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})


def caches(folder):
    return sorted(path.name for path in folder.glob("*.clips"))


def test_sources_with_long_names_and_with_files_named_as_ours(tmp_path, one_core):
    for name in ("n" * 250, "\N{GRINNING FACE}" * 60):
        src = tmp_path / name
        write_source(src, "folder", numbered(4, 16, 16))
        (src / "plan.json").write_text('{"chapters": 3}')
        assert numbers(open_data(src, "sky", 16)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "name", ["clouds", "clouds.zip", "clouds.tar", "clouds.tar.gz", "clouds.mp4"]
)
def test_raw_data_is_packed_once_beside_it_and_again_when_it_changes(
    tmp_path, capsys, one_core, name
):
    src, kind = tmp_path / name, name.partition(".")[2] or "folder"
    write_source(src, kind, numbered(4, 16, 16))
    first = open_data(src, "sky", 16)
    assert (
        first.path.parent == tmp_path and first.path.name.startswith("clouds") and not first.builtin
    )
    assert "once" in capsys.readouterr().out and numbers(first) == [0, 1, 2, 3]
    before = made.files_of(first.path)
    again = open_data(src, "sky", 16)
    assert (
        again.path == first.path
        and capsys.readouterr().out == ""
        and made.files_of(first.path) == before
    )
    larger = open_data(src, "sky", 32)
    assert larger.resolution == 32 and larger.path != first.path
    if kind == "folder":
        write_source(src, kind, numbered(5, 16, 16), "b")
        assert sorted(open_data(src, "sky", 16).lengths.tolist()) == [4, 5]
        (src / "b" / "004.png").unlink()
        assert open_data(src, "sky", 16).lengths.tolist() == [4, 4]
        # The same names, and of each file the same size.
        write_source(src, kind, numbered(7, 16, 16)[3:], "a")
    else:
        write_source(src, kind, numbered(7, 16, 16)[3:])
    assert numbers(open_data(src, "sky", 16)) == [3, 4, 5, 6]
    for path in (first.path, larger.path):
        if path.exists():  # packed folders are taken as they are
            assert open_data(path, "sky", Clips(path).resolution).path == path
            with pytest.raises(UserError, match="pixels"):
                open_data(path, "sky", 64)
    with pytest.raises(UserError, match="does not exist"):
        open_data(tmp_path / "nowhere", "sky", 16)


def test_sources_of_one_name_have_a_cache_each(tmp_path, one_core):
    places = {}
    for k, end in enumerate(("", ".zip", ".tar", ".tar.gz", ".mp4")):
        write_source(
            tmp_path / f"x{end}", end.lstrip(".") or "folder", numbered(20, 16, 16)[k : k + 4]
        )
        places[end] = open_data(tmp_path / f"x{end}", "sky", 16).path
    assert len(set(places.values())) == 5 == len(caches(tmp_path))
    for k, (end, place) in enumerate(places.items()):  # none was taken for another
        clips = open_data(tmp_path / f"x{end}", "sky", 16)
        assert clips.path == place and numbers(clips) == list(range(k, k + 4))


def test_sources_of_one_name_from_different_places_in_one_cache(tmp_path, one_core):
    for k, place in enumerate(("one", "two")):
        write_source(tmp_path / place / "x", "folder", numbered(8, 16, 16)[k : k + 4])
        for path in (tmp_path / place).rglob("*"):
            os.utime(path, (10**9, 10**9))
    first, second = (
        open_data(tmp_path / place / "x", "sky", 16, cache=tmp_path / "cache")
        for place in ("one", "two")
    )
    assert first.path != second.path and first.path.parent == tmp_path / "cache"
    assert numbers(first) == [0, 1, 2, 3] and numbers(second) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "damage", ["index gone", "index rubbish", "clip gone", "an earlier version"]
)
def test_a_cache_that_is_stale_or_damaged_is_made_anew(tmp_path, one_core, damage):
    write_source(tmp_path / "x", "folder", numbered(4, 16, 16))
    place = open_data(tmp_path / "x", "sky", 16).path
    before, (clip,) = made.files_of(place), place.glob("*.safetensors")
    if damage == "index gone":
        (place / "index.json").unlink()
    if damage == "index rubbish":
        (place / "index.json").write_text("{")
    if damage == "clip gone":
        clip.unlink()
    if damage == "an earlier version":
        (place / "index.json").write_text('{"format": "mostgan-clips", "version": 2, "clips": []}')
    clips = open_data(tmp_path / "x", "sky", 16)
    assert numbers(clips) == [0, 1, 2, 3] and made.files_of(clips.path) == before


def test_a_packing_of_the_cache_that_was_interrupted_goes_on(tmp_path, one_core, monkeypatch):
    for k in range(3):
        write_source(tmp_path / "x", "folder", numbered(4 + k, 16, 16), f"clip{k}")
    real, done = os.replace, []

    def replace(*names):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(real(*names))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            open_data(tmp_path / "x", "sky", 16)
    assert open_data(tmp_path / "x", "sky", 16).lengths.tolist() == [4, 5, 6]
    assert len(caches(tmp_path)) == 1


def test_a_read_only_place_and_a_cache_that_is_given(tmp_path, monkeypatch, one_core):
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "ro" / "src", "folder", numbered(4, 16, 16))
    os.chmod(tmp_path / "ro", 0o555)
    try:
        clips = open_data(tmp_path / "ro" / "src", "sky", 16)
        assert clips.path.parent == Path("data/cache") and clips.path.name.endswith(".clips")
        given = open_data(tmp_path / "ro" / "src", "sky", 16, cache=tmp_path / "elsewhere")
        assert given.path.parent == tmp_path / "elsewhere"
        assert sorted(path.name for path in (tmp_path / "ro").iterdir()) == ["src"]
    finally:
        os.chmod(tmp_path / "ro", 0o755)


def test_a_cache_among_the_sources_is_no_source(tmp_path, one_core):
    """A folder of data sets, each with its cache beside it, given as a data set itself."""
    write_source(tmp_path / "all" / "x", "folder", numbered(4, 16, 16))
    open_data(tmp_path / "all" / "x", "sky", 16)
    assert open_data(tmp_path / "all", "sky", 16).lengths.tolist() == [4]


def test_without_a_path(tmp_path, monkeypatch, one_core):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sky, "CLIPS", 3)
    monkeypatch.setattr(sky, "FRAMES", 4)
    with pytest.raises(UserError, match="data/ffs"):
        open_data(None, "ffs", 16)
    clips = open_data(None, "sky", 16)
    assert (
        clips.builtin and clips.path.parent == Path("data") and clips.lengths.tolist() == [4, 4, 4]
    )
    assert (clips.frames(1, range(4)) == sky.make_clip(1, 16, 4)).all()
    assert open_data(None, "sky", 16).path == clips.path
    write_source(tmp_path / "data" / "sky", "folder", numbered(4, 16, 16))
    assert not open_data(None, "sky", 16).builtin  # the user's own sky comes first


# the run's side

TINY = ModelConfig(
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


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(training, "save_grids", lambda *arguments: None)
    monkeypatch.setattr(training, "save_real_grid", lambda *arguments: None)


def tiny_run(data, steps=1):
    values = dict(
        data=str(data),
        batch_clips=4,
        batch_split=1,
        precision="float32",
        compile=False,
        workers=0,
        augment="none",
        total_kframes=0.012 * steps,
        log_kframes=0.012,
        snapshot_kframes=100,
    )
    return dataclasses.replace(TrainConfig(TINY), **values)


def described(run):
    return json.loads((run / "config.json").read_text())


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "packed"])
def test_training_takes_data_in_every_form_and_a_run_remembers_it(tmp_path, one_core, quiet, form):
    src = tmp_path / ("x" if form in ("folder", "packed") else f"x.{form}")
    for k in range(2) if form in ("folder", "packed") else [0]:
        write_source(
            src, "folder" if form == "packed" else form, moving(6, 32, 32, seed=k), f"clip{k}"
        )
    data = src
    if form == "packed":
        data = made.pack(src, tmp_path / "packed", 32)[1].path
    training.train(tiny_run(data), tmp_path / "run")
    clips = open_data(data, "sky", 32)
    remembered = described(tmp_path / "run")
    assert (
        Path(remembered["data"]) == data.resolve()
        and clips.info["fingerprint"] in remembered.values()
    )


def test_a_run_goes_on_with_other_data_only_when_they_are_named(tmp_path, one_core, quiet, capsys):
    write_source(tmp_path / "x", "folder", moving(6, 32, 32), "clip0")
    training.train(tiny_run(tmp_path / "x"), tmp_path / "run")
    before = described(tmp_path / "run")
    write_source(tmp_path / "x", "folder", moving(6, 32, 32, seed=5), "clip0")
    resume = what_to_resume(tmp_path / "run", "")
    with pytest.raises(UserError, match="--data") as error:
        training.train(tiny_run(tmp_path / "x", 2), None, resume)
    assert "\n" not in str(error.value) and described(tmp_path / "run") == before
    capsys.readouterr()
    training.train(tiny_run(tmp_path / "x", 2), None, resume._replace(names_data=True))
    told, after = capsys.readouterr().out, described(tmp_path / "run")
    assert (
        "other data" in told
        and after["data_fingerprint"] == open_data(tmp_path / "x", "sky", 32).info["fingerprint"]
    )
    assert after["data_fingerprint"] != before["data_fingerprint"]
    # It is the run's data now.
    training.train(tiny_run(tmp_path / "x", 3), None, what_to_resume(tmp_path / "run", ""))


@pytest.mark.slow
def test_the_command_line_names_other_data(tmp_path):
    """`--resume` alone refuses, in one line; with --data it goes on, says so, and records it."""
    for k in range(2):
        pack_sky(tmp_path / f"sky{k}", 32, count=2 + k, frames=6)
    model = [
        word
        for name, value in vars(TINY).items()
        if value != getattr(ModelConfig(), name)
        for word in (
            f"--{name.replace('_', '-')}",
            *map(str, value if isinstance(value, tuple) else [value]),
        )
    ]
    base = [
        sys.executable,
        str(ROOT / "train.py"),
        "--preset",
        "tiny",
        *model,
        "--batch-clips",
        "4",
        "--batch-split",
        "1",
    ]
    base += [
        "--augment",
        "none",
        "--log-kframes",
        "0.012",
        "--out",
        str(tmp_path / "run"),
        "--resume",
    ]

    def run(*arguments):
        return subprocess.run([*base, *arguments], capture_output=True, text=True, cwd=tmp_path)

    done = run("--data", str(tmp_path / "sky0"), "--total-kframes", "0.012")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "sky0")
    (tmp_path / "sky1").rename(tmp_path / "sky0")
    done = run("--total-kframes", "0.024")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line][-1].startswith("error: ")
    done = run("--total-kframes", "0.024", "--data", str(tmp_path / "sky0"))
    assert done.returncode == 0 and "other data" in done.stdout + done.stderr, done.stderr
    assert described(tmp_path / "run")["clips"] == 3
