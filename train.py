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
import contextlib
import functools
import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import mostgan  # noqa: F401  before PyTorch, whose threads it tells how to wait

# isort: split
import torch
import tyro
from tqdm import tqdm

import kernels
from mostgan import augment, distributed, metrics
from mostgan.checkpoint.training import Saver, State, load_state, start_from
from mostgan.config import TrainConfig, train_preset
from mostgan.data import batches
from mostgan.device import choose_kernels, make_deterministic, pick_device
from mostgan.discriminator import Discriminator
from mostgan.draws import latents_of_piece, random_stream, transforms_of_piece
from mostgan.loss import (
    discriminator_objective,
    frozen,
    generated,
    generator_objective,
    r1_objective,
)
from mostgan.model import Generator
from mostgan.pieces import each_piece, own_pieces, pieces_of
from mostgan.prepare import open_data
from mostgan.program import need, run_program
from mostgan.progress import (
    Skips,
    Stats,
    log,
    print_end,
    print_start,
    save_grids,
    save_real_grid,
)
from mostgan.run import (
    Resume,
    StopSignal,
    fine_tuning,
    memory_advice,
    open_run,
    read_config,
    what_to_resume,
    with_data,
    with_shares,
)
from mostgan.tensorboard import Board

G_LAZY_INTERVAL = 8  # the release corrects G's Adam for a lazy regularizer that it no longer has
W_AVG_DECAY = 0.995


def train(config: TrainConfig, out: Path | None = None, resume: Resume | None = None):
    """Trains to the end, or to a signal. out: the folder of a new run; resume: the run to go on
    with, and from where.
    """
    if config.tensorboard:
        need("tensorboard", "tensorboard")  # complains now, not when the data are packed
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
        detectors = metrics.open_detectors(config.eval_detector, None, device)
    state, run, saved = start(config, clips, device, out, resume)

    total, logged, first = round(config.total_kframes * 1000), state.frames, state.frames
    bar = tqdm(
        total=total,
        initial=first,
        unit="frame",
        unit_scale=True,
        smoothing=0.02,
        disable=None if main else True,
    )
    stats, skips, stop = Stats(run, device, bar.write), Skips(), StopSignal(run)
    stats.drop_after(state.frames)
    board = Board(run, state.frames, bar.write) if config.tensorboard and main else None
    saver = Saver(run, saved, config.save_minutes, config.keep_checkpoints, bar.write)
    began = time.perf_counter() - state.seconds
    stopping = state.frames >= total
    loop = steps(state, config, clips, device, stats, skips)
    while not stopping:
        with memory_advice(config, run):
            next(loop)
        bar.update(config.frames_per_step)
        if main and device.type == "cuda" and state.frames - first == config.frames_per_step:
            bar.write(f"kernels: {kernels.summary(device)}")
        state.seconds = time.perf_counter() - began
        # Read once, and the same in every process: a signal that comes later waits for the next
        # step.
        stopping, overdue = distributed.any_of(stop.requested, saver.due())
        is_last = state.frames >= total
        shows = is_last or passes(state, config, config.snapshot_kframes)
        scores = {}
        if detectors and passes(state, config, config.eval_every) and not stopping:
            wanted = config.eval_clips, config.eval_frames
            scores = metrics.evaluate(state.ema, clips, detectors, *wanted)
            if main:
                bar.write(f"{state.frames / 1000:.1f} k frames: {metrics.in_a_line(scores)}")
        saves = bool(shows or stopping or overdue or scores)
        if saves or passes(state, config, config.log_kframes):
            log(state, state.frames - logged, stats, scores, bar, board)
            skips.check(config.skip_limit, state, saver)
            logged = state.frames
        if saves:
            saver.start(state, next(iter(scores.values()), None))  # the best by FVD16 is kept
        if shows and main:
            save_grids(run, state.ema, clips, state.frames, config.model.fps, bar.write, board)
        stopping = stopping or is_last
    loop.close()
    if board is not None:
        board.close()
    bar.close()
    saver.last(state)
    print_end(state, run, saver.saved, total, clips)


class Phases:
    """What a step takes gradients of, for a piece of the batch. Nothing is drawn in here, so that
    any process can take any piece.

    Each method adds its share of the batch's gradients to one network's, and returns a dict of
    values for the statistics, its share of the batch's loss, and more.
    """

    def __init__(self, config, device, backend="inductor"):
        functions = generator_objective, discriminator_objective, r1_objective, generated
        if config.compile:
            functions = (
                torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
                for function in functions
            )
        self.of_generator, self.of_discriminator, self.of_r1, self.generated = functions
        self.config, self.share = config, 1 / config.batch_split
        self.autocast = functools.partial(
            torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bf16"
        )

    def generator(self, G, D, latents, transforms):
        """The generator makes the discriminator take its clips for real ones, with motion styles
        that differ (paper 3.4). Gives the mean w and the clips, too.
        """
        with self.autocast():
            loss, adversarial, diverse, logits, made, w = self.of_generator(
                G, frozen(D), latents, transforms, self.config.diversity_weight
            )
        (self.share * loss).backward(inputs=list(G.parameters()))
        seen = {"loss_G": adversarial, "diversity": diverse, "D_fake": logits}
        made = made._replace(frames=made.frames.detach()) if self.config.shared_fakes else None
        w_mean = self.share * w.detach().float().mean(dim=0)
        return detached(seen), self.share * loss.detach(), w_mean, made

    def discriminator(self, G, D, real, fake, real_transforms, fake_transforms):
        """The discriminator tells real clips from generated ones: fresh ones of `fake`, Latents, or
        those that the generator step made. Gives the mean sign of the logits, too.
        """
        with self.autocast():
            if not self.config.shared_fakes:
                fake = self.generated(G, fake)
            loss, logits = self.of_discriminator(D, real, real_transforms, fake, fake_transforms)
        (self.share * loss).backward(inputs=list(D.parameters()))
        sign = self.share * logits.detach().float().sign().mean()
        return detached({"loss_D": loss, "D_real": logits}), self.share * loss.detach(), sign

    def r1(self, G, D, real, transforms):
        """R1, lazily: every r1_interval steps and that many times as strong. In float32, for its
        gradients are small (a GPU's convolutions round to tf32, as is PyTorch's default).
        """
        penalty = self.of_r1(D, real, transforms)
        loss = self.share * self.config.r1_gamma / 2 * self.config.r1_interval * penalty
        loss.backward(inputs=list(D.parameters()))
        return detached({"r1": penalty}), loss.detach()


def steps(state, config, clips, device, stats, skips, backend="inductor"):
    """The training loop: takes one step (spec §8) after another, and yields after each, for ever.

    state: a State, which this loop alone changes. stats: collects losses and logits; skips: counts
    steps left out. backend: torch.compile's.
    """
    G, D = state.G, state.D

    def streams(phase):
        return [random_stream(config.seed, state.step, phase, n) for n in own_pieces(config)]

    def latents(rngs):
        return [latents_of_piece(config, clips, device, rng) for rng in rngs]

    def transforms(rngs):
        return [transforms_of_piece(config, device, rng, state.ada_p) for rng in rngs]

    with (
        contextlib.closing(open_batches(config, clips, device, state.step)) as data,
        each_piece(config, device, Phases(config, device, backend), (G, D), stats) as on_pieces,
    ):
        for batch in data:
            real = pieces_of(batch, config)

            rngs = streams("G")
            losses, ws, made = on_pieces("generator", latents(rngs), transforms(rngs))
            w_mean = sum(ws)
            left_out = optimize(state.adam_G, "G", sum(losses), stats, skips, w_mean)
            update_w_avg(G.mapping.w_avg, w_mean, left_out)

            rngs = streams("D")
            fake = made if config.shared_fakes else latents(rngs)
            losses, signs = on_pieces(
                "discriminator", real, fake, transforms(rngs), transforms(rngs)
            )
            sign = sum(signs)
            optimize(state.adam_D, "D", sum(losses), stats, skips, sign)
            state.ada_sign = state.ada_sign + sign.nan_to_num(0.0)

            if config.r1_gamma and state.step % config.r1_interval == 0:
                (losses,) = on_pieces("r1", real, transforms(streams("R1")))
                optimize(state.adam_D, "R1", sum(losses), stats, skips)

            state.step += 1
            state.frames += config.frames_per_step
            update_ema(state.ema, G, ema_weight(config, state.step))
            if config.augment != "none" and state.step % config.ada_interval == 0:
                mean_sign = float(state.ada_sign) / config.ada_interval
                state.ada_p, state.ada_sign = next_ada_p(config, state.ada_p, mean_sign), 0.0
            yield


# --------------------------------------------------------------------------------- parts of a step


def detached(values):
    """A dict's tensors without their graphs."""
    return {name: value.detach() for name, value in values.items()}


def open_batches(config, clips, device, step):
    """The batches of real clips of this process from a step on, each on the device."""
    world, rank, model = distributed.size(), distributed.rank(), config.model
    return batches(
        clips,
        config.batch_clips // world,
        model.frames_per_clip,
        config.seed,
        step,
        mirror=config.mirror,
        workers=config.workers,
        max_num_frames=model.max_num_frames,
        device=device,
        sampling=config.sampling,
        rank=rank,
        world=world,
    )


def make_adam(module, lr, interval):
    """Adam with the lazy-regularization correction: one step in `interval` + 1 is the regularizer's
    (spec §8).
    """
    c = interval / (interval + 1)
    return torch.optim.Adam(module.parameters(), lr * c, betas=(0.0, 0.99**c), eps=1e-8, fused=True)


def optimize(adam, phase, loss, stats, skips, *also):
    """An Adam step by the gradients of all processes; left out, and counted, if the loss or a
    gradient is not finite.

    loss, also: float32 tensors, added up over all processes together with the gradients. Returns
    1.0 if left out, else 0.0, as a tensor: nothing waits for it, since fused Adam itself does
    nothing where found_inf is 1.
    """
    parameters = [p for group in adam.param_groups for p in group["params"]]
    distributed.sum_([*(p.grad for p in parameters if p.grad is not None), loss, *also])
    adam.found_inf = skips.count(phase, loss, parameters)
    stats.add_count(skipped_steps=adam.found_inf)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return adam.found_inf


@torch.no_grad()
def update_w_avg(w_avg, w_mean, left_out):
    """Moves the mean w of truncation (spec §3) towards a batch's, unless its step was left out."""
    w_avg.lerp_(torch.where(left_out > 0, w_avg, w_mean), 1 - W_AVG_DECAY)


def ema_weight(config, step):
    """What remains of the average after step number `step` (from 1): ½^(clips of a step /
    half-life).
    """
    half_life = config.ema_half_life_kclips * 1000
    if config.ema_rampup:
        half_life = min(half_life, config.ema_rampup * config.batch_clips * step)
    return 0.5 ** (config.batch_clips / half_life)


@torch.no_grad()
def update_ema(ema, G, weight):
    """ema ← G + (ema − G) · weight; buffers (w_avg) are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(G.parameters()), 1 - weight)
    for average, buffer in zip(ema.buffers(), G.buffers()):
        average.copy_(buffer)


def next_ada_p(config, p, mean_sign):
    """ADA's p, moved by how often D knows real clips (spec §8)."""
    interval, target = config.ada_interval, config.ada_target
    return augment.update_p(p, mean_sign, config.batch_clips, interval, target, config.ada_kclips)


def passes(state, config, kframes):
    """Whether the step just done passed a multiple of kframes thousand frames."""
    every = kframes * 1000
    return state.frames // every > (state.frames - config.frames_per_step) // every


# ------------------------------------------------------------------------------- around the loop


def new_state(config, device):
    """The State at the start of a run: G and D drawn by config.seed, and the average as G."""
    torch.manual_seed(config.seed)
    G, D = Generator(config.model).to(device), Discriminator(config.model).to(device)
    ema = Generator(config.model).to(device).eval().requires_grad_(False)
    ema.load_state_dict(G.state_dict())
    adam_G = make_adam(G, config.generator_lr, G_LAZY_INTERVAL)
    return State(G, D, ema, adam_G, make_adam(D, config.discriminator_lr, config.r1_interval))


def start(config, clips, device, out, resume):
    """(state, run folder, checkpoint that it goes on from, or None) of a new run, or of one to go
    on with.
    """
    state, fps = new_state(config, device), config.model.fps
    saved = resume.checkpoint if resume else None
    origin = start_from(state, config.start_from) if config.start_from and saved is None else None
    run = open_run(out, resume, config, clips)
    if saved is not None:
        load_state(state, saved)
    elif distributed.main():
        save_real_grid(run, clips, fps)
        if origin:
            print(origin)
            save_grids(run, state.ema, clips, 0, fps)  # the checkpoint's own frames
    print_start(config, clips, run, device, state)
    # What exists now lives to the end: Python's garbage collector need not look at it every step.
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
    return state, run, saved


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
    if resume is not None:
        config = read_config(resume.run)
    else:
        config = train_preset(known.preset, known.dataset)
        if known.start_from:
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


def main():
    distributed.start()
    options, resume = parse(sys.argv[1:])
    train(options.config, options.out, resume)
    distributed.finish()


if __name__ == "__main__":
    run_program(main)
