"""sources.py, prepare.py, data.py: finding clips, packing, sampling frames, batches, opening whatever the user has."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mostgan import data, packing, prepare, sky
from mostgan.config import UserError
from mostgan.data import SPANS, Clips, batches, open_data, sample_fake, sample_real, sample_span
from mostgan.prepare import pack
from mostgan.sources import find_sources
from mostgan.video import center_crop_resize, png, read_frames
from mostgan.video_writer import VideoWriter


def moving(n, height=40, width=48, seed=0):
    """Smooth frames [n,H,W,3], each with a brightness of its own."""
    y, x = np.mgrid[:height, :width] / 40
    a, b = np.random.default_rng(seed).uniform(0, 6, 2)
    wave = np.sin(4 * x + a + np.arange(n)[:, None, None] / 4) * np.cos(3 * y + b) * 60
    return np.stack([wave + 100, wave * 0.5 + 60 + 4 * np.arange(n)[:, None, None] % 120, 190 - wave], -1).astype(
        np.uint8
    )


def write_video(path, frames, fps=25):
    with VideoWriter(path, fps, crf=4) as video:
        video.write(frames)


def write_frames(folder, frames):
    folder.mkdir(parents=True)
    for i, image in enumerate(frames):
        (folder / f"frame{i}.png").write_bytes(png(image))  # not zero-padded: 10 must come after 9


@pytest.fixture
def mixed(tmp_path):
    """A folder with a bit of everything: nested videos, frame folders, a zip, junk, short clips."""
    src = tmp_path / "mixed"
    write_video(src / "b.mp4", moving(12), fps=30)
    write_video(src / "deep" / "er" / "a.gif", moving(5, seed=1))
    write_frames(src / "deep" / "folder%03d", moving(11, seed=2))
    (src / "broken.mp4").write_bytes(b"\0" * 5000)
    (src / "empty.webm").write_bytes(b"")
    write_video(src / "short.mp4", moving(2))
    (src / "notes.txt").write_text("not a video")
    (src / ".hidden.mp4").write_bytes(b"")
    with zipfile.ZipFile(src / "more.zip", "w") as archive:
        for i, image in enumerate(moving(4, seed=3)):
            archive.writestr(f"x/y/{i:03d}.png", png(image))
        archive.writestr("z.mp4", (src / "b.mp4").read_bytes())
    return src


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Seven clips of 3 … 60 frames at 32 pixels, and their frames."""
    folder = tmp_path_factory.mktemp("packed")
    lengths = [3, 5, 9, 17, 20, 33, 60]
    for i, length in enumerate(lengths):
        write_frames(folder / "src" / f"clip{i}", moving(length, 32, 32, seed=i))
    pack(find_sources(folder / "src"), folder / "dst", 32)
    frames = [moving(length, 32, 32, seed=i).transpose(0, 3, 1, 2) for i, length in enumerate(lengths)]
    return Clips(folder / "dst"), frames


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# finding and packing


def test_everything_is_found_and_the_unusable_named_and_counted(mixed, tmp_path, capfd):
    index = pack(find_sources(mixed), tmp_path / "dst", 32)
    clips = Clips(tmp_path / "dst")
    names = ["b.mp4", "deep/er/a.gif", "deep/folder%03d", "more.zip/x/y", "more.zip/z.mp4"]
    assert clips.names == names and clips.lengths.tolist() == [12, 5, 11, 4, 12]
    assert [clip["fps"] for clip in clips.info["clips"]] == [30, 25, 25, 25, 30] and clips.fps == 25
    assert clips.labels is None and clips.num_labels == 0 and len(clips) == 5 and not clips.builtin
    assert {entry["name"] for entry in index["skipped"]} == {"broken.mp4", "empty.webm", "short.mp4"}
    printed = capfd.readouterr().err
    for name in ("broken.mp4: unreadable", "empty.webm: unreadable", "short.mp4: shorter than 3 frames"):
        assert f"skipped {name}" in printed
    assert "skipped 3: 1 shorter than 3 frames, 2 unreadable" in prepare.summary(index)
    expected = np.stack([center_crop_resize(image, 32) for image in moving(11, seed=2)]).transpose(0, 3, 1, 2)
    for i in range(11):
        assert psnr(clips.frames(2, [i])[0], expected[i]) > 45


@pytest.mark.parametrize("form", ["video", "frames", "zip", "zip of videos"])
def test_one_source_in_each_form(tmp_path, form):
    frames = moving(6, 32, 32)
    write_frames(tmp_path / "frames", frames)
    write_video(tmp_path / "video.mp4", frames)
    with zipfile.ZipFile(tmp_path / "zip.zip", "w") as archive:
        for file in (tmp_path / "frames").iterdir():
            archive.write(file, f"c/{file.name}")
    with zipfile.ZipFile(tmp_path / "zip of videos.zip", "w") as archive:
        archive.write(tmp_path / "video.mp4", "c.mp4")
    path = {"video": "video.mp4", "frames": "frames"}.get(form, f"{form}.zip")
    pack(find_sources(tmp_path / path), tmp_path / "dst", 32)
    decoded = Clips(tmp_path / "dst").frames(0, range(6)).transpose(0, 2, 3, 1)
    assert psnr(decoded, frames) > (38 if "video" in form else 45)


def test_lossless_is_exact(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    write_frames(tmp_path / "src", frames)
    pack(find_sources(tmp_path / "src"), tmp_path / "dst", 32, lossless=True)
    assert (Clips(tmp_path / "dst").frames(0, range(4)).transpose(0, 2, 3, 1) == frames).all()


def test_same_input_same_bytes_whatever_the_number_of_threads(mixed, tmp_path):
    for name, jobs in (("one", 1), ("four", 4)):
        pack(find_sources(mixed), tmp_path / name, 32, jobs=jobs)
    one, four = contents(tmp_path / "one"), contents(tmp_path / "four")
    assert sorted(one) == ["SHA256SUMS", "index.json", "offsets.npy", "preview.png", "shard-00000.bin"] and one == four


def test_clips_spread_over_shards(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SHARD_BYTES", 20_000)
    pack(find_sources(packed[0].path.parent / "src"), tmp_path / "dst", 32)
    clips = Clips(tmp_path / "dst")
    assert len(clips.info["shards"]) > 2
    for c, length in enumerate(clips.lengths):
        assert (clips.frames(c, range(length)) == packed[0].frames(c, range(length))).all()


@pytest.mark.parametrize("make", ["missing", "empty", "only text", "all broken", "bad zip", "empty zip"])
def test_unusable_data_is_the_users_to_mend(tmp_path, make):
    src = tmp_path / "src"
    if make != "missing":
        src.mkdir()
    if make == "only text":
        (src / "readme.txt").write_text("no videos here")
    if make == "all broken":
        (src / "a.mp4").write_bytes(b"junk" * 99)
        write_video(src / "b.mp4", moving(1))
    if make == "bad zip":
        (src / "a.zip").write_bytes(b"junk" * 99)
    if make == "empty zip":
        zipfile.ZipFile(src / "a.zip", "w").close()
    with pytest.raises(UserError) as error:
        pack(find_sources(src), tmp_path / "dst", 32)
    text = str(error.value)
    assert "\n" not in text and len(text) > 20
    if make == "all broken":
        assert "1 shorter than 3 frames, 1 unreadable" in text and "a.mp4" in text
    assert {path.name for path in tmp_path.iterdir()} <= {"src"}


# labels


@pytest.mark.parametrize("style", ["pairs", "table", "frames", "without suffix"])
def test_labels_of_dataset_json(tmp_path, style):
    src = tmp_path / "src"
    write_frames(src / "k" / "one", moving(3))
    write_video(src / "two.mp4", moving(3))
    keys = {"frames": ["k/one/frame0.png", "two.mp4"], "without suffix": ["k/one", "two"]}.get(
        style, ["k/one", "two.mp4"]
    )
    labels = {keys[0]: 4, keys[1]: 1}
    text = json.dumps({"labels": labels if style == "table" else list(labels.items())})
    (src / "dataset.json").write_text(text)
    with zipfile.ZipFile(tmp_path / "src.zip", "w") as archive:
        for file in src.rglob("*.*"):
            archive.write(file, f"top/{file.relative_to(src)}")
    for path in (src, tmp_path / "src.zip"):
        pack(find_sources(path), tmp_path / "dst", 16, replace=True)
        clips = Clips(tmp_path / "dst")
        assert clips.labels.tolist() == [4, 1] and clips.num_labels == 5
    label = next(batches(clips, 2, 3, seed=0)).label
    assert label.shape == (2, 5) and set(label.argmax(1).tolist()) == {1, 4} and label.sum() == 2
    assert np.array_equal(clips.condition(0), np.eye(5, dtype=np.float32)[4])


def test_labels_by_folders_and_their_errors(tmp_path):
    for name in ("cat/1", "cat/2", "dog/3"):
        write_frames(tmp_path / "src" / name, moving(3))
    assert [source.label for source in find_sources(tmp_path / "src", "folders")] == [0, 0, 1]
    (tmp_path / "src" / "dataset.json").write_text(json.dumps({"labels": {"cat/1": 0}}))
    with pytest.raises(UserError, match="2 of 3 clips have no label"):
        find_sources(tmp_path / "src")
    for text in ('{"labels": [["cat/1", "zero"]]}', '{"labels": [["cat/1", -1]]}', '{"labels": 3}', "{{{", "[]"):
        (tmp_path / "src" / "dataset.json").write_text(text)
        with pytest.raises(UserError, match=r"dataset\.json"):
            find_sources(tmp_path / "src")
    (tmp_path / "src" / "dataset.json").write_text('{"labels": null}')
    assert find_sources(tmp_path / "src")[0].label is None


# opening


def test_any_frame_equals_sequential_reading_and_the_original(packed):
    clips, frames = packed
    for c, original in enumerate(frames):
        sequential = clips.frames(c, range(len(original)))
        assert all(psnr(a, b) >= 45 for a, b in zip(sequential, original))
        order = np.random.default_rng(c).permutation(len(original))
        assert (clips.frames(c, order) == sequential[order]).all()
    with pytest.raises(IndexError):
        clips.frames(0, [3])
    with pytest.raises(IndexError):
        clips.frames(1, [-1])


def test_clips_can_be_pickled_and_shared_between_threads(packed):
    clips, _ = packed
    expected = clips.frames(6, range(60))
    again = pickle.loads(pickle.dumps(clips))
    assert (again.frames(6, range(60)) == expected).all()
    wrong = []

    def read():
        for _ in range(5):
            if not (clips.frames(6, range(60)) == expected).all():
                wrong.append(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize(
    "damage", ["gone", "version", "not json", "short shard", "no offsets", "short offsets", "frame"]
)
def test_damaged_packed_folders_are_named(packed, tmp_path, damage):
    dst = tmp_path / "dst"
    pack(find_sources(packed[0].path.parent / "src"), dst, 32)
    shard, index = dst / "shard-00000.bin", dst / "index.json"
    if damage == "gone":
        index.unlink()
    if damage == "version":
        index.write_text(index.read_text().replace('"version": 2', '"version": 7'))
    if damage == "not json":
        index.write_text(index.read_text()[:-20])
    if damage == "short shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    if damage == "no offsets":
        (dst / "offsets.npy").unlink()
    if damage == "short offsets":
        np.save(dst / "offsets.npy", np.load(dst / "offsets.npy")[:-1])
    if damage == "frame":
        shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(UserError, match=str(dst)) as error:
        Clips(dst).frames(0, [0])
    assert "\n" not in str(error.value)
    assert damage != "version" or "version 7" in str(error.value)


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
        assert five[0] == 0 and five[-1] in (4, 8, 16, 32) and len(set(five)) == 5 and (np.diff(five) > 0).all()
        assert sample_span(7, 7, rng).tolist() == [0, 1, 2, 3, 4, 5, 6]  # span 6 is none of the usual ones
    assert {int(sample_real(5, 1, rng)[0][0]) for _ in range(200)} == {0, 1, 2, 3, 4}
    with pytest.raises(ValueError):
        sample_span(2, 3, rng)


def test_long_clips_are_windowed():
    rng = np.random.default_rng(0)
    draws = [sample_real(5000, 3, rng) for _ in range(3000)]
    frames, times = np.array([d[0] for d in draws]), np.array([d[1] for d in draws])
    assert times.dtype == np.float64 and times.min() >= 0 and times.max() <= 1023 < frames.max()
    window = frames - times
    assert (window == window[:, :1]).all() and window.min() < 200 and 3776 < window.max() <= 5000 - 1024
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
    assert (np.diff(sets, axis=1) > 0).all() and len(sets) == 35 and 130 < counts.min() < counts.max() < 275
    frames, times = sample_real(5000, 3, rng, sampling="uniform")
    assert frames[-1] < 5000 and times[-1] < 1024 and (np.diff(frames - times) == 0).all()
    t = sample_fake(np.array([7, 90]), 3000, 3, rng, sampling="uniform")
    steps = np.diff(t, axis=1)
    assert t.min() >= 0 and t.max() <= 89 and np.allclose(steps, steps.round()) and (steps > 0.5).all()
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
    assert all(same(a, b) for a, b in zip(whole, again)) and all(same(a, b) for a, b in zip(whole[3:], resumed))
    assert not same(whole[0], take(batches(clips, 4, 3, seed=6), 1)[0])
    halves = [take(batches(clips, 2, 3, seed=5, start=1, rank=rank, world=2, workers=workers), 7) for rank in (0, 1)]
    for batch, first, second in zip(whole[1:], *halves):  # two processes share what one would take alone
        assert same([x[:2] for x in batch], first) and same([x[2:] for x in batch], second)
    frames, t, label = whole[0]
    assert frames.shape == (4, 3, 3, 32, 32) and frames.dtype == torch.uint8
    assert t.shape == (4, 3) and t.dtype == torch.float32 and (t.diff(dim=1) > 0).all()
    assert label.shape == (4, 0) and label.dtype == torch.float32


def test_each_pass_takes_every_clip_once_and_half_are_mirrored(packed):
    clips, _ = packed
    coded = [clips.frames(c, range(n)) for c, n in enumerate(clips.lengths)]
    seen, mirrored = [], []
    for frames, t, _ in take(batches(clips, 7, 3, seed=0), 30):
        for images, times in zip(frames.numpy(), t.numpy().astype(int)):
            for c, flip in ((c, flip) for c in range(7) for flip in (False, True)):
                if times[-1] < clips.lengths[c]:
                    expected = coded[c][times]
                    if (images == (expected[..., ::-1] if flip else expected)).all():
                        seen.append(c)
                        mirrored.append(flip)
                        break
            else:
                pytest.fail("a sample is neither a clip's frames at its times nor their mirror image")
    passes = np.array(seen).reshape(30, 7)
    assert (np.sort(passes, axis=1) == np.arange(7)).all() and len({tuple(p) for p in passes}) > 25
    assert 0.38 < np.mean(mirrored) < 0.62
    assert (np.array(mirrored).reshape(30, 7).std(axis=1) > 0).mean() > 0.8  # drawn for each clip of a batch alone
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
    pack(find_sources(packed[0].path.parent / "src"), tmp_path / "dst", 32)
    clips = Clips(tmp_path / "dst")
    shard = tmp_path / "dst" / "shard-00000.bin"
    shard.write_bytes(b"\0" * shard.stat().st_size)
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
    root = Path(data.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0 and "32, 32" in done.stdout, done.stderr


# opening whatever the user has


def test_raw_data_is_packed_once_beside_it_and_again_when_it_changes(tmp_path, capsys):
    src = tmp_path / "clouds"
    write_frames(src / "a", moving(4))
    first = open_data(src, "sky", 16)
    assert first.path == tmp_path / "clouds-16px.clips" and not first.builtin and "once" in capsys.readouterr().out
    assert open_data(src, "sky", 16).path == first.path and capsys.readouterr().out == ""
    assert open_data(src, "sky", 32).resolution == 32
    write_frames(src / "b", moving(5))
    assert len(open_data(src, "sky", 16)) == 2
    (src / "b" / "frame4.png").unlink()
    assert open_data(src, "sky", 16).lengths.tolist() == [4, 4]
    assert open_data(first.path, "sky", 16).path == first.path  # packed folders are taken as they are
    with pytest.raises(UserError, match="16 pixels.*--resolution 32"):
        open_data(first.path, "sky", 32)
    with pytest.raises(UserError, match="does not exist"):
        open_data(tmp_path / "nowhere", "sky", 16)


def test_a_read_only_place_and_a_cache_that_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_frames(tmp_path / "ro" / "src" / "a", moving(4))
    os.chmod(tmp_path / "ro", 0o555)
    try:
        clips = open_data(tmp_path / "ro" / "src", "sky", 16)
        assert clips.path.parent == Path("data/cache") and clips.path.name.endswith("src-16px.clips")
        given = open_data(tmp_path / "ro" / "src", "sky", 16, cache=tmp_path / "elsewhere")
        assert given.path.parent == tmp_path / "elsewhere"
        assert sorted(p.name for p in (tmp_path / "ro").iterdir()) == ["src"]
    finally:
        os.chmod(tmp_path / "ro", 0o755)


def test_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sky, "clips", lambda: [sky.SkyClip(i, 4) for i in range(3)])
    with pytest.raises(UserError, match="data/ffs"):
        open_data(None, "ffs", 16)
    clips = open_data(None, "sky", 16)
    assert clips.builtin and clips.path == Path("data/sky-builtin-16px.clips") and clips.lengths.tolist() == [4, 4, 4]
    expected = sky.make_clip(1, 16, 4)
    assert psnr(clips.frames(1, range(4)), expected) >= 45
    assert open_data(None, "sky", 16).builtin
    write_frames(tmp_path / "data" / "sky" / "a", moving(4))
    assert not open_data(None, "sky", 16).builtin  # the user's own sky comes first


# the command


def test_the_command(mixed, tmp_path):
    def run(*arguments):
        root = Path(data.__file__).parents[1]
        command = [sys.executable, "-m", "mostgan.prepare", *map(str, arguments)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True)

    done = run(mixed, tmp_path / "dst", "--resolution", 16)
    assert done.returncode == 0 and "5 clips, 44 frames of 16 pixels" in done.stdout and "skipped 3" in done.stdout
    assert Clips(tmp_path / "dst").resolution == 16
    for arguments in ((mixed, tmp_path / "dst"), (tmp_path / "none", tmp_path / "new")):
        done = run(*arguments, "--resolution", 16)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_videos_read_the_same_from_a_zip(tmp_path):
    write_video(tmp_path / "a.mp4", moving(5))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "a.mp4", "a.mp4")
    (source,) = find_sources(tmp_path / "a.zip")
    direct = [center_crop_resize(frame, 24) for frame in read_frames(tmp_path / "a.mp4")]
    assert (np.stack(list(source.frames(24))) == direct).all()
