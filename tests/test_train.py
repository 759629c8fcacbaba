"""train.py: what a step does, with the networks spied on, and training every configuration."""

import dataclasses
import itertools
import multiprocessing
import os
import threading

import numpy as np
import pytest
import torch
from conftest import CPU, MODEL, make_config, options_of, run_program, stats_of

import mostgan
import train as training
from mostgan import pieces, progress
from mostgan.config import DATASETS, ModelConfig, UserError, train_preset
from mostgan.data import Clips
from mostgan.draws import latents_of_piece, random_stream
from mostgan.loss import generator_loss
from mostgan.progress import Skips, Stats
from mostgan.run import read_config


def take_steps(config, packed, count, state=None):
    """The state and statistics after `count` steps, without a run folder."""
    clips = Clips(packed)
    state, stats = state or training.new_state(config, CPU), Stats(packed, CPU)
    loop = training.steps(state, config, clips, CPU, stats, Skips())
    for _ in itertools.islice(loop, count):
        pass
    loop.close()
    return state, stats


@pytest.mark.parametrize("shared", [True, False])
def test_each_phase_moves_only_its_network(packed, monkeypatch, shared):
    config = make_config(packed, shared_fakes=shared)
    state = training.new_state(config, CPU)
    moved, optimize = {}, training.optimize

    def watched(adam, phase, *args):
        networks = {"G": state.G, "D": state.D}
        before = {name: [p.clone() for p in of.parameters()] for name, of in networks.items()}
        result = optimize(adam, phase, *args)
        assert all(p.grad is None for of in networks.values() for p in of.parameters())
        moved[phase] = {
            name: [not torch.equal(p, q) for p, q in zip(of.parameters(), before[name])]
            for name, of in networks.items()
        }
        return result

    monkeypatch.setattr(training, "optimize", watched)
    take_steps(config, packed, 1, state)
    assert list(moved) == ["G", "D", "R1"]
    assert all(moved["G"]["G"]) and not any(moved["G"]["D"])
    assert all(moved["D"]["D"]) and not any(moved["D"]["G"])
    assert any(moved["R1"]["D"]) and not any(moved["R1"]["G"])


def test_the_discriminator_learns(packed):
    """Without a generator to catch up, D tells real clips from a frozen generator's within a few
    steps.
    """
    config = make_config(packed, augment="none", generator_lr=1e-9, discriminator_lr=0.005)
    _, stats = take_steps(config, packed, 40)
    real, fake = (torch.stack(stats.values[name]) for name in ("D_real", "D_fake"))
    assert (real - fake)[-10:].mean() > 1 > (real - fake)[:4].mean()
    loss = torch.stack(stats.values["loss_D"])
    assert loss[-10:].mean() < 0.7 * loss[0]


def test_batch_split_gives_the_same_gradients(packed):
    """Gradients of the whole batch, in one piece or in two."""
    gradients = []
    for split in (1, 2):
        # Without groups, for what couples the clips of a batch stays within a piece.
        model = dataclasses.replace(MODEL, mbstd_group=1)
        config = make_config(packed, model=model, batch_split=split)
        state = training.new_state(config, CPU)
        batch = next(training.open_batches(config, Clips(packed), CPU, 0))
        for clips in training.pieces_of(batch, config):
            loss = generator_loss(state.D(*clips)) / split
            loss.backward(inputs=list(state.D.parameters()))
        of = [p.grad.flatten() for p in state.D.parameters() if p.grad is not None]
        gradients.append(torch.cat(of))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("threads, precision", [(2, "float32"), (3, "bf16")])
def test_pieces_side_by_side_have_the_bits_of_one_after_the_other(
    packed, monkeypatch, threads, precision
):
    model = dataclasses.replace(MODEL, mbstd_group=1)
    config = make_config(packed, batch_split=4, model=model, precision=precision)
    began, begin = [], pieces.Helper.begin
    monkeypatch.setattr(
        pieces.Helper, "begin", lambda self, *args: began.append(self) or begin(self, *args)
    )

    def trained(count):
        monkeypatch.setattr(pieces, "usable_threads", lambda: count)
        state, stats = take_steps(config, packed, 4)
        assert len(set(began)) == count - 1 and not multiprocessing.active_children()
        values = [torch.stack(values) for values in stats.values.values()]
        return [*state.G.parameters(), *state.D.parameters(), *state.ema.buffers(), *values]

    assert all(torch.equal(p, q) for p, q in zip(trained(1), trained(threads)))


@pytest.mark.parametrize(
    "precision, has, told",
    [
        ("float32", True, "--precision bf16 is faster"),
        ("float32", False, None),
        ("bf16", True, None),
        ("bf16", False, "better go on with --precision float32"),
    ],
)
def test_a_start_tells_the_quicker_precision(
    packed, tmp_path, quiet, monkeypatch, capsys, precision, has, told
):
    monkeypatch.setattr(progress, "has_bf16", lambda device: has)
    training.train(make_config(packed, precision=precision), tmp_path / "run")
    out = capsys.readouterr().out
    assert told in out if told else "--precision" not in out


class Told:
    """Phases whose gradient is the piece's number, and which tell what they find."""

    def where(self, network, number):
        (network.weight * number).sum().backward()
        found = os.getpid(), torch.get_num_threads(), network.weight.sum().item()
        found += (torch.are_deterministic_algorithms_enabled(),)
        return {"number": torch.tensor(number)}, *found

    def fails(self, network, number):
        raise MemoryError(f"piece {number} is too large")

    def fails_strangely(self, network, number):
        error = RuntimeError("a lock cannot be sent")
        error.lock = threading.Lock()
        raise error


@pytest.fixture
def two_processes(packed, monkeypatch):
    """on_pieces of two processes with two threads each, a piece for each; the network; Stats."""
    monkeypatch.setattr(pieces, "usable_threads", lambda: 4)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    network, stats = torch.nn.Linear(1, 1, bias=False), Stats(packed, CPU)
    with pieces.each_piece(make_config(packed), CPU, Told(), [network], stats) as on_pieces:
        yield on_pieces, network, stats
    assert not multiprocessing.active_children()


def test_pieces_run_in_processes_of_their_own_on_the_same_memory(two_processes):
    on_pieces, network, stats = two_processes
    with torch.no_grad():
        network.weight.fill_(7)  # as Adam changes it
    processes, threads, weights, deterministic = on_pieces("where", [1.0, 2.0])
    assert processes[0] == os.getpid() != processes[1]
    assert threads == (2, 2) and torch.get_num_threads() == 1
    assert weights == (7, 7) and deterministic == (True, True)
    assert network.weight.grad.item() == 3
    assert stats.values["number"] == [1, 2]
    network.zero_grad()
    on_pieces("where", [1.0, 5.0])
    assert network.weight.grad.item() == 6


def test_an_error_in_a_process_of_a_piece_is_that_error(two_processes, monkeypatch):
    monkeypatch.setattr(Told, "fails", lambda self, network, number: ({},))  # here, but not there
    with pytest.raises(MemoryError, match="piece 2 is too large") as raised:
        two_processes[0]("fails", [1, 2])
    assert "test_train.py" in str(raised.value.__cause__)  # where it was
    monkeypatch.setattr(Told, "fails_strangely", Told.fails)
    with pytest.raises(RuntimeError, match="a lock cannot be sent"):
        two_processes[0]("fails_strangely", [1, 2])


def test_a_process_of_a_piece_that_dies_is_one_clear_error(two_processes):
    (process,) = multiprocessing.active_children()
    process.kill()
    process.join()
    with pytest.raises(UserError, match="a process that takes a part of each batch died.*--resume"):
        two_processes[0]("where", [1.0, 2.0])


def test_with_little_shared_memory_pieces_follow_each_other(packed, monkeypatch, capsys):
    def full(network):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(pieces, "usable_threads", lambda: 2)
    monkeypatch.setattr(torch.nn.Module, "share_memory", full)
    take_steps(make_config(packed), packed, 1)
    assert "cannot share memory here" in capsys.readouterr().out


def test_ema_halves_the_distance_in_a_half_life(packed):
    config = make_config(packed, ema_half_life_kclips=0.04)  # 40 clips: 10 steps of 4
    state = training.new_state(config, CPU)
    start = state.ema.synthesis.b4.const.clone()
    with torch.no_grad():
        for p in state.G.parameters():
            p.add_(1)
        state.G.mapping.w_avg.fill_(3)
    for step in range(1, 11):
        training.update_ema(state.ema, state.G, training.ema_weight(config, step))
    assert torch.allclose(state.ema.synthesis.b4.const, start + 0.5, atol=1e-5)
    assert torch.equal(state.ema.mapping.w_avg, state.G.mapping.w_avg)  # buffers are copied


def test_ema_is_short_at_first_with_a_rampup(packed):
    """At most a tenth of the clips so far: step s of 4 clips has a half-life of 0.4 s clips."""
    config = make_config(packed, ema_half_life_kclips=0.04, ema_rampup=0.1)
    assert training.ema_weight(config, 1) == pytest.approx(0.5 ** (4 / 0.4))
    assert training.ema_weight(config, 50) == pytest.approx(0.5 ** (4 / 20))
    assert training.ema_weight(config, 500) == pytest.approx(0.5 ** (4 / 40))


def test_adam_has_the_lazy_correction(packed):
    state = training.new_state(make_config(packed, r1_interval=16), CPU)
    for adam, c in ((state.adam_G, 8 / 9), (state.adam_D, 16 / 17)):
        (group,) = adam.param_groups
        assert group["lr"] == pytest.approx(0.0025 * c) and group["eps"] == 1e-8
        assert group["betas"] == pytest.approx((0.0, 0.99**c))


def test_ada_moves_p_by_the_sign(packed):
    config = make_config(packed, ada_kclips=100.0, ada_interval=4)
    assert training.next_ada_p(config, 0.0, 0.8) == pytest.approx(4 * 4 / 100_000)
    assert training.next_ada_p(config, 0.5, 0.4) == pytest.approx(0.5 - 4 * 4 / 100_000)
    assert training.next_ada_p(config, 0.0, -1.0) == 0.0


CONFIGURATIONS = {
    "no motion styles": dict(model=dict(motion_styles=0)),
    "one motion style": dict(model=dict(motion_styles=1)),
    "eight motion styles, rank 3": dict(model=dict(motion_styles=8, rank=3)),
    "motion first": dict(model=dict(modulation_order="motion_first")),
    "demodulation only": dict(model=dict(motion_demod_only_resolutions=(16,))),
    "pre-normalization": dict(model=dict(prenorm_resolutions=(16, 32))),
    "no motion difference": dict(model=dict(motion_difference=False)),
    "clamp": dict(model=dict(activation_clamp=256.0)),
    "two frames": dict(model=dict(frames_per_clip=2)),
    "five frames": dict(model=dict(frames_per_clip=5)),
    "any frames": dict(sampling="uniform"),
    "labels": dict(conditional=True),
    "no ADA": dict(augment="none"),
    "bgc_noro": dict(augment="bgc_noro"),
    "easy": dict(augment="easy"),
    "bf16": dict(precision="bf16"),
    "no R1": dict(r1_gamma=0.0),
    "no diversity": dict(diversity_weight=0.0),
    "four pieces": dict(batch_split=4, model=dict(mbstd_group=1)),
    "kept fakes": dict(shared_fakes=True),
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A packed folder of eight clips of two classes: each clip is one gray."""
    from made_clips import pack, write_pictures

    folder = tmp_path_factory.mktemp("labelled")
    for k in range(8):
        gray = np.full((40, 32, 32, 3), 20 * k + 30, np.uint8)
        write_pictures(folder / "src" / "ab"[k % 2] / f"clip{k}", gray)
    pack(folder / "src", folder / "dst", 32, labels="folders")
    return folder / "dst"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_trains_and_is_sampled(packed, labelled, name):
    changes = dict(CONFIGURATIONS[name])
    data = labelled if changes.get("conditional") else packed
    model = dataclasses.replace(MODEL, **changes.pop("model", {}))
    config = training.with_data(make_config(data, model=model, **changes), Clips(data))
    start = training.new_state(config, CPU)
    state, stats = take_steps(config, data, 2)
    for network in ("G", "D"):
        parameters = getattr(state, network).named_parameters()
        before = dict(getattr(start, network).named_parameters())
        moved = [key for key, p in parameters if not torch.equal(p, before[key])]
        assert len(moved) > 0.9 * len(before), set(before) - set(moved)
    assert all(torch.stack(values).isfinite().all() for values in stats.values.values())
    assert ("r1" in stats.values) == (config.r1_gamma > 0)
    label = 1 if config.model.num_labels else None
    (window,) = mostgan.render(state.ema, 0, frames=3, label=label)
    assert window.shape == (1, 3, 3, 32, 32) and window.float().std() > 1


@pytest.mark.slow
def test_train_resume_and_sample_from_the_command_line(packed, tmp_path):
    """Four steps at once and two plus two give the same parameters; then sample.py reads them."""
    four, two = options_of(packed, 4), options_of(packed, 2)
    for arguments in (
        [*four, "--out", "whole"],
        [*two, "--out", "halves"],
        ["--resume", "halves", "--total-kframes", 0.048],
    ):
        result = run_program("train.py", *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    whole, halves = (mostgan.load(tmp_path / name).state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    lines = stats_of(tmp_path / "halves")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    expected = {"loss_G", "loss_D", "D_real", "D_fake", "diversity", "r1", "ada_p"}
    expected |= {"frames_per_second", "peak_memory_mb", "skipped_steps"}
    assert expected <= set(lines[0])
    assert read_config(tmp_path / "whole").model.motion_styles == 2
    grids = ("real.png", "real.mp4", "samples-*.mp4", "samples-*.png", "shared-motion-*.mp4")
    for pattern in grids:
        assert list((tmp_path / "whole").glob(pattern)), pattern
    arguments = ["--checkpoint", "whole", "--frames", 5, "--grid", "1x3", "--out", "frames"]
    result = run_program("sample.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "ms/frame" in result.stdout and len(list((tmp_path / "frames").glob("*.png"))) == 5


def test_presets():
    for dataset, chosen in DATASETS.items():
        paper, tiny = train_preset("paper256", dataset), train_preset("tiny", dataset)
        assert paper.model.motion_distance == tiny.model.motion_distance == chosen.motion_distance
        assert (paper.augment, tiny.augment) == (chosen.augment, "none")
    horse = dataclasses.replace(ModelConfig(), motion_distance=16)
    assert paper.model == horse and paper.shared_fakes is False
    assert (paper.batch_clips, paper.r1_gamma, paper.generator_lr) == (64, 10, 0.0025)
    assert tiny.model.channels(64) == 16 and tiny.model.channels(16) == 64
    assert tiny.frames_per_step == 24
    with pytest.raises(UserError):
        train_preset("tiny", "mars")


@pytest.mark.parametrize("sampling", ["spans", "uniform"])
def test_generated_times_fit_the_noise(packed, sampling):
    """Whatever the times drawn, the noise covers their anchors."""
    model = dataclasses.replace(MODEL, motion_distance=16)
    config, clips = make_config(packed, model=model, sampling=sampling), Clips(packed)
    state = training.new_state(config, CPU)
    for step in range(20):
        latents = latents_of_piece(config, clips, CPU, random_stream(0, step, "G", 0))
        assert state.G(*latents[:5]).shape == (6, 3, 32, 32)
        assert (np.diff(latents.t.numpy(), axis=1) > 0).all()
