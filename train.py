"""Train MoStGAN-V. Read this first, top to bottom: data → G step → D step → R1 → EMA → ADA → log → save (spec §8).

    python train.py --dataset sky                       # data/sky if it is there, else the built-in procedural sky
    python train.py --dataset ffs --data faces.zip --rank 3
    python train.py --resume runs/00000-sky-tiny        # go on where it stopped
"""

import argparse
import atexit
import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

import kernels
from mostgan import augment, checkpoint
from mostgan.config import DATASETS, TrainConfig, UserError, train_preset
from mostgan.data import batches, open_data, sample_fake
from mostgan.device import pick_device
from mostgan.discriminator import Discriminator
from mostgan.loss import Latents, discriminator_objective, frozen, generator_objective, r1_objective
from mostgan.model import Generator
from mostgan.motion import FRAME_ANCHORS
from mostgan.run import Stats, StopSignal, read_config, save_grids, save_real_grid, start_run

G_LAZY_INTERVAL = 8  # the release corrects G's Adam for a lazy regularizer that it no longer has
W_AVG_DECAY = 0.995
LONGEST_SPAN = 32  # frames of a clip lie at most this far apart (spec §8)


@dataclass
class State:
    """All that a resumed run needs. Random numbers need no state: each step has a stream keyed by (seed, step)."""

    G: Generator
    D: Discriminator
    ema: Generator
    adam_G: torch.optim.Optimizer
    adam_D: torch.optim.Optimizer
    step: int = 0
    frames: int = 0
    seconds: float = 0.0
    ada_p: float = 0.0
    ada_sign: float = 0.0  # sum over steps of mean sign(D(real)), since ADA's last adjustment


def train(config: TrainConfig, out: Path | None = None, resume: Path | None = None):
    """Train to the end, or to Ctrl-C. out: the run folder; resume: the checkpoint to go on from."""
    device = pick_device()
    kernels.use(config.kernels)
    clips = open_data(config.data, config.dataset, config.model.resolution, config.cache)
    config = with_labels(config, clips)
    state = new_state(config, device)
    if resume is None:
        run = start_run(out, config, clips)
        save_real_grid(run, clips, DATASETS[config.dataset].fps)
    else:
        run = resume.parent
        load_state(state, resume)
    print_start(config, clips, run, device, state)

    data = batches(clips, config.batch_clips, config.model.frames_per_clip, config.seed, state.step, config.mirror,
                   config.workers, config.model.max_num_frames, device)
    stats, stop, objective = Stats(run, device), StopSignal(), objectives(config)
    stats.drop_after(state.frames)
    logged, saved, total = state.frames, resume, round(config.total_kframes * 1000)
    started = time.perf_counter() - state.seconds
    bar = tqdm(total=total, initial=state.frames, unit="frame", unit_scale=True, smoothing=0.02, disable=None)
    gc.collect()
    gc.freeze()  # what exists now lives to the end: Python's garbage collector need not look at it every step
    atexit.register(gc.unfreeze)
    stopping = False
    while state.frames < total and not stopping:
        real = next(data)
        draw = Draws(config, clips, device, state)
        fakes = generator_step(state, draw, objective.generator, config, stats)
        real = draw.pieces(real)
        discriminator_step(state, real, fakes, draw, objective.discriminator, config, stats)
        if config.r1_gamma and state.step % config.r1_interval == 0:
            r1_step(state, real, draw, objective.r1, config, stats)
        update_ema(state, config)
        state.step += 1
        state.frames += config.frames_per_step
        adjust_ada(state, config)

        bar.update(config.frames_per_step)
        state.seconds = time.perf_counter() - started
        stopping = stop.requested  # read once: a signal after this line waits for the next step to be saved
        due = passes(state, config, config.snapshot_kframes) or state.frames >= total or stopping
        if passes(state, config, config.log_kframes) or due:
            line = stats.write(state.frames - logged, step=state.step, frames=state.frames,
                               seconds=round(state.seconds, 1), ada_p=round(state.ada_p, 5))
            if line["gradient_anomalies"]:
                bar.write(f"warning: {line['gradient_anomalies']:.0f} gradients were not finite near step {state.step}")
            bar.set_postfix_str(f"G {line['loss_G']:.2f} D {line['loss_D']:.2f} ada {state.ada_p:.3f}")
            logged = state.frames
        if due:
            saved = save_state(run, state)
            save_grids(run, state.ema, state.frames, DATASETS[config.dataset].fps)
    bar.close()
    data.close()
    if stopping:
        print(f"stopped and saved at {state.frames / 1000:.1f} k frames; go on with: python train.py --resume {run}")
    else:
        print(f"{state.frames / 1000:.1f} k frames in {state.seconds / 60:.1f} min, "
              f"{state.frames / max(state.seconds, 1e-9):.0f} frames/s; grids are in {run}")
        print(f"sample with: python sample.py --checkpoint {saved} --frames 1024")


class Objectives(NamedTuple):
    """The functions of loss.py that a step differentiates; each compiled as one graph if the config says so."""

    generator: Callable
    discriminator: Callable
    r1: Callable


def objectives(config, backend="inductor"):
    """The objectives as config.compile says; backend: torch.compile's."""
    chosen = generator_objective, discriminator_objective, r1_objective
    if config.compile:  # every shape of a step is the same as in the step before
        chosen = (torch.compile(objective, fullgraph=True, dynamic=False, backend=backend) for objective in chosen)
    return Objectives(*chosen)


def generator_step(state, draw, objective, config, stats):
    """Make D take generated clips for real ones, and motion styles differ (paper 3.4).

    Returns, per piece of the batch, what the D step needs of its generated clips: see `discriminator_step`.
    """
    G, D, fakes = state.G, state.D, []
    keeps_graph = config.shared_fakes and not config.compile
    for _ in range(config.batch_split):
        latents, params = draw.latents(), draw.augmentation()
        with draw.autocast():
            judge = D if keeps_graph else frozen(D)
            loss, adversarial, diverse, logits, frames, w = objective(
                G, judge, latents, params, config.diversity_weight)  # fmt: skip
        (loss / config.batch_split).backward(inputs=list(G.parameters()), retain_graph=keeps_graph)
        G.mapping.w_avg.lerp_(w.detach().float().mean(dim=0), (1 - W_AVG_DECAY) / config.batch_split)
        stats.add(loss_G=adversarial, diversity=diverse, D_fake=logits)
        if config.shared_fakes:  # D has not changed: eagerly its graph serves again, a compiled one is used up
            fakes.append((logits if keeps_graph else (frames.detach(), latents.t, latents.label), params))
        else:
            fakes.append((None, None))
    optimize(state.adam_G, stats)
    return fakes


def discriminator_step(state, real, fakes, draw, objective, config, stats):
    """Tell real clips from generated ones: the G step's with --shared-fakes, else fresh ones."""
    D, sign = state.D, 0.0
    for piece, (fake, params) in zip(real, fakes):
        if fake is None:
            fake, params = draw.latents(), draw.augmentation()
        with draw.autocast():
            loss, logits = objective(state.G, D, piece, draw.augmentation(), fake, params)
        (loss / config.batch_split).backward(inputs=list(D.parameters()))
        sign = sign + logits.detach().sign().mean() / config.batch_split
        stats.add(loss_D=loss, D_real=logits)
    optimize(state.adam_D, stats)
    state.ada_sign = state.ada_sign + sign


def r1_step(state, real, draw, objective, config, stats):
    """R1, lazily: every r1_interval steps and that many times as strong. In float32, for its gradients are small."""
    D = state.D
    for piece in real:
        penalty = objective(D, piece, draw.augmentation())
        loss = penalty * (config.r1_gamma / 2 * config.r1_interval / config.batch_split)
        loss.backward(inputs=list(D.parameters()))
        stats.add(r1=penalty)
    optimize(state.adam_D, stats)


class Draws:
    """Everything that one step draws at random, from a stream keyed by (seed, step)."""

    def __init__(self, config, clips, device, state):
        self.config, self.clips, self.device, self.ada_p = config, clips, device, state.ada_p
        self.rng = np.random.default_rng([config.seed, state.step])
        host_seed, device_seed = (int(s) for s in self.rng.integers(2**62, size=2))
        self.host, self.on_device = torch.Generator().manual_seed(host_seed), torch.Generator(device)
        self.on_device.manual_seed(device_seed)
        self.rows = config.batch_clips // config.batch_split

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def pieces(self, real):
        """A real batch in batch_split pieces of (frames float [N, 3, H, W], t [B, T], label one-hot or None)."""
        frames = real.frames.float() / 127.5 - 1
        return [(f.flatten(0, 1), t, self.one_hot(label))
                for f, t, label in zip(*(x.split(self.rows) for x in (frames, real.t, real.label)))]

    def one_hot(self, label):
        classes = self.config.model.num_labels
        return torch.eye(classes, device=self.device)[label.to(self.device)] if classes else None

    def latents(self):
        """Latents of a piece of generated clips."""
        model, B, device = self.config.model, self.rows, self.device
        t = sample_fake(self.clips.lengths, B, model.frames_per_clip, self.rng, model.max_num_frames)
        first_anchor = torch.from_numpy(np.floor(t[:, 0] / model.motion_distance).astype(np.int64)).to(device)
        rows = FRAME_ANCHORS + -(-max(LONGEST_SPAN, model.frames_per_clip) // model.motion_distance)
        label = None
        if model.num_labels:
            label = self.one_hot(torch.from_numpy(self.rng.choice(self.clips.labels, B)))
        z = torch.randn(B, model.z_dim, generator=self.on_device, device=device)
        noise = torch.randn(B, rows, model.motion_noise_dim, generator=self.on_device, device=device)
        return Latents(z, torch.from_numpy(t).to(device), noise, first_anchor, label)

    def augmentation(self):
        """ADA's transforms of a piece, one per clip, or None. Drawn at p = 0 too: a compiled step never changes."""
        if self.config.augment == "none":
            return None
        size, T = self.config.model.resolution, self.config.model.frames_per_clip
        params = augment.draw(self.config.augment, self.ada_p, self.rows, size, size, self.host)
        return augment.on_device(params, (self.rows, 3 * T, size, size), self.device, generator=self.on_device)


def make_adam(module, lr, interval):
    """Adam with the lazy-regularization correction: one step in `interval` + 1 is the regularizer's (spec §8)."""
    c = interval / (interval + 1)
    return torch.optim.Adam(module.parameters(), lr * c, betas=(0.0, 0.99**c), eps=1e-8, fused=True)


def optimize(adam, stats):
    """One Adam step. As the release does, NaN → 0 and ±inf → ±1e5 in gradients; here it is counted and said."""
    grads = [p.grad for group in adam.param_groups for p in group["params"] if p.grad is not None]
    stats.add_count(gradient_anomalies=(~torch.stack(torch._foreach_norm(grads)).isfinite()).sum())
    for grad in grads:
        grad.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
    adam.step()
    adam.zero_grad(set_to_none=True)


@torch.no_grad()
def update_ema(state, config):
    """ema ← G + (ema − G) · ½^(clips of a step / half-life); buffers (w_avg) are copied."""
    half_life = config.ema_half_life_kclips * 1000
    if config.ema_rampup:
        half_life = min(half_life, config.ema_rampup * config.batch_clips * (state.step + 1))
    beta = 0.5 ** (config.batch_clips / half_life)
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.G.parameters()), 1 - beta)
    for average, buffer in zip(state.ema.buffers(), state.G.buffers()):
        average.copy_(buffer)


def adjust_ada(state, config):
    """Every ada_interval steps, move p by how often D knows real clips (spec §8)."""
    if config.augment != "none" and state.step % config.ada_interval == 0:
        mean_sign = float(state.ada_sign) / config.ada_interval
        state.ada_p = augment.update_p(state.ada_p, mean_sign, config.batch_clips, config.ada_interval,
                                       config.ada_target, config.ada_kclips)
        state.ada_sign = 0.0


def passes(state, config, kframes):
    """Whether the step just done passed a multiple of kframes thousand frames."""
    every = kframes * 1000
    return state.frames // every > (state.frames - config.frames_per_step) // every


def with_labels(config, clips):
    if config.conditional and not clips.num_labels:
        raise UserError(f"--conditional needs labels, but {clips.path} has none: leave it out, or add a dataset.json")
    model = dataclasses.replace(config.model, num_labels=clips.num_labels if config.conditional else 0)
    return dataclasses.replace(config, model=model)


def new_state(config, device):
    torch.manual_seed(config.seed)
    G, D = Generator(config.model).to(device), Discriminator(config.model).to(device)
    ema = Generator(config.model).to(device).eval().requires_grad_(False)
    ema.load_state_dict(G.state_dict())
    adam_G = make_adam(G, config.generator_lr, G_LAZY_INTERVAL)
    return State(G, D, ema, adam_G, make_adam(D, config.discriminator_lr, config.r1_interval))


def save_state(run, state):
    """Save a checkpoint of everything. Returns its path."""
    tensors = {}
    for name in ("G", "D"):
        tensors |= {f"{name}.{key}": value for key, value in getattr(state, name).state_dict().items()}
        for i, moments in getattr(state, f"adam_{name}").state_dict()["state"].items():
            tensors |= {f"adam_{name}.{i}.{key}": value for key, value in moments.items()}
    scalars = {key: getattr(state, key) for key in ("step", "frames", "seconds", "ada_p")}
    return checkpoint.save(run, state.step, state.ema, tensors, scalars | {"ada_sign": float(state.ada_sign)})


def load_state(state, path):
    """Continue from the checkpoint at path."""
    tensors, scalars = checkpoint.read_training(path)
    checkpoint.load_state(state.ema, checkpoint.read_tensors(path / "model.safetensors"), path)
    for name in ("G", "D"):
        of = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        checkpoint.load_state(getattr(state, name), of, path)
        adam = getattr(state, f"adam_{name}")
        moments = {}
        for key, value in tensors.items():
            if key.startswith(f"adam_{name}."):
                _, i, moment = key.split(".")
                moments.setdefault(int(i), {})[moment] = value
        adam.load_state_dict(adam.state_dict() | {"state": moments})
    for key, value in scalars.items():
        setattr(state, key, value)


def print_start(config, clips, run, device, state):
    millions = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (state.G, state.D)]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{run}: preset {config.preset}, {config.model.resolution}², on {where}, {config.precision}, "
          f"{'compiled' if config.compile else 'not compiled'}, kernels: {kernels.chosen(device)}")
    print(f"data: {clips.path}, {len(clips)} clips of {clips.lengths.min()} to {clips.lengths.max()} frames")
    if clips.builtin:
        print("warning: there is no data/sky, so this trains on the built-in procedural sky; "
              "put real clips into data/sky or name them with --data")
    print(f"generator {millions[0]:.1f} M parameters, discriminator {millions[1]:.1f} M; "
          f"{config.total_kframes:g} k frames in steps of {config.batch_clips} clips × {config.model.frames_per_clip}")
    if config.preset == "tiny":
        minutes = max(1, round((config.total_kframes - state.frames / 1000) / 5))
        print(f"the tiny preset takes about {minutes} min for this on two cores; Ctrl-C saves and stops")


@dataclass(frozen=True)
class Options:
    config: TrainConfig
    out: Path | None = None
    """run folder; default runs/<n>-<dataset>-<preset>"""
    resume: Path | None = None
    """go on from this run or checkpoint; --resume alone: from the newest"""


def parse(args):
    """Command line → Options: a preset, or the resumed run's config, with any field overridden."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="paper256" if torch.cuda.is_available() else "tiny")
    early.add_argument("--dataset", default="sky")
    early.add_argument("--resume", nargs="?", const="")
    known, _ = early.parse_known_args(args)
    resume = None if known.resume is None else checkpoint.find(known.resume or None)
    config = train_preset(known.preset, known.dataset) if resume is None else read_config(resume.parent)
    if known.resume == "":
        args = [arg for arg in args if arg != "--resume"]
    options = tyro.cli(Annotated[Options, tyro.conf.arg(name="")], default=Options(config), args=args,
                       description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    return dataclasses.replace(options, resume=resume)


if __name__ == "__main__":
    try:
        options = parse(sys.argv[1:])
        train(options.config, options.out, options.resume)
    except UserError as error:
        sys.exit(f"train.py: {error}")
