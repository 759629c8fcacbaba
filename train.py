"""Train MoStGAN-V. Read this first, top to bottom: data → G step → D step → R1 → EMA → ADA → log →
save (spec §8).

python train.py --dataset sky                   # data/sky, or without it the built-in sky
python train.py --dataset ffs --data faces.zip --rank 3
python train.py --resume runs/00000-sky-builtin-tiny     # go on where it stopped
python train.py --data clips --start-from runs/released  # fine-tune a checkpoint on other clips
torchrun --nproc_per_node=8 train.py --dataset sky       # the same run on eight GPUs
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
from mostgan import augment, checkpoint, distributed, metrics
from mostgan.config import TrainConfig, UserError, train_preset
from mostgan.data import batches, sample_fake
from mostgan.device import choose_kernels, make_deterministic, pick_device
from mostgan.discriminator import Discriminator
from mostgan.faults import memory_advice
from mostgan.loss import Latents, discriminator_objective, frozen, generator_objective, r1_objective
from mostgan.model import Generator
from mostgan.motion import FRAME_ANCHORS
from mostgan.prepare import open_data
from mostgan.run import (
    Resume,
    Stats,
    StopSignal,
    open_run,
    read_config,
    save_grids,
    save_real_grid,
    what_to_resume,
)
from mostgan.state import Saver, State, load_state, start_from

G_LAZY_INTERVAL = 8  # the release corrects G's Adam for a lazy regularizer that it no longer has
W_AVG_DECAY = 0.995
LONGEST_SPAN = 32  # frames of a clip lie at most this far apart (spec §8)


def train(config: TrainConfig, out: Path | None = None, resume: Resume | None = None):
    """Train to the end, or to a signal. out: the folder of a new run; resume: the run to go on
    with, and from where.
    """
    if config.deterministic:
        make_deterministic()
    device, main = pick_device(), distributed.main()
    choose_kernels(config.kernels, config.compile, device)
    clips = distributed.in_turn(
        lambda: open_data(config.data, config.dataset, config.model.resolution, config.cache)
    )
    config = with_shares(with_data(config, clips))
    detectors = None
    if config.eval_every:
        detectors = metrics.open_detectors(config.eval_detector, config.eval_frame_detector, device)
    state, fps = new_state(config, device), config.model.fps
    saved = resume.checkpoint if resume else None
    origin = start_from(state, config.start_from) if config.start_from and saved is None else None
    run = open_run(out, resume, config, clips)
    if saved is not None:
        load_state(state, saved)
    elif main:
        save_real_grid(run, clips, fps)
        if origin:
            print(origin)
            save_grids(run, state.ema, clips, 0, fps)  # the checkpoint's own frames
    print_start(config, clips, run, device, state)

    world, rank = distributed.size(), distributed.rank()
    data = batches(
        clips,
        config.batch_clips // world,
        config.model.frames_per_clip,
        config.seed,
        state.step,
        config.mirror,
        config.workers,
        config.model.max_num_frames,
        device,
        config.sampling,
        rank,
        world,
    )
    total, logged, first = round(config.total_kframes * 1000), state.frames, state.frames
    bar = tqdm(
        total=total,
        initial=state.frames,
        unit="frame",
        unit_scale=True,
        smoothing=0.02,
        disable=None if main else True,
    )
    stats, stop, objective = Stats(run, device, bar.write), StopSignal(run), objectives(config)
    stats.drop_after(state.frames)
    saver = Saver(run, saved, config.save_minutes, config.keep_checkpoints, bar.write)
    started = time.perf_counter() - state.seconds
    gc.collect()
    # what exists now lives to the end: Python's garbage collector need not look at it every step
    gc.freeze()
    atexit.register(gc.unfreeze)
    stopping = False
    while state.frames < total and not stopping:
        real = next(data)
        draw = Draws(config, clips, device, state)
        with memory_advice(config, run):
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
        if main and device.type == "cuda" and state.frames - first == config.frames_per_step:
            bar.write(f"kernels: {kernels.summary(device)}")
        state.seconds = time.perf_counter() - started
        # Read once, and the same in every process: a signal after this line waits for the next step
        # to be saved.
        stopping, overdue = distributed.any_of(stop.requested, saver.due())
        shown = passes(state, config, config.snapshot_kframes) or state.frames >= total
        scores = {}
        if detectors and passes(state, config, config.eval_every) and not stopping:
            scores = metrics.evaluate(
                state.ema,
                clips,
                detectors,
                config.eval_clips,
                config.eval_frames,
                config.eval_long_clips,
            )
            if main:
                bar.write(f"{state.frames / 1000:.1f} k frames: {metrics.in_a_line(scores)}")
        saves = bool(shown or stopping or overdue or scores)
        if passes(state, config, config.log_kframes) or saves:
            line = stats.write(
                state.frames - logged,
                step=state.step,
                frames=state.frames,
                seconds=round(state.seconds, 1),
                ada_p=round(state.ada_p, 5),
                **scores,
            )
            if line["skipped_steps"] and main:
                bar.write(
                    f"warning: {line['skipped_steps']} optimizer steps before step {state.step} "
                    "were left out: "
                    "a loss or gradient was not finite"
                )
            stats.skips.check(
                config.skip_limit, {"G": state.G, "D": state.D, "R1": state.D}, state.step, saver
            )
            bar.set_postfix_str(
                f"G {line['loss_G']:.2f} D {line['loss_D']:.2f} ada {state.ada_p:.3f}"
            )
            logged = state.frames
        if saves:
            saver.start(state, next(iter(scores.values()), None))  # the best by FVD16 is kept
        if shown and main:
            save_grids(run, state.ema, clips, state.frames, fps, bar.write)
    bar.close()
    data.close()
    saver.last(state)
    if stopping:
        distributed.say(
            f"stopped and saved at {state.frames / 1000:.1f} k frames; "
            f"go on with: {distributed.resume_command(run)}"
        )
    else:
        distributed.say(
            f"{state.frames / 1000:.1f} k frames in {state.seconds / 60:.1f} min, "
            f"{state.frames / max(state.seconds, 1e-9):.0f} frames/s; grids are in {run}\n"
            f"sample with: python sample.py --checkpoint {saver.saved} --frames 1024"
        )


class Objectives(NamedTuple):
    """The functions of loss.py that a step differentiates; each compiled as one graph if the config
    says so.
    """

    generator: Callable
    discriminator: Callable
    r1: Callable


def objectives(config, backend="inductor"):
    """The objectives as config.compile says; backend: torch.compile's."""
    chosen = generator_objective, discriminator_objective, r1_objective
    if config.compile:  # every shape of a step is the same as in the step before
        chosen = (
            torch.compile(objective, fullgraph=True, dynamic=False, backend=backend)
            for objective in chosen
        )
    return Objectives(*chosen)


def generator_step(state, draw, objective, config, stats):
    """Make D take generated clips for real ones, and motion styles differ (paper 3.4).

    Returns, per piece of the batch, what the D step needs of its generated clips: see
    `discriminator_step`.
    """
    G, D, fakes, total, w_mean = state.G, state.D, [], 0.0, 0.0
    keeps_graph = config.shared_fakes and not config.compile
    for _ in draw.shares("G"):
        latents, params = draw.latents(), draw.augmentation()
        with draw.autocast():
            judge = D if keeps_graph else frozen(D)
            loss, adversarial, diverse, logits, frames, w = objective(
                G, judge, latents, params, config.diversity_weight
            )
        (loss / config.batch_split).backward(inputs=list(G.parameters()), retain_graph=keeps_graph)
        total = total + loss.detach() / config.batch_split
        w_mean = w_mean + w.detach().float().mean(dim=0) / config.batch_split
        stats.add(loss_G=adversarial, diversity=diverse, D_fake=logits)
        if (
            config.shared_fakes
        ):  # D has not changed: eagerly its graph serves again, a compiled one is used up
            fakes.append(
                (logits if keeps_graph else (frames.detach(), latents.t, latents.label), params)
            )
        else:
            fakes.append((None, None))
    skip = optimize(state.adam_G, "G", total, stats, w_mean)
    G.mapping.w_avg.lerp_(torch.where(skip > 0, G.mapping.w_avg, w_mean), 1 - W_AVG_DECAY)
    return fakes


def discriminator_step(state, real, fakes, draw, objective, config, stats):
    """Tell real clips from generated ones: the G step's with --shared-fakes, else fresh ones."""
    D, total, sign = state.D, 0.0, 0.0
    for _, piece, (fake, params) in zip(draw.shares("D"), real, fakes):
        if fake is None:
            fake, params = draw.latents(), draw.augmentation()
        with draw.autocast():
            loss, logits = objective(state.G, D, piece, draw.augmentation(), fake, params)
        (loss / config.batch_split).backward(inputs=list(D.parameters()))
        total = total + loss.detach() / config.batch_split
        sign = sign + logits.detach().float().sign().mean() / config.batch_split
        stats.add(loss_D=loss, D_real=logits)
    optimize(state.adam_D, "D", total, stats, sign)
    state.ada_sign = state.ada_sign + sign.nan_to_num(0.0)


def r1_step(state, real, draw, objective, config, stats):
    """R1, lazily: every r1_interval steps and that many times as strong. In float32, for its
    gradients are small (a GPU's convolutions round to tf32, as is PyTorch's default).
    """
    D, total = state.D, 0.0
    for _, piece in zip(draw.shares("R1"), real):
        penalty = objective(D, piece, draw.augmentation())
        loss = penalty * (config.r1_gamma / 2 * config.r1_interval / config.batch_split)
        loss.backward(inputs=list(D.parameters()))
        total = total + loss.detach()
        stats.add(r1=penalty)
    optimize(state.adam_D, "R1", total, stats)


class Draws:
    """Everything that one step draws at random, from streams keyed by (seed, step, phase, piece of
    the batch).
    """

    def __init__(self, config, clips, device, state):
        self.config, self.clips, self.device, self.ada_p = config, clips, device, state.ada_p
        self.step, self.rows = state.step, config.batch_clips // config.batch_split
        self.host, self.on_device = torch.Generator(), torch.Generator(device)
        self.start("G", 0)

    def start(self, phase, piece):
        """Start the streams of a piece, numbered in the whole batch, in a phase of the step: "G",
        "D" or "R1".
        """
        # The 2 keeps them apart from the loader's streams; numpy takes a key [a, b] for the same as
        # [a, b, 0].
        key = [self.config.seed, 2, self.step, ("G", "D", "R1").index(phase), piece]
        self.rng = np.random.default_rng(key)
        for generator, seed in zip((self.host, self.on_device), self.rng.integers(2**62, size=2)):
            generator.manual_seed(int(seed))

    def shares(self, phase):
        """The pieces of the batch that are this process's, by number; their streams start as they
        come.
        """
        count = self.config.batch_split // distributed.size()
        for piece in range(distributed.rank() * count, (distributed.rank() + 1) * count):
            self.start(phase, piece)
            yield piece

    def autocast(self):
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    def pieces(self, real):
        """This process's real clips in pieces of (frames float [N, 3, H, W], t [B, T], label or
        None).
        """
        frames = real.frames.float() / 127.5 - 1
        conditional = self.config.model.num_labels > 0
        return [
            (f.flatten(0, 1), t, label if conditional else None)
            for f, t, label in zip(*(x.split(self.rows) for x in (frames, real.t, real.label)))
        ]

    def latents(self):
        """Latents of a piece of generated clips."""
        model, B, device = self.config.model, self.rows, self.device
        t = sample_fake(
            self.clips.lengths,
            B,
            model.frames_per_clip,
            self.rng,
            model.max_num_frames,
            self.config.sampling,
        )
        first_anchor = torch.from_numpy(
            np.floor(t[:, 0] / model.motion_distance).astype(np.int64)
        ).to(device)
        longest = LONGEST_SPAN
        if self.config.sampling == "uniform":
            longest = min(int(self.clips.lengths.max()), model.max_num_frames)
        rows = FRAME_ANCHORS + -(-max(longest, model.frames_per_clip) // model.motion_distance)
        label = None
        if model.num_labels:
            conditions = [
                self.clips.condition(clip) for clip in self.rng.choice(len(self.clips), B)
            ]
            label = torch.from_numpy(np.stack(conditions)).to(device)
        z = torch.randn(B, model.z_dim, generator=self.on_device, device=device)
        noise = torch.randn(
            B, rows, model.motion_noise_dim, generator=self.on_device, device=device
        )
        return Latents(z, torch.from_numpy(t).to(device), noise, first_anchor, label)

    def augmentation(self):
        """ADA's transforms of a piece, one per clip, or None. Drawn at p = 0 too: a compiled step
        never changes.
        """
        if self.config.augment == "none":
            return None
        size, T = self.config.model.resolution, self.config.model.frames_per_clip
        params = augment.draw(self.config.augment, self.ada_p, self.rows, size, size, self.host)
        return augment.on_device(
            params, (self.rows, 3 * T, size, size), self.device, generator=self.on_device
        )


def make_adam(module, lr, interval):
    """Adam with the lazy-regularization correction: one step in `interval` + 1 is the regularizer's
    (spec §8).
    """
    c = interval / (interval + 1)
    return torch.optim.Adam(module.parameters(), lr * c, betas=(0.0, 0.99**c), eps=1e-8, fused=True)


def optimize(adam, phase, loss, stats, *also):
    """An Adam step by the gradients of all processes; left out, and counted, if the loss or a
    gradient is not finite.

    loss, also: float32 tensors, added up over all processes together with the gradients. Returns
    1.0 if left out, else 0.0, as a tensor: nothing waits for it, since fused Adam itself does
    nothing where found_inf is 1.
    """
    parameters = [p for group in adam.param_groups for p in group["params"]]
    distributed.sum_([*(p.grad for p in parameters if p.grad is not None), loss, *also])
    adam.found_inf = stats.skips.count(phase, loss, parameters)
    stats.add_count(skipped_steps=adam.found_inf)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return adam.found_inf


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
        state.ada_p = augment.update_p(
            state.ada_p,
            mean_sign,
            config.batch_clips,
            config.ada_interval,
            config.ada_target,
            config.ada_kclips,
        )
        state.ada_sign = 0.0


def passes(state, config, kframes):
    """Whether the step just done passed a multiple of kframes thousand frames."""
    every = kframes * 1000
    return state.frames // every > (state.frames - config.frames_per_step) // every


def with_data(config, clips):
    """The configuration with what the data decides: the size of a clip's condition, and the frame
    rate.
    """
    if config.conditional and not clips.num_labels:
        raise UserError(
            f"--conditional needs labels, but {clips.path} has none: leave it out, or add a "
            "dataset.json"
        )
    model = dataclasses.replace(
        config.model,
        num_labels=clips.num_labels if config.conditional else 0,
        fps=config.model.fps or clips.fps,
    )
    return dataclasses.replace(config, model=model)


def with_shares(config):
    """The batch in pieces enough for every process to have as many; see distributed.py."""
    processes = distributed.size()
    if config.batch_clips % processes:
        raise UserError(
            f"{processes} processes cannot share a batch of {config.batch_clips} clips: "
            "choose --batch-clips to be a multiple"
        )
    split = next(
        split
        for split in range(config.batch_split, config.batch_clips + 1)
        if config.batch_clips % split == 0 and split % processes == 0
    )
    if split != config.batch_split:
        distributed.say(
            f"batch_split is {split} instead of {config.batch_split}, for {processes} processes to "
            "share"
        )
    return dataclasses.replace(config, batch_split=split)


def new_state(config, device):
    torch.manual_seed(config.seed)
    G, D = Generator(config.model).to(device), Discriminator(config.model).to(device)
    ema = Generator(config.model).to(device).eval().requires_grad_(False)
    ema.load_state_dict(G.state_dict())
    adam_G = make_adam(G, config.generator_lr, G_LAZY_INTERVAL)
    return State(G, D, ema, adam_G, make_adam(D, config.discriminator_lr, config.r1_interval))


def print_start(config, clips, run, device, state):
    millions = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (state.G, state.D)]
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    distributed.say(
        f"{run}: preset {config.preset}, {config.model.resolution}², on {where}, "
        f"{config.precision}, "
        f"{'compiled' if config.compile else 'not compiled'}, kernels: {kernels.chosen(device)}"
    )
    distributed.say(
        f"data: {clips.path}, {len(clips)} clips of {clips.lengths.min()} to {clips.lengths.max()} "
        "frames"
    )
    if clips.builtin:
        distributed.say(
            "warning: there is no data/sky, so this trains on the built-in procedural sky; "
            "put real clips into data/sky or name them with --data"
        )
    distributed.say(
        f"generator {millions[0]:.1f} M parameters, discriminator {millions[1]:.1f} M; "
        f"{config.total_kframes:g} k frames in steps of {config.batch_clips} clips × "
        f"{config.model.frames_per_clip}"
    )
    if config.preset == "tiny":
        minutes = max(1, round((config.total_kframes - state.frames / 1000) / 5))
        distributed.say(
            f"the tiny preset takes about {minutes} min for this on two cores; Ctrl-C saves and "
            "stops"
        )


def fine_tuning(config, path):
    """config with the model of the checkpoint at path, and with an average that keeps what the
    checkpoint's has.
    """
    if Path(path).is_file() and not path.endswith((".json", ".safetensors")):
        raise UserError(
            f"{path} is a file, and a checkpoint is a folder. Import a released snapshot with: "
            f"python -m mostgan.checkpoint import {path} runs/released --training"
        )
    model = dataclasses.replace(checkpoint.read_config(checkpoint.find(path)), fps=None)
    return dataclasses.replace(
        config, model=model, conditional=model.num_labels > 0, ema_rampup=0.0
    )


@dataclass(frozen=True)
class Options:
    config: TrainConfig
    out: Path | None = None
    """run folder; default runs/<n>-<dataset>-<preset>"""
    resume: Path | None = None
    """go on with this run, or from this checkpoint; alone: with the run in --out or a new one
    there, else the newest
    """


def parse(args):
    """Command line → Options and Resume or None: a preset, or the resumed run's config, with any
    field overridden.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default="paper256" if torch.cuda.is_available() else "tiny")
    early.add_argument("--dataset", default="sky")
    early.add_argument("--start-from", "--start_from")
    early.add_argument("--out", type=Path)
    early.add_argument("--resume", nargs="?", const="")
    early.add_argument("--data")
    known, _ = early.parse_known_args(args)
    resume = what_to_resume(known.out, known.resume)
    if resume is not None:
        resume = resume._replace(names_data=known.data is not None)
    config = (
        train_preset(known.preset, known.dataset) if resume is None else read_config(resume.run)
    )
    if resume is None and known.start_from:
        config = fine_tuning(config, known.start_from)
    if known.resume == "":
        args = [arg for arg in args if arg != "--resume"]
    options = tyro.cli(
        Annotated[Options, tyro.conf.arg(name="")],
        default=Options(config),
        args=args,
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return options, resume


if __name__ == "__main__":
    try:
        distributed.start()
        options, resume = parse(sys.argv[1:])
        train(options.config, options.out, resume)
        distributed.finish()
    except (UserError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
