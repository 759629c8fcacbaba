"""Training: a step's parts against what they must do, resuming, the command line (spec §8)."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mostgan
import train as training
from mostgan.config import DATASETS, ModelConfig, TrainConfig, UserError, train_preset
from mostgan.data import Clips, batches
from mostgan.loss import generator_loss
from mostgan.prepare import pack_sky
from mostgan.run import Stats, read_config

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
    discriminator_hidden_dim=16,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Four procedural clips of 40 frames at 32²."""
    folder = tmp_path_factory.mktemp("data") / "sky.clips"
    pack_sky(folder, 32, count=4, frames=40)
    return folder


def make_config(packed, **changes):
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
    )
    return dataclasses.replace(TrainConfig(MODEL), **values | changes)


def steps(config, packed, count):
    """The state after `count` steps, without a run folder."""
    clips = Clips(packed)
    state, stats, objective = (
        training.new_state(config, CPU),
        Stats(Path("."), CPU),
        training.objectives(config),
    )
    data = batches(clips, config.batch_clips, config.model.frames_per_clip, config.seed)
    for _ in range(count):
        draw = training.Draws(config, clips, CPU, state)
        real = draw.pieces(next(data))
        fakes = training.generator_step(state, draw, objective.generator, config, stats)
        training.discriminator_step(
            state, real, fakes, draw, objective.discriminator, config, stats
        )
        if state.step % config.r1_interval == 0:
            training.r1_step(state, real, draw, objective.r1, config, stats)
        training.update_ema(state, config)
        state.step += 1
        training.adjust_ada(state, config)
    data.close()
    return state, stats


@pytest.mark.parametrize("shared", [True, False])
def test_each_step_moves_only_its_network(packed, shared):
    config = make_config(packed, shared_fakes=shared)
    clips, stats, objective = Clips(packed), Stats(Path("."), CPU), training.objectives(config)
    state = training.new_state(config, CPU)
    draw = training.Draws(config, clips, CPU, state)
    real = draw.pieces(next(batches(clips, 4, 3, 0)))
    before = [[p.clone() for p in module.parameters()] for module in (state.G, state.D)]

    def moved(module, old):
        return [not torch.equal(p, q) for p, q in zip(module.parameters(), old)]

    fakes = training.generator_step(state, draw, objective.generator, config, stats)
    assert all(moved(state.G, before[0])) and not any(moved(state.D, before[1]))
    before[0] = [p.clone() for p in state.G.parameters()]
    training.discriminator_step(state, real, fakes, draw, objective.discriminator, config, stats)
    assert not any(moved(state.G, before[0])) and all(moved(state.D, before[1]))
    before[1] = [p.clone() for p in state.D.parameters()]
    training.r1_step(state, real, draw, objective.r1, config, stats)
    assert not any(moved(state.G, before[0])) and any(moved(state.D, before[1]))
    assert all(p.grad is None for module in (state.G, state.D) for p in module.parameters())


def test_the_discriminator_learns(packed):
    """Without a generator to catch up, D tells real clips from a frozen generator's within a few
    steps.
    """
    state, stats = steps(make_config(packed, generator_lr=1e-9, discriminator_lr=0.005), packed, 40)
    real, fake = (torch.stack(stats.values[name]) for name in ("D_real", "D_fake"))
    assert (real - fake)[-5:].mean() > 1 > (real - fake)[:2].mean()
    loss = torch.stack(stats.values["loss_D"])
    assert loss[-5:].mean() < 0.7 * loss[0]


def test_batch_split_gives_the_same_gradients(packed):
    """Gradients of the whole batch, in one piece or in two (minibatch groups of 2 that the pieces
    keep together).
    """
    model = dataclasses.replace(MODEL, mbstd_group=1)
    gradients = []
    for split in (1, 2):
        config = make_config(packed, model=model, batch_split=split, diversity_weight=0.0)
        clips, stats = Clips(packed), Stats(Path("."), CPU)
        state = training.new_state(config, CPU)
        draw = training.Draws(config, clips, CPU, state)
        real = draw.pieces(next(batches(clips, 4, 3, 0)))
        for frames, t, label in real:
            loss = generator_loss(state.D(frames, t, label)) / split
            loss.backward(inputs=list(state.D.parameters()))
        gradients.append(
            torch.cat([p.grad.flatten() for p in state.D.parameters() if p.grad is not None])
        )
        training.optimize(state.adam_D, "D", loss.detach(), stats)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_ema_halves_the_distance_in_a_half_life(packed):
    config = make_config(packed, ema_half_life_kclips=0.04)  # 40 clips: 10 steps of 4
    state = training.new_state(config, CPU)
    start = state.ema.synthesis.b4.const.clone()
    with torch.no_grad():
        for p in state.G.parameters():
            p.add_(1)
        state.G.mapping.w_avg.fill_(3)
    for _ in range(10):
        training.update_ema(state, config)
    assert torch.allclose(state.ema.synthesis.b4.const, start + 0.5, atol=1e-5)
    assert torch.equal(state.ema.mapping.w_avg, state.G.mapping.w_avg)  # buffers are copied


def test_adam_has_the_lazy_correction(packed):
    state = training.new_state(make_config(packed), CPU)
    G, D = state.adam_G.param_groups[0], state.adam_D.param_groups[0]
    assert G["lr"] == pytest.approx(0.0025 * 8 / 9) and G["betas"][1] == pytest.approx(
        0.99 ** (8 / 9)
    )
    assert D["lr"] == pytest.approx(0.0025 * 16 / 17) and D["betas"][1] == pytest.approx(
        0.99 ** (16 / 17)
    )


def test_ada_moves_p_by_the_sign(packed):
    config = make_config(packed, augment="bgc")
    state = training.new_state(config, CPU)
    state.step, state.ada_sign = 4, torch.tensor(3.2)  # mean sign 0.8 > 0.6
    training.adjust_ada(state, config)
    assert state.ada_p == pytest.approx(4 * 4 / 100_000) and state.ada_sign == 0.0
    state.step, state.ada_sign = 8, torch.tensor(0.4)
    training.adjust_ada(state, config)
    assert state.ada_p == pytest.approx(0)


def run(*args, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / args[0]), *map(str, args[1:])],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


TINY_MODEL = ["--resolution", 32, "--channel-base", 256, "--channel-max", 16, "--motion-styles", 2]


@pytest.mark.slow
def test_train_resume_and_sample_from_the_command_line(packed, tmp_path):
    """Four steps at once and two plus two give the same parameters; then sample.py reads them."""
    common = ["train.py", "--preset", "tiny", "--data", packed, *TINY_MODEL, "--log-kframes", 0.024]
    for result in (
        run(*common, "--total-kframes", 0.096, "--out", "whole", cwd=tmp_path),
        run(*common, "--total-kframes", 0.048, "--out", "halves", cwd=tmp_path),
        run("train.py", "--resume", "halves", "--total-kframes", 0.096, cwd=tmp_path),
    ):
        assert result.returncode == 0, result.stderr
    whole, halves = (mostgan.load(tmp_path / name).state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    lines = [
        json.loads(line) for line in (tmp_path / "halves" / "stats.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {
        "loss_G",
        "loss_D",
        "D_real",
        "D_fake",
        "ada_p",
        "frames_per_second",
        "peak_memory_mb",
        "skipped_steps",
    } <= set(lines[0]) and "r1" in lines[0]
    assert read_config(tmp_path / "whole").model.motion_styles == 2
    for pattern in (
        "real.png",
        "real.mp4",
        "samples-*.mp4",
        "samples-*.png",
        "shared-motion-*.mp4",
    ):
        assert list((tmp_path / "whole").glob(pattern)), pattern

    result = run(
        "sample.py",
        "--checkpoint",
        "whole",
        "--frames",
        5,
        "--grid",
        "1x3",
        "--out",
        "frames",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "ms/frame" in result.stdout and len(list((tmp_path / "frames").glob("*.png"))) == 5


@pytest.mark.parametrize(
    "args, words",
    [
        (["train.py", "--dataset", "mars"], "mars"),
        (["train.py", "--dataset", "ffs", "--preset", "tiny"], "data/ffs"),
        (["train.py", "--preset", "huge"], "paper256 or tiny"),
        (["train.py", "--preset", "tiny", "--data", "nowhere"], "nowhere"),
        (["train.py", "--preset", "tiny", "--resolution", "100"], "power of two"),
        (["train.py", "--preset", "tiny", "--batch-clips", "6"], "mbstd_group"),
        (["train.py", "--preset", "tiny", "--rank", "0"], "rank"),
        (["train.py", "--preset", "tiny", "--motion-styles", "-1"], "motion_styles"),
        (["train.py", "--preset", "tiny", "--augment", "all"], "augment"),
        (["train.py", "--resume", "nowhere"], "nowhere"),
        (["sample.py"], "python train.py"),
        (["sample.py", "--checkpoint", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(args, words, tmp_path):
    result = run(*args, cwd=tmp_path)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_presets():
    for dataset, chosen in DATASETS.items():
        paper, tiny = train_preset("paper256", dataset), train_preset("tiny", dataset)
        assert paper.model.motion_distance == tiny.model.motion_distance == chosen.motion_distance
        assert (paper.augment, tiny.augment) == (chosen.augment, "none")
    assert paper.model == dataclasses.replace(
        ModelConfig(), motion_distance=DATASETS["horse"].motion_distance
    )
    assert (paper.batch_clips, paper.r1_gamma, paper.generator_lr, paper.shared_fakes) == (
        64,
        10,
        0.0025,
        False,
    )
    assert (
        tiny.model.channels(64) == 16
        and tiny.model.channels(16) == 64
        and tiny.frames_per_step == 24
    )
    with pytest.raises(UserError):
        train_preset("tiny", "mars")


@pytest.mark.parametrize("sampling", ["spans", "uniform"])
def test_generated_times_fit_the_noise(packed, sampling):
    """Whatever the times drawn, the noise covers their anchors."""
    config = make_config(
        packed, model=dataclasses.replace(MODEL, motion_distance=16), sampling=sampling
    )
    clips = Clips(packed)
    state = training.new_state(config, CPU)
    for step in range(20):
        state.step = step
        draw = training.Draws(config, clips, CPU, state)
        latents = draw.latents()
        assert (
            state.G(*latents).shape == (12, 3, 32, 32)
            and (np.diff(latents.t.numpy(), axis=1) > 0).all()
        )
