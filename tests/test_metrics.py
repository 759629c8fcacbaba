"""Scores: the Fréchet distance, the protocol from end to end, its cache, several processes, bad
input (spec §9).
"""

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file

import mostgan
import train as training
from mostgan import checkpoint, metrics
from mostgan.config import ModelConfig, TrainConfig, UserError
from mostgan.data import Clips
from mostgan.metrics import __main__ as program
from mostgan.metrics import frechet, sets
from mostgan.metrics.frechet import add_features, frechet_distance, mean_and_covariance
from mostgan.metrics.sets import ClipSet, GeneratedSet, Protocol, Window
from mostgan.model import Generator
from mostgan.prepare import pack, sky
from mostgan.prepare.reading import Settings
from mostgan.run import Resume
from mostgan.video import VideoWriter

ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(
    resolution=32,
    channel_base=256,
    channel_max=16,
    z_dim=16,
    w_dim=16,
    motion_noise_dim=16,
    motion_code_dim=16,
    num_frequencies=8,
    motion_vector_dim=8,
    motion_styles=4,
    motion_resolutions=(16, 32),
    motion_distance=16,
)
CPU = torch.device("cpu")
SMALL = Protocol(clips=6, frames=16, long_clips=0, batch=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test sees another's cache, or the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Procedural clips at 32²: nine of 20 frames, two of 130, one of 140."""
    folder = tmp_path_factory.mktemp("data") / "sky.clips"
    lengths = [20] * 9 + [130, 130, 140]
    pack(
        [sky.SkyClip(i, n) for i, n in enumerate(lengths)],
        folder,
        Settings(32, "raw"),
        about={"builtin": True},
    )
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    return save(folder, MODEL)


def save(folder, config):
    """A run folder with a checkpoint of an untrained generator, as far as sampling needs one."""
    path = folder / "checkpoint-000007"
    path.mkdir()
    save_file(
        {name: value.contiguous() for name, value in Generator(config).state_dict().items()},
        path / "model.safetensors",
    )
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder


class ToyVideo(torch.nn.Module):
    """Called as I3D is: mean colour, the number of frames, mean square difference of neighbours."""

    def forward(
        self, x, rescale: bool = False, resize: bool = False, return_features: bool = False
    ):
        assert (
            rescale
            and resize
            and return_features
            and x.dtype == torch.uint8
            and x.ndim == 5
            and x.size(1) == 3
        )
        x = x.float()
        frames = torch.full((x.size(0), 1), float(x.size(2)))
        change = (x[:, :, 1:] - x[:, :, :-1]).square().mean(dim=[1, 2, 3, 4]).unsqueeze(1)
        return torch.cat([x.mean(dim=[2, 3, 4]), frames, change], dim=1)


class ToyFrame(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        assert return_features and x.dtype == torch.uint8 and x.ndim == 4 and x.size(1) == 3
        return x.float().mean(dim=[2, 3])


class Broken(torch.nn.Module):
    """Gives numbers that are none."""

    def forward(
        self, x, rescale: bool = False, resize: bool = False, return_features: bool = False
    ):
        return torch.full((x.size(0), 4), float("nan"))


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    for name, module in (("video", ToyVideo()), ("frame", ToyFrame()), ("broken", Broken())):
        torch.jit.script(module).save(folder / f"{name}.pt")
    (folder / "text.pt").write_text("no TorchScript\n")
    return folder


# --------------------------------------------------------------------------------- Fréchet distance


def gaussian(x):
    return torch.from_numpy(x.mean(0)), torch.from_numpy(np.cov(x.T, bias=True))


def test_closed_forms():
    """One dimension: (μ₁−μ₂)² + (σ₁−σ₂)². Diagonal covariances: the same, summed; whatever the
    basis.
    """
    rng = np.random.default_rng(0)
    one = [torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[4.0]], [3.5], [[0.25]])]
    assert frechet_distance(*one) == pytest.approx(2.5**2 + 1.5**2, rel=1e-12)
    a, b, shift = rng.uniform(0, 3, (3, 20))
    a[:5] = 0  # no variance in some directions
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    turn = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    for q in (np.eye(20), turn):
        pair = [torch.from_numpy(q @ np.diag(v) @ q.T) for v in (a, b)]
        found = frechet_distance(
            torch.zeros(20, dtype=torch.float64), pair[0], torch.from_numpy(q @ shift), pair[1]
        )
        assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "features, n_1, n_2", [(8, 50, 60), (64, 300, 200), (32, 10, 100), (64, 20, 30), (48, 5, 5)]
)
def test_scipys_matrix_square_root(features, n_1, n_2):
    """Against scipy's sqrtm, to 1e-8, for covariances of full and of lower rank.

    Where Σ₁Σ₂ is singular, sqrtm itself is good to some 1e-8 (the root of a zero eigenvalue's
    rounding error), so it is taken in coordinates of the range of Σ₁, where the same product is
    regular.
    """
    rng = np.random.default_rng(features)
    x, y = (
        rng.normal(size=(n_1, features)),
        rng.normal(size=(n_2, features)) @ rng.normal(size=(features, features)),
    )
    (mean_1, cov_1), (mean_2, cov_2) = gaussian(x), gaussian(y)
    values, vectors = np.linalg.eigh(cov_1.numpy())
    basis = vectors[:, values > 1e-10] * np.sqrt(values[values > 1e-10])
    root = scipy.linalg.sqrtm(basis.T @ cov_2.numpy() @ basis)
    rest = float((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace())
    found = frechet_distance(mean_1, cov_1, mean_2, cov_2)
    assert found == pytest.approx(rest - 2 * np.trace(root).real, rel=1e-8)
    assert found == pytest.approx(
        rest - 2 * np.trace(scipy.linalg.sqrtm(cov_1.numpy() @ cov_2.numpy())).real, rel=1e-6
    )
    # Its singular values are those of Σ₁^½ Σ₂^½.
    centered = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt(n_1 * n_2)
    assert found == pytest.approx(rest - 2 * np.linalg.norm(centered, "nuc"), rel=1e-10)


def test_streamed_statistics_are_those_of_all_at_once():
    features = torch.randn(1000, 12, generator=torch.Generator().manual_seed(0)) * 5 + 100
    whole, parts = {}, {}
    add_features(whole, "x", features)
    for part in features.split(7):
        add_features(parts, "x", part)
    for sums in (whole, parts):
        mean, covariance = mean_and_covariance(sums, "x")
        assert mean.dtype == covariance.dtype == torch.float64
        np.testing.assert_allclose(mean, features.double().mean(0), rtol=1e-13)
        np.testing.assert_allclose(
            covariance, np.cov(features.double().T, bias=True), rtol=1e-9, atol=1e-9
        )


def test_statistics_of_a_mean_much_larger_than_the_spread():
    """Mean 1000, standard deviation 1e-3: by batches and by processes as in two passes over all."""
    mix = (
        torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        / 12**0.5
    )
    normal = torch.randn(2001, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = 1000 + 1e-3 * normal @ mix
    expected, batches, shares = np.cov(features.T, bias=True), features.split(8), [{}, {}, {}]
    whole, merged = {}, {}
    for k, batch in enumerate(batches):
        add_features(whole, "x", batch)
        add_features(shares[k % 3], "x", batch)
    for share in shares:
        frechet.merge(merged, share)
    for sums in (whole, merged):
        mean, covariance = mean_and_covariance(sums, "x")
        assert sums["x.count"] == 2001
        np.testing.assert_allclose(mean, features.mean(0), rtol=1e-14)
        assert np.abs(covariance.numpy() - expected).max() < 1e-8 * np.abs(expected).max()
        assert torch.equal(covariance, covariance.T)


def test_what_was_collected_merges_with_what_was_not():
    """Processes without a batch, sums that are no features, a name that one of them alone has."""
    one, other = {}, {"clips": torch.tensor(2.0, dtype=torch.float64)}
    add_features(one, "x", torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    merged = {}
    for part in ({}, one, {}, other, other):
        frechet.merge(merged, part)
    assert merged["clips"] == 4 and merged["x.mean"].tolist() == [2, 4] and merged["x.count"] == 2
    assert (
        merged["x.scatter"].tolist() == [[2, 4], [4, 8]]
        and set(other) == {"clips"}
        and other["clips"] == 2
    )


@pytest.mark.parametrize("count", [500, 10])  # more and fewer than features
def test_equal_sets_and_a_shift(count):
    features = torch.randn(count, 30, generator=torch.Generator().manual_seed(1)).double()
    sums, shifted, shift = {}, {}, torch.linspace(-1, 2, 30, dtype=torch.float64)
    add_features(sums, "x", features)
    add_features(shifted, "x", features + shift)
    assert 0 <= frechet.distance(sums, sums, "x") < 1e-11
    assert frechet.distance(sums, shifted, "x") == pytest.approx(
        float(shift.square().sum()), rel=1e-10
    )


# ------------------------------------------------------------------------------------- the two sets


def test_windows_are_one_of_each_clip_that_is_long_enough(packed):
    clips = Clips(packed)
    for frames, usable in ((16, 12), (20, 12), (128, 3), (141, 0)):
        windows = ClipSet(clips, Protocol(), 0).windows(Window(frames))
        assert len({clip for clip, _ in windows}) == len(windows) == usable
        assert all(0 <= first <= clips.lengths[clip] - frames for clip, first in windows)
    at_16 = [ClipSet(clips, Protocol(), seed).windows(Window(16)) for seed in (0, 0, 1)]
    assert at_16[0] == at_16[1] != at_16[2]
    first_clips = [ClipSet(clips, Protocol(), seed).windows(Window(16))[0] for seed in range(60)]
    assert {first for _, first in first_clips} == set(range(5))  # of 20 frames
    assert all(
        first == 0
        for _, first in ClipSet(clips, Protocol(), 0, from_start=True).windows(Window(16))
    )
    few = [
        {clip for clip, _ in ClipSet(clips, SMALL, seed).windows(Window(16))} for seed in range(3)
    ]
    # At most so many, at random.
    assert all(len(part) == 6 for part in few) and len(set(map(frozenset, few))) > 1


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_a_set(packed, world):
    """Together, the batches of all processes are those of one, each whole."""
    torch.manual_seed(0)
    for a_set in (
        ClipSet(Clips(packed), SMALL, 3),
        GeneratedSet(Generator(MODEL).eval(), SMALL, 3),
    ):
        whole = list(a_set.batches(Window(16), 0, 1))
        parts = [list(a_set.batches(Window(16), rank, world)) for rank in range(world)]
        assert [len(batch) for batch in whole] == [4, 2]
        for k, batch in enumerate(whole):
            assert torch.equal(parts[k % world][k // world], batch)


def test_generated_clips_have_their_own_seeds_and_start_at_0():
    torch.manual_seed(0)
    generator = Generator(MODEL).eval()
    clips = torch.cat(list(GeneratedSet(generator, SMALL, 3).batches(Window(16), 0, 1)))
    for i in (0, 5):
        # one clip alone is the same but for float32 rounding in another batch
        alone = torch.cat(list(mostgan.render(generator, (3 << 32) + i, 0, 16)), dim=1)[0]
        assert (alone.int() - clips[i].int()).abs().max() <= 1
    assert not torch.equal(clips[0], clips[5])


def test_bf16_is_for_rendering_alone():
    torch.manual_seed(0)
    generator, pair = Generator(MODEL).eval(), []
    for precision in ("float32", "bf16"):
        made = GeneratedSet(
            generator, dataclasses.replace(SMALL, precision=precision, long_clips=1), 0
        )
        clips = []
        for batch in made.batches(Window(16), 0, 1):
            assert not torch.is_autocast_enabled("cpu")
            clips.append(batch.int())
        for _, window in zip(range(2), next(made.long_videos())()):
            assert not torch.is_autocast_enabled("cpu") and window.shape == (16, 3, 32, 32)
        pair.append(torch.cat(clips))
    assert 0 < (pair[0] - pair[1]).abs().float().mean() < 4


def test_labels_are_drawn_from_the_data():
    torch.manual_seed(0)
    generator = Generator(dataclasses.replace(MODEL, num_labels=3)).eval()
    one = torch.cat(
        list(
            GeneratedSet(generator, SMALL, 0, np.eye(3, dtype=np.float32)[[2]]).batches(
                Window(16), 0, 1
            )
        )
    )
    alone = torch.cat(list(mostgan.render(generator, 0, 0, 16, clips=4, label=2)), dim=1)
    assert (alone.int() - one[:4].int()).abs().max() <= 1


def test_which_frames_a_detector_sees():
    seen = []

    def remember(x):
        seen.append(x)
        return torch.zeros(len(x), 1)

    one = frechet.Detector("one", "", False, remember)
    batch = torch.arange(128, dtype=torch.uint8)[None, :, None, None, None].expand(1, -1, 3, 2, 2)
    for frames in (128, 16, 40):  # there is no metric of clips of 40 frames
        window = Window(frames)
        sets.add_batch(
            {}, batch[:, :frames], window, Protocol().video_metrics, sets.Detectors(one, one, CPU)
        )
    videos, frames = (
        [x[0, 0, :, 0, 0].tolist() for x in seen if x.ndim == 5],
        [x for x in seen if x.ndim == 4],
    )
    assert videos == [list(range(128)), list(range(0, 128, 8)), list(range(16))]
    assert [x[:, 0, 0, 0].tolist() for x in frames] == [list(range(16))]


# --------------------------------------------------------------------------------------- end to end


def test_a_toy_detector_end_to_end(packed, run_folder, detectors, tmp_path, capsys):
    """Every metric's value against one computed here from the clips; and all that the JSON file
    must say.
    """
    program.run(
        run_folder,
        data=packed,
        detector=detectors / "video.pt",
        frame_detector=detectors / "frame.pt",
        protocol=Protocol("ours", clips=5, long_clips=0, batch=4),
        seed=2,
        runs=2,
    )
    (file,) = run_folder.glob("metrics-*.json")
    said = json.loads(file.read_text())
    file.unlink()

    toy, clips, generator = ToyVideo(), Clips(packed), checkpoint.load(run_folder)
    for run, seed in enumerate((2, 3)):
        made = [
            torch.cat(list(mostgan.render(generator, (seed << 32) + i, 0, 128, n)), dim=1)
            for i, n in ((0, 4), (4, 1))
        ]
        made = torch.cat(made)
        for name, length, stride in (
            ("fvd16", 16, 1),
            ("fvd128", 128, 1),
            ("fvd128_every8", 128, 8),
            ("fid", 16, 1),
        ):
            windows = ClipSet(clips, Protocol(clips=5), seed).windows(Window(length))
            real = np.stack(
                [clips.frames(clip, np.arange(first, first + length)) for clip, first in windows]
            )
            pair = []
            for videos in (torch.from_numpy(real), made[:, :length]):
                if name == "fid":
                    rows = ToyFrame()(videos.flatten(0, 1), return_features=True)
                else:
                    rows = toy(
                        videos.transpose(1, 2)[:, :, ::stride],
                        rescale=True,
                        resize=True,
                        return_features=True,
                    )
                pair += gaussian(rows.double().numpy())
            assert said["results"][name]["runs"][run] == pytest.approx(
                frechet_distance(*pair), rel=1e-6
            )

    values = said["results"]["fvd16"]["runs"]
    assert said["results"]["fvd16"]["mean"] == pytest.approx(np.mean(values))
    assert (
        said["results"]["fvd16"]["std"]
        == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))
        != 0
    )
    protocol = said["protocol"]
    sha256 = hashlib.sha256((detectors / "video.pt").read_bytes()).hexdigest()
    assert protocol["video_detector"] == {"name": "video.pt", "sha256": sha256, "proxy": False}
    assert protocol["real"]["checksum"] == clips.fingerprint and protocol["real"]["total"] == 12
    assert (protocol["seed"], protocol["runs"], protocol["precision"]) == (2, 2, "float32")
    assert said["samples"]["fvd128"] == [3, 5] and said["samples"]["fid"] == [80, 80]
    assert not any("proxy" in key for key in said["results"])
    printed = capsys.readouterr().out
    assert (
        f"{packed}, 12 clips of 32², 25 frames/s, crop center, no split; of each, n frames at "
        "random" in printed
    )
    assert f"video.pt, sha256 {sha256[:12]}" in printed and "seeds     2 to 3" in printed
    assert "FVD128, every 8th frame" in printed and "proxy" not in printed
    assert (
        "3 real clips of 128 frames, not 5" in printed
        and "FVD16: 5 real and 5 generated samples for 5" in printed
    )
    assert "motion is measured in clips of 20 frames" in printed  # the median clip has no more


def test_without_a_detector_everything_says_proxy(packed, run_folder, tmp_path, capsys):
    program.run(run_folder, data=packed, protocol=SMALL, out=tmp_path / "scores.json")
    said = json.loads((tmp_path / "scores.json").read_text())
    assert {"proxy_fvd16", "proxy_fid"} <= set(said["results"])
    assert not {"fvd16", "fid", "fvd128"} & (set(said["results"]) | set(said["not_measured"]))
    assert said["protocol"]["video_detector"]["proxy"] and "proxy_fvd128" in said["not_measured"]
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith(("FVD", "FID"))]


def test_the_proxy_is_the_same_everywhere_and_sees_motion():
    proxy = frechet.proxy(CPU)
    assert proxy.sha256 == "43f03fc701cbbf64fc40c3dbd8a1a278aaab1a2e2b1a9adbeded4f8fe44253ee"
    rng = torch.Generator().manual_seed(0)
    clip = torch.randint(256, (1, 3, 16, 16, 16), dtype=torch.uint8, generator=rng)
    static = clip[:, :, :1].expand(-1, -1, 16, -1, -1)
    assert torch.equal(proxy.features(clip), proxy.features(clip))
    assert (proxy.features(clip) - proxy.features(static)).norm() > 1
    assert (
        proxy.features(clip).shape
        == (1, 64)
        == frechet.frame_detector(None, CPU).features(clip[:, :, 0]).shape
    )


def test_two_folders_of_clips(packed, tmp_path, capsys, monkeypatch):
    """Equal sets score 0 in everything; videos are packed at the packed side's resolution."""
    monkeypatch.chdir(tmp_path)
    program.run(packed, packed, random_windows=True, protocol=Protocol(frames=16))
    results = json.loads(next(tmp_path.glob("metrics-sky-sky-*.json")).read_text())["results"]
    for name in ("proxy_fvd16", "proxy_fid", "spectrum_distance_db"):
        assert results[name]["mean"] < 1e-9
    # Of the second.
    program.run(packed, packed, protocol=Protocol(frames=16), out=tmp_path / "starts.json")
    assert (
        json.loads((tmp_path / "starts.json").read_text())["results"]["proxy_fvd16"]["mean"] > 1e-3
    )
    for i in range(3):
        with VideoWriter(tmp_path / "videos" / f"{i}.mp4", 30) as video:
            video.write(sky.make_clip(i, 48, 17))
    program.run(packed, tmp_path / "videos", protocol=SMALL, out=tmp_path / "other.json")
    told = json.loads((tmp_path / "other.json").read_text())["protocol"]["generated"]
    assert (told["resolution"], told["total"], told["window"]) == (32, 3, "its first n frames")
    printed = capsys.readouterr().out
    assert told["crop"] == "center" and f"generated {tmp_path}" in printed
    assert "the real clips have 25 frames/s, the others 30" in printed


def test_runs_of_which_some_lack_a_value():
    """A period is found only where a video repeats: the first run does not decide what is told."""
    skipped = {"fvd128": "too short", "fid": "why"}
    first = program.Scores({"recurrence": 0.5}, skipped, ["a", "b"], {"fvd16": [3, 4]}, {})
    second = program.Scores(
        {"recurrence": 0.7, "period": 40.0}, {"fvd128": "other"}, ["b", "c"], {"fid": [5, 6]}, {}
    )
    third = program.Scores({"recurrence": 0.6, "period": 44.0, "fid": 2.0}, {}, ["a"], {}, {})
    results = program.summarize([first, second, third])
    assert list(results) == ["recurrence", "period", "fid"]
    assert results["period"] == {"mean": 42.0, "std": pytest.approx(8**0.5), "runs": [40.0, 44.0]}
    assert (
        results["fid"] == {"mean": 2.0, "std": None, "runs": [2.0]}
        and len(results["recurrence"]["runs"]) == 3
    )
    merged = program.merge([first, second, third], results)
    assert merged.skipped == {"fvd128": "too short"} and merged.samples == {
        "fvd16": [3, 4],
        "fid": [5, 6],
    }
    assert merged.notes[:3] == ["a", "b", "c"] and len(merged.notes) == 5
    told = program.table(results, merged)
    assert (
        "note: median period (frames): of 2 of 3 runs" in told and "frames: of 1 of 3 runs" in told
    )


def test_a_missing_second_set_is_told_before_the_first_is_packed(tmp_path, monkeypatch):
    (tmp_path / "videos").mkdir()
    monkeypatch.setattr(program, "open_data", lambda *a: pytest.fail("packed"))
    with pytest.raises(UserError, match="nowhere does not exist"):
        program.run(tmp_path / "videos", tmp_path / "nowhere", protocol=SMALL)


def test_evaluate_leaves_random_state_alone(packed):
    torch.manual_seed(5)
    generator, before = Generator(MODEL).eval().requires_grad_(False), torch.get_rng_state()
    detectors = sets.open_detectors(None, None, CPU)
    scores = [metrics.evaluate(generator, Clips(packed), detectors, most=4) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert scores[0] == scores[1] and all(isinstance(value, float) for value in scores[0].values())
    assert {"proxy_fvd16", "proxy_fid", "spectrum_distance_db", "static_rate"} <= set(scores[0])
    assert list(scores[0])[0] == "proxy_fvd16"


# ------------------------------------------------------------------------------ cache and processes


def test_real_statistics_are_kept(packed, run_folder, tmp_path, cache, monkeypatch):
    def scores(**changes):
        program.run(
            run_folder, data=packed, out=tmp_path / "s.json", **{"protocol": SMALL} | changes
        )
        return json.loads((tmp_path / "s.json").read_text())["results"]

    first, files = scores(), sorted(cache.rglob("*"))
    made = [file for file in files if file.is_file()]
    assert made and all(file.suffix == ".safetensors" for file in made)
    with monkeypatch.context() as patch:
        patch.setattr(Clips, "frames", lambda *a: pytest.fail("frames were read again"))
        assert scores() == first
        assert sorted(cache.rglob("*")) == files
    for file in made:
        file.write_bytes(file.read_bytes()[:-10])
    assert scores() == first  # damaged: measured again
    scores(seed=1)
    # Other windows: kept apart.
    assert len([file for file in cache.rglob("*") if file.is_file()]) > len(made)


def test_the_cache_tells_apart_what_changes_the_numbers(packed):
    none = sets.open_detectors(None, None, CPU)

    def file(n=16, **changes):
        window = n if n == "long" else Window(n)
        return sets.cache_file(
            ClipSet(Clips(packed), dataclasses.replace(SMALL, **changes), 0), window, none
        )

    # Another batch changes the last digits.
    assert len({file(), file(batch=3), file(clips=7), file(20), file(protocol="release")}) == 5
    # Of generated clips; of long ones.
    assert file(precision="bf16") == file(long_clips=3) == file()
    assert file("long", batch=3) == file("long") != file("long", long_clips=3)


def test_two_processes_give_the_numbers_of_one(
    packed, run_folder, detectors, tmp_path, monkeypatch
):
    """By torchrun, with gloo: sums in another order, nothing else."""
    arguments = [
        run_folder,
        "--data",
        packed,
        "--detector",
        detectors / "video.pt",
        "--clips",
        5,
        "--batch",
        2,
        "--frames",
        16,
        "--long-clips",
        1,
    ]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*launch, "-m", "mostgan.metrics", *arguments, "--out", tmp_path / "two.json"]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the whole protocol") == 1

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(
        sys, "argv", list(map(str, ["metrics", *arguments, "--out", tmp_path / "one.json"]))
    )
    program.main()
    torch.set_num_threads(threads)

    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["protocol"]["processes"], two["protocol"]["processes"]) == (1, 2)
    assert (
        set(one["results"])
        == set(two["results"])
        >= {"fvd16", "proxy_fid", "recurrence", "real_recurrence"}
    )
    for name, value in one["results"].items():
        assert two["results"][name]["mean"] == pytest.approx(value["mean"], rel=1e-10, abs=1e-12), (
            name
        )


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["RUN", "--data", "DATA", "--detector", "nowhere.pt"], "nowhere.pt is not there"),
        (["RUN", "--data", "DATA", "--detector", "DETECTORS/text.pt"], "is no TorchScript file"),
        (
            ["RUN", "--data", "DATA", "--detector", "DETECTORS/frame.pt"],
            "cannot be called as detector",
        ),
        (["RUN", "--data", "DATA", "--detector", "DETECTORS/broken.pt"], "not finite"),
        (["RUN"], "say which real clips with --data"),
        (["RUN", "--data", "nowhere"], "nowhere does not exist"),
        (["nowhere", "--data", "DATA"], "nowhere is neither a checkpoint"),
        (["DATA", "nowhere"], "nowhere does not exist"),
        (["DATA", "DATA", "--data", "DATA"], "not all of them"),
        (["DATA", "DATA", "--clips", "1"], "at least 2"),
        (["DATA", "DATA", "--runs", "0"], "at least 1"),
        (["DATA", "DATA", "--resolution", "64"], "32 pixels"),
        (
            ["DATA", "DATA", "--frames", "16", "--out", "nowhere/x.json"],
            "cannot write nowhere/x.json",
        ),
    ],
)
def test_bad_input_gets_one_line(
    arguments, complaint, packed, run_folder, detectors, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run_folder, "DATA": packed, "DETECTORS": detectors}
    for name, place in places.items():
        arguments = [a.replace(name, str(place)) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["metrics", *arguments])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and complaint in error
        and error.count("\n") == 1
        and "Traceback" not in error
    )
    assert not list(run_folder.glob("metrics-*"))


def test_a_conditional_model_needs_labels(packed, tmp_path):
    save(tmp_path, dataclasses.replace(MODEL, num_labels=2))
    with pytest.raises(
        UserError, match="takes 2 numbers as a condition, or as many classes, but .* has no labels"
    ):
        program.run(tmp_path, data=packed, protocol=SMALL)


# ----------------------------------------------------------------------------------------- training


def training_config(packed, **changes):
    """Steps of 12 frames, evaluated every 24."""
    values = dict(
        data=str(packed),
        batch_clips=4,
        batch_split=1,
        precision="float32",
        compile=False,
        workers=0,
        augment="none",
        total_kframes=0.048,
        log_kframes=0.012,
        snapshot_kframes=100,
        eval_every=0.024,
        eval_clips=4,
    )
    model = dataclasses.replace(MODEL, discriminator_hidden_dim=16)
    return dataclasses.replace(TrainConfig(model), **values | changes)


def lines_of(run):
    measured = ("seconds", "frames_per_second", "peak_memory_mb")
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def test_training_logs_scores_and_resumes_exactly(packed, tmp_path):
    training.train(training_config(packed), tmp_path / "whole")
    training.train(training_config(packed, eval_every=0), tmp_path / "never")
    training.train(training_config(packed, total_kframes=0.024), tmp_path / "parts")
    training.train(
        training_config(packed),
        None,
        Resume(tmp_path / "parts", checkpoint.find(tmp_path / "parts")),
    )
    lines = lines_of(tmp_path / "whole")
    assert ["proxy_fvd16" in line for line in lines] == [False, True, False, True]
    assert lines == lines_of(tmp_path / "parts")
    states = [
        checkpoint.find(tmp_path / run) / "model.safetensors" for run in ("whole", "parts", "never")
    ]
    assert len({state.read_bytes() for state in states}) == 1  # to evaluate changes nothing


def test_training_keeps_the_best(packed, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(metrics, "evaluate", lambda *a: {"fvd16": next(scores), "static_rate": 0.0})
    training.train(training_config(packed, total_kframes=0.096), tmp_path / "run")
    steps = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert steps == ["checkpoint-000004", "checkpoint-000006", "checkpoint-000008"]
    assert checkpoint.best_checkpoint(tmp_path / "run").name == "checkpoint-000004"


def test_a_wrong_detector_stops_training_before_it_starts(packed, detectors, tmp_path):
    for name, complaint in (
        ("nowhere.pt", "is not there"),
        ("frame.pt", "cannot be called as detector"),
    ):
        with pytest.raises(UserError, match=complaint):
            training.train(
                training_config(packed, eval_detector=str(detectors / name)), tmp_path / "run"
            )
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- the release's protocol


class Numbered:
    """Clips whose frames all have their number as gray value, named so that their order by name is
    another.
    """

    resolution, fps, builtin = 4, 25.0, False
    path, labels, num_labels = Path("numbered"), None, 0

    def __init__(self, lengths, names=None):
        self.lengths = np.array(lengths)
        self.names = names or [f"clip {i}" for i in range(len(lengths))]
        self.info = {
            "clips": [
                dict(name=name, start=0, frames=int(n), label=None, crc32=0)
                for name, n in zip(self.names, lengths)
            ]
        }

    def __len__(self):
        return len(self.lengths)

    def frames(self, clip, indices):
        assert max(indices) < self.lengths[clip]
        gray = np.asarray(indices, np.uint8)[:, None, None, None]
        return np.broadcast_to(gray, (len(indices), 3, 4, 4)).copy()


def frames_seen(clips, protocol, seed):
    """What the video detector is given of each window: window → frame numbers of each clip."""
    seen = []

    def remember(x):
        seen.extend(x[:, 0, :, 0, 0].tolist())
        return x[:, 0, :2, 0, 0].float()

    one = frechet.Detector("one", "one", False, remember)
    detectors, found = (
        sets.Detectors(one, one._replace(features=lambda x: x[:, :, 0, 0].float()), CPU),
        {},
    )
    for window in protocol.video_metrics:
        seen.clear()
        sets.measure(
            ClipSet(clips, protocol, seed), [window], detectors, sets.progress("", 1, False)
        )
        found[window] = [list(map(int, numbers)) for numbers in seen]
    return found


def test_every_8th_frame_by_both_protocols():
    """Of a clip of 130 frames the release's windows of 16 frames 8 apart begin at 0 … 130 − 1 − 8 ·
    15 = 9, and one of 121 frames has one; ours are every 8th frame of 128, which begin at 0 … 2,
    and a clip of 127 has none.
    """
    clips = Numbered([130, 121, 127, 120])
    firsts = {"ours": set(), "release": set()}
    for seed in range(150):
        ours = frames_seen(clips, Protocol("ours", long_clips=0), seed)
        (whole, every8) = ours[Window(128)]
        assert every8 == whole[::8] and len(every8) == 16
        firsts["ours"].add(every8[0])
        release = frames_seen(clips, Protocol("release", long_clips=0), seed)
        assert len(release[Window(128)]) == 1  # FVD128 alone, of the one clip that has as many
        of_130, of_121, of_127 = release[Window(16, 8)]
        assert all(b - a == 8 for a, b in zip(of_130, of_130[1:])) and len(of_130) == 16
        assert of_121 == list(range(0, 121, 8)) and 0 <= of_127[0] <= 6
        firsts["release"].add(of_130[0])
        assert release[Window(16)] == ours[Window(16)]
    assert firsts == {"ours": {0, 1, 2}, "release": set(range(10))}


def test_the_first_clips_by_name():
    clips = Numbered([20] * 6, ["f", "b", "d", "a", "e", "c"])
    few = Protocol("release", clips=3, frames=16)
    for seed in range(5):
        taken = [clip for clip, _ in ClipSet(clips, few, seed).windows(Window(16))]
        assert [clips.names[clip] for clip in taken] == ["a", "b", "c"]
    few = dataclasses.replace(few, protocol="ours")
    drawn = [ClipSet(clips, few, seed).windows(Window(16)) for seed in range(20)]
    assert len({tuple(clip for clip, _ in windows) for windows in drawn}) > 5


def test_which_protocol_is_taken_and_recorded(packed, detectors, tmp_path):
    """The release's for FVD with a detector, unless another is asked for; ours without one."""
    for name, asked, detector, expected in (
        ("a", [], [], "ours"),
        ("b", [], ["--detector", detectors / "video.pt"], "release"),
        ("c", ["--protocol", "ours"], ["--detector", detectors / "video.pt"], "ours"),
        ("d", ["--protocol", "release"], [], "release"),
    ):
        out = tmp_path / f"{name}.json"
        arguments = [
            packed,
            packed,
            "--random-windows",
            "--long-clips",
            0,
            "--out",
            out,
            *asked,
            *detector,
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(map(str, ["metrics", *arguments])))
            program.main()
        said = json.loads(out.read_text())
        key = "fvd128_every8" if detector else "proxy_fvd128_every8"
        assert said["protocol"]["protocol"] == expected and said["results"][key]["mean"] < 1e-6
        window = said["protocol"]["windows"]["fvd128_every8"]
        told = (16, 8, 1) if expected == "release" else (128, 1, 8)
        assert (window["frames"], window["stride"], window["frame_stride"]) == told


def test_conditions_are_classes_or_vectors():
    """Classes as one-hot vectors, of which a model may know more; vectors as they are, all of
    them.
    """
    clips = Numbered([20, 20, 20])
    assert sets.conditions_of(clips, 0) is None
    vectors = np.array([[0.5, -1], [0, 2], [1, 1]], np.float32)
    for labels, size, expected in (
        (np.array([1, 0, 1]), 2, [[0, 1], [1, 0], [0, 1]]),
        (np.array([1, 0, 1]), 3, [[0, 1, 0], [1, 0, 0], [0, 1, 0]]),
        (vectors, 2, vectors.tolist()),
    ):
        clips.labels, clips.num_labels = labels, 2
        clips.condition = functools.partial(Clips.condition, clips)
        assert sets.conditions_of(clips, size).tolist() == expected
    for size in (1, 3):
        with pytest.raises(UserError, match="has 2 numbers per clip"):
            sets.conditions_of(clips, size)
