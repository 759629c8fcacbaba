"""A training step against the spec, written out: whatever an option or a draw does to a gradient, a
weight, an average or ADA's p is computed here a second time, by formulas.
"""

import copy
import dataclasses
import itertools
import math

import av
import numpy as np
import pytest
import torch
from conftest import CPU, MODEL, make_config
from made_clips import pack, write_pictures
from PIL import Image

import train as training
from mostgan import augment, draws, progress
from mostgan.data import Clips, batches
from mostgan.loss import diversity
from mostgan.progress import Skips, Stats

STEPS = 4


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A packed folder: ten clips of 60 frames of two classes, brighter from clip to clip and from
    frame to frame, and from the left to the right.
    """
    folder = tmp_path_factory.mktemp("labelled")
    ramp = np.arange(32)[:, None] + np.zeros((60, 32, 1, 3)) + np.arange(60)[:, None, None, None]
    for k in range(10):
        frames = (ramp + 14 * k).astype(np.uint8)
        write_pictures(folder / "src" / "ab"[k % 2] / f"clip{k}", frames)
    pack(folder / "src", folder / "dst", 32, labels="folders")
    return folder / "dst"


class Written:
    """The step as spec §5 and §8 have it, from the networks that the trainer has at that moment."""

    def __init__(self, config, clips, state):
        self.config, self.clips, self.state = config, clips, state
        self.real = batches(
            clips,
            config.batch_clips,
            config.model.frames_per_clip,
            config.seed,
            mirror=config.mirror,
            max_num_frames=config.model.max_num_frames,
            sampling=config.sampling,
        )
        self.squares = {"G": {}, "D": {}}  # Adam's mean squares, with the number of its steps
        self.signs, self.kept = [], []

    def stream(self, phase, piece):
        key = [self.config.seed, 2, self.state.step, {"G": 0, "D": 1, "R1": 2}[phase], piece]
        return np.random.default_rng(key)

    def latents(self, rng):
        return draws.latents_of_piece(self.config, self.clips, CPU, rng)

    def transforms(self, rng):
        return draws.transforms_of_piece(self.config, CPU, rng, self.state.ada_p)

    def augmented(self, frames, transforms):
        if transforms is None:
            return frames
        clips = frames.unflatten(0, (-1, self.config.model.frames_per_clip)).flatten(1, 2)
        clips = augment.resample(clips, transforms.geometry)
        return augment.recolor(clips, transforms).reshape(frames.shape)

    def real_pieces(self):
        """(frames in [-1, 1], times, labels) of each piece of the batch."""
        size = self.config.batch_clips // self.config.batch_split
        for first in range(0, self.config.batch_clips, size):
            piece = slice(first, first + size)
            frames = self.batch.frames[piece].flatten(0, 1).double() / 127.5 - 1
            label = self.batch.label[piece] if self.config.model.num_labels else None
            yield frames.float(), self.batch.t[piece], label

    def loss_of_G(self, piece):
        rng = self.stream("G", piece)
        z, t, noise, first_anchor, label, _ = self.latents(rng)
        transforms, G = self.transforms(rng), self.G
        w = G.mapping(z, label)
        motion = G.motion(w, t, noise, first_anchor, label)
        frames, scores = G.synthesis(G.synthesis.content(w), *motion)
        self.kept.append((frames.detach(), t, label))
        self.ws.append(w.detach())
        logits = self.D(self.augmented(frames, transforms), t, label)
        spread = diversity(scores, G.config.num_ws)
        return torch.log(1 + torch.exp(-logits)).mean() + self.config.diversity_weight * spread

    def loss_of_D(self, piece, real):
        rng, (frames, t, label) = self.stream("D", piece), real
        if self.config.shared_fakes:
            fake, fake_t, fake_label = self.kept[piece]
        else:
            latents = self.latents(rng)
            with torch.no_grad():  # as the loop has them, for other sums round otherwise
                fake, fake_t, fake_label = self.G(*latents[:5]), latents.t, latents.label
        transforms = [self.transforms(rng), self.transforms(rng)]
        of_real = self.D(self.augmented(frames, transforms[0]), t, label)
        of_fake = self.D(self.augmented(fake, transforms[1]), fake_t, fake_label)
        self.signs.append(of_real.detach().sign())
        return (torch.log(1 + torch.exp(-of_real)) + torch.log(1 + torch.exp(of_fake))).mean()

    def loss_of_R1(self, piece, real):
        frames, t, label = real
        frames, transforms = frames.requires_grad_(), self.transforms(self.stream("R1", piece))
        logits = self.D(self.augmented(frames, transforms), t, label)
        (gradient,) = torch.autograd.grad(logits.sum(), frames, create_graph=True)
        penalty = gradient.square().sum() / len(frames)
        return self.config.r1_gamma / 2 * self.config.r1_interval * penalty

    def gradients(self, phase):
        """Of the whole batch: the mean over its pieces, each of as many clips."""
        self.G, self.D = copy.deepcopy(self.state.G), copy.deepcopy(self.state.D)
        if phase == "G":
            self.batch, self.kept, self.ws = next(self.real), [], []
            losses = [self.loss_of_G(piece) for piece in range(self.config.batch_split)]
        else:
            loss = {"D": self.loss_of_D, "R1": self.loss_of_R1}[phase]
            losses = [loss(piece, real) for piece, real in enumerate(self.real_pieces())]
        parameters = list((self.G if phase == "G" else self.D).parameters())
        return torch.autograd.grad(sum(losses) / len(losses), parameters, allow_unused=True)

    def moved(self, phase, index, parameter, gradient):
        """A parameter after Adam's step with β₁ = 0 and the lazy correction (spec §8)."""
        interval = 8 if phase == "G" else self.config.r1_interval
        rate = self.config.generator_lr if phase == "G" else self.config.discriminator_lr
        c = interval / (interval + 1)
        squares = self.squares["G" if phase == "G" else "D"]
        before, steps = squares.get(index, (0.0, 0))
        beta = 0.99**c
        squares[index] = beta * before + (1 - beta) * gradient.double().square(), steps + 1
        square, steps = squares[index]
        size = (square / (1 - beta**steps)).sqrt() + 1e-8
        return parameter.double() - rate * c * gradient.double() / size


def follow(config, data, monkeypatch):
    """Takes steps by the trainer's loop, each phase of it compared with Written. Returns the
    state.
    """
    clips = Clips(data)
    config = training.with_data(config, clips)
    state = training.new_state(config, CPU)
    state.ada_p = 0.4
    written, phases = Written(config, clips, state), []
    optimize, update_ema = training.optimize, training.update_ema
    next_ada_p = training.next_ada_p

    def watched(adam, phase, *rest):
        parameters = list((state.G if phase == "G" else state.D).parameters())
        expected, before = written.gradients(phase), [p.detach().clone() for p in parameters]
        got = [None if p.grad is None else p.grad.clone() for p in parameters]
        result = optimize(adam, phase, *rest)
        for index, (p, old, g, e) in enumerate(zip(parameters, before, got, expected)):
            e = torch.zeros_like(p) if e is None else e  # R1 does not depend on every bias
            # R1's second derivatives in float32 keep fewer digits.
            relative, absolute = (2e-3, 1e-7) if phase == "R1" else (1e-4, 1e-9)
            assert (g - e).norm() <= relative * e.norm() + absolute, (phase, index)
            moved = written.moved(phase, index, old, g)
            assert torch.allclose(p.double(), moved, rtol=1e-5, atol=1e-6), (phase, index)
        phases.append((state.step, phase))
        return result

    def averaged(ema, G, *rest):
        # The mean w moves in the G step, the average at the step's end.
        mean = torch.cat(written.ws).mean(dim=0)
        w_avg.lerp_(mean, 0.005)
        assert torch.allclose(G.mapping.w_avg, w_avg, rtol=1e-4, atol=1e-7)
        before = [p.clone() for p in ema.parameters()]
        update_ema(ema, G, *rest)
        kept = 0.5 ** (config.batch_clips / (1000 * config.ema_half_life_kclips))
        for average, old, p in zip(ema.parameters(), before, G.parameters()):
            assert torch.allclose(average, kept * old + (1 - kept) * p, rtol=1e-5, atol=1e-6)

    def adjusted(config, p, mean_sign):
        # Of D's signs on all real clips since the last time.
        assert mean_sign == pytest.approx(float(torch.cat(written.signs).mean()), abs=1e-6)
        return next_ada_p(config, p, mean_sign)

    monkeypatch.setattr(training, "optimize", watched)
    monkeypatch.setattr(training, "update_ema", averaged)
    monkeypatch.setattr(training, "next_ada_p", adjusted)
    w_avg, p = state.G.mapping.w_avg.clone(), state.ada_p
    loop = training.steps(state, config, clips, CPU, Stats(data, CPU), Skips())
    for step in range(STEPS):
        next(loop)
        assert state.step == step + 1
        if config.augment != "none" and (step + 1) % config.ada_interval == 0:
            way = math.copysign(1, torch.cat(written.signs).mean() - config.ada_target)
            change = config.batch_clips * config.ada_interval / (1000 * config.ada_kclips)
            p, written.signs = min(max(p + way * change, 0), 1), []
        assert state.ada_p == pytest.approx(p)
    loop.close()
    every = config.r1_interval if config.r1_gamma else STEPS + 1
    of_r1 = [(step, "R1") for step in range(STEPS) if step % every == 0 and config.r1_gamma]
    always = [(step, phase) for step in range(STEPS) for phase in ("G", "D")]
    assert sorted(phases) == sorted(always + of_r1)
    return state


CASES = {
    "fresh clips, ADA": dict(),
    "kept clips": dict(shared_fakes=True, augment="easy", mirror=False),
    "labels, any frames": dict(conditional=True, sampling="uniform", max_num_frames=50),
    "no ADA, no R1": dict(augment="none", r1_gamma=0.0, batch_split=4, mbstd_group=1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_specs(labelled, monkeypatch, name):
    changes = dict(CASES[name])
    of_model = {key: changes.pop(key) for key in list(changes) if hasattr(MODEL, key)}
    config = make_config(
        labelled,
        model=dataclasses.replace(MODEL, **of_model),
        **dict(
            seed=5,
            diversity_weight=3.0,
            r1_gamma=7.0,
            r1_interval=3,
            generator_lr=0.003,
            discriminator_lr=0.002,
            ema_half_life_kclips=0.03,
            ada_target=0.5,
        )
        | changes,
    )
    follow(config, labelled, monkeypatch)


# ------------------------------------------------------------------------------ what a step draws


def labels_of(latents):
    return latents.label.argmax(dim=1).tolist()


def test_generated_clips_have_the_datas_labels(labelled):
    """Of clips of two classes, three of the first and one of the second, each drawn by itself."""
    clips = Clips(labelled)
    clips.labels = np.array([0, 0, 0, 1] * 2 + [0, 0])
    config = training.with_data(make_config(labelled, conditional=True, batch_split=1), clips)
    drawn = [
        labels_of(draws.latents_of_piece(config, clips, CPU, np.random.default_rng(seed)))
        for seed in range(200)
    ]
    assert 0.15 < np.mean(drawn) < 0.25  # two clips of ten
    assert any(len(set(labels)) == 2 for labels in drawn)


def test_real_clips_have_their_own_labels(labelled):
    """A clip is known by its brightness at the left of a frame, 14 k + its time there."""
    clips, seen = Clips(labelled), []
    for batch in itertools.islice(batches(clips, 4, 3, seed=1, mirror=False), 10):
        for frames, t, label in zip(batch.frames, batch.t, batch.label):
            k = round((float(frames[0, :, :, 0].float().mean()) - float(t[0])) / 14)
            assert label.tolist() == [[1, 0], [0, 1]][k % 2]  # classes a and b
            seen.append(k)
    assert set(seen) == set(range(10))


def test_times_are_drawn_as_asked(labelled):
    clips = Clips(labelled)  # of 60 frames
    longest = {}
    for sampling, most in (("spans", 1024), ("uniform", 1024), ("uniform", 45)):
        model = dataclasses.replace(MODEL, max_num_frames=most)
        config = make_config(labelled, model=model, sampling=sampling)
        rngs = [np.random.default_rng(seed) for seed in range(300)]
        t = torch.cat([draws.latents_of_piece(config, clips, CPU, rng).t for rng in rngs])
        longest[sampling, most] = float((t[:, -1] - t[:, 0]).max()), float(t.max())
    assert longest["spans", 1024][0] == 32 and 50 < longest["spans", 1024][1] <= 59
    assert 50 < longest["uniform", 1024][0] <= 59
    assert 35 < longest["uniform", 45][1] <= 44


def test_streams_are_apart():
    """No two pieces, phases, steps or runs draw the same numbers."""
    keys = itertools.product((0, 1), (0, 1, 2), ("G", "D", "R1"), (0, 1))
    firsts = [draws.random_stream(*key).random() for key in keys]
    assert len(set(firsts)) == len(firsts) == 36


@pytest.mark.parametrize("pipeline", ["bgc", "bgc_noro", "easy"])
def test_transforms_are_of_the_pipeline_and_p_that_is_asked_for(labelled, monkeypatch, pipeline):
    asked, draw = [], augment.draw
    monkeypatch.setattr(augment, "draw", lambda *args: asked.append(args[:5]) or draw(*args))
    draws.transforms_of_piece(
        make_config(labelled, augment=pipeline), CPU, np.random.default_rng(0), 0.25
    )
    assert asked == [(pipeline, 0.25, 2, 32, 32)]


# -------------------------------------------------------------------------- what a run hands on


def test_a_run_hands_on_its_options(labelled, tmp_path, monkeypatch):
    """Whose samples are shown and scored, at what rate, by which detectors, saved how often."""
    told, evaluated, best = {}, [], []

    def note(name):
        """Notes the arguments of a function of train.py, which goes on as before."""
        function = getattr(training, name)

        def called(*args):
            result = function(*args)
            told.setdefault(name, []).append((*args, result))
            return result

        monkeypatch.setattr(training, name, called)

    def evaluate(*args):
        evaluated.append(args)
        return {"fvd16": 3.0 * len(evaluated), "fid": 1.0}

    monkeypatch.setattr(training, "save_real_grid", lambda *args: None)
    monkeypatch.setattr(training, "save_grids", lambda *args: None)
    monkeypatch.setattr(training.Saver, "start", lambda self, state, metric: best.append(metric))
    monkeypatch.setattr(training.Saver, "last", lambda self, state: None)
    for name in ("open_data", "choose_kernels", "Saver", "new_state", "save_grids"):
        note(name)
    metrics = training.metrics
    monkeypatch.setattr(metrics, "open_detectors", lambda *args: args)
    monkeypatch.setattr(metrics, "evaluate", evaluate)
    monkeypatch.setattr(metrics, "in_a_line", str)
    model = dataclasses.replace(MODEL, fps=12.5)
    config = make_config(
        labelled,
        2,
        model=model,
        cache=str(tmp_path / "cache"),
        kernels="reference",
        keep_checkpoints=7,
        save_minutes=50,
        eval_every=0.012,
        eval_clips=6,
        eval_frames=128,
        eval_detector="i3d.pt",
        snapshot_kframes=0.012,
    )
    monkeypatch.setattr(training, "StopSignal", lambda run: type("Stop", (), {"requested": False}))
    training.train(config, tmp_path / "run")
    ((_, _, state),) = told["new_state"]
    cache = str(tmp_path / "cache")
    assert [row[:-1] for row in told["open_data"]] == [(str(labelled), "sky", 32, cache)]
    assert told["choose_kernels"] == [("reference", False, CPU, None)]
    assert told["Saver"][0][2:4] == (50, 7)
    assert len(evaluated) == 2 and best == [3.0, 6.0]  # FVD16 decides which is the best
    for generator, _, *wanted in evaluated:
        assert generator is state.ema and wanted == [("i3d.pt", None, CPU), 6, 128]
    assert len(told["save_grids"]) == 2
    for _, generator, _, _, fps, *_ in told["save_grids"]:
        assert generator is state.ema and fps == 12.5


def test_grids_show_the_datas_labels(labelled, tmp_path, monkeypatch):
    """Sixteen clips take the classes in turn, or the condition vectors of the clips in turn; one
    grid has motion of its own for each clip, the other one motion for all.
    """
    asked, written = [], []

    def render(generator, seed, start, frames, clips, **options):
        asked.append((seed, frames, clips, options["motion_seed"], options["label"]))
        yield torch.zeros(clips, frames, 3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(progress, "render", render)
    monkeypatch.setattr(progress, "write_grid", lambda path, made, fps: written.append((path, fps)))
    clips = Clips(labelled)
    config = training.with_data(make_config(labelled, conditional=True), clips)
    generator = type("Model", (), {"config": config.model})
    progress.save_grids(tmp_path, generator, clips, 3000, 12.5)
    assert [row[:3] for row in asked] == [(0, 32, 16)] * 2
    assert asked[0][3] is None and isinstance(asked[1][3], int)
    assert all(row[4] == [0, 1] * 8 for row in asked)
    assert written == [
        (tmp_path / f"{name}-000003k", 12.5) for name in ("samples", "shared-motion")
    ]
    clips.labels = np.arange(20, dtype=np.float32).reshape(10, 2)
    progress.save_grids(tmp_path, generator, clips, 3000, 12.5)
    assert asked[-1][4] == clips.labels.tolist() + clips.labels[:6].tolist()


def test_grids_of_real_clips(labelled, tmp_path):
    """Read back: the rate, and each clip by its brightness, in the video and in the film strip."""
    progress.save_real_grid(tmp_path, Clips(labelled), 12.5)
    with av.open(tmp_path / "real.mp4") as video:
        assert video.streams.video[0].average_rate == 12.5
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 32 and frames[0].shape == (128, 128, 3)
    strip = np.asarray(Image.open(tmp_path / "real.png").convert("L")).astype(int)
    for k in range(8):  # by their names, clip k is the one of even or odd number
        number = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9][k]
        assert abs(strip[32 * k + 16, 16] - (16 + 14 * number)) <= 2
        assert (
            abs(frames[0][32 * (k // 4) + 16, 32 * (k % 4) + 16].mean() - (16 + 14 * number)) <= 4
        )


def test_statistics_are_means_of_what_is_finite(tmp_path):
    stats = Stats(tmp_path, CPU)
    for value in (1.0, 2.0, float("nan"), 6.0):
        stats.add(loss=torch.tensor([value]))
    stats.add_count(skipped_steps=1)
    stats.add_count(skipped_steps=2)
    line = stats.write(10, step=4)
    assert line["loss"] == 3.0 and line["skipped_steps"] == 3 and line["step"] == 4
