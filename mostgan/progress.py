"""What a training writes and says on its way: statistics, steps left out, grids, messages."""

import json
import os
import shlex
import time
from contextlib import suppress

import numpy as np
import torch

import kernels
from mostgan import distributed
from mostgan.config import UserError
from mostgan.device import has_bf16, peak_memory_mb
from mostgan.files import write_whole
from mostgan.rendering import render
from mostgan.video import VideoWriter, film_strips, grid, write_png

GRID_SIDE, GRID_FRAMES = 4, 32  # a snapshot shows 4 × 4 clips of 32 frames …
STRIP_FRAMES = 8  # … and its png these many frames of each, in a row
SHARED_MOTION_SEED = 10_000  # of the grid whose clips all move alike


class Stats:
    """Means, and counts, since the last line of stats.jsonl. Values stay on their device until a
    line is written.

    Means are over all processes, and over the values that are finite. The main process writes.
    """

    def __init__(self, run, device, say=print):
        self.path, self.device, self.say = run / "stats.jsonl", device, say
        self.values, self.counts, self.since = {}, {}, time.perf_counter()
        self.unwritten = []  # lines that a full disk did not take

    def add(self, **values):
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach().float().mean())

    def add_count(self, **values):
        """Count what every process sees alike."""
        for name, value in values.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def write(self, frames_since, **more):
        """Append a line: the means, `more`, frames/s over frames_since frames, peak memory. Returns
        it as a dict.

        Every process must call it. A mean without finite values is NaN, in the file null.
        """
        now = time.perf_counter()
        line = more | self._means() | {name: int(value) for name, value in self.counts.items()}
        line["frames_per_second"] = round(frames_since / (now - self.since), 2)
        line["peak_memory_mb"] = round(peak_memory_mb(self.device), 1)
        self.values, self.counts, self.since = {}, {}, now
        if distributed.main():
            is_nan = {name for name, value in line.items() if value != value}
            written = {name: None if name in is_nan else value for name, value in line.items()}
            self.unwritten.append(json.dumps(written) + "\n")
            self._append()
        return line

    def _means(self):
        if not self.values:
            return {}
        stacked = [torch.stack(values) for values in self.values.values()]
        sums = torch.stack([values.nan_to_num(0, 0, 0).sum() for values in stacked])
        finite = torch.stack([values.isfinite().sum() for values in stacked]).float()
        distributed.sum_([sums, finite])
        return {
            name: round(total / count, 6) if count else float("nan")
            for name, total, count in zip(self.values, sums.tolist(), finite.tolist())
        }

    def _append(self):
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.writelines(self.unwritten)
            self.unwritten = []
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)  # no half line
            self.say(
                f"warning: could not write {self.path}: {error.strerror}; the line is kept, to be "
                "written with the next one"
            )

    def drop_after(self, frames):
        """Remove lines past `frames`, which a run resumed from there writes again, and what is not
        a whole line.
        """
        if distributed.main() and self.path.exists():
            kept = [line for line in read_stats(self.path.parent) if line["frames"] <= frames]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_stats(run):
    """The lines of a run's stats.jsonl, {name: number, or None where it is not finite}; none
    without the file. Passes over what is no line of one, such as one that is being written.
    """
    path, lines = run / "stats.jsonl", []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            if line["frames"] >= 0:
                lines.append(line)
    return lines


class Skips:
    """Optimizer steps left out because a loss or a gradient was not finite, per phase ("G", "D",
    "R1").

    All of it stays on the device: nothing waits for it until `check`.
    """

    def __init__(self):
        self.phases = {}

    @torch.no_grad()
    def count(self, phase, loss, parameters):
        """Whether to leave out the step, a float tensor, 1 or 0: `loss`, or a gradient of
        `parameters`, is not finite.

        loss: float tensor []; parameters: those of an optimizer, with gradients or None. The
        maximum norm cannot overflow as the Euclidean one can, and keeps NaN.
        """
        with_gradient = [p for p in parameters if p.grad is not None]
        gradients = [p.grad for p in with_gradient]
        if loss.is_cpu:  # there the maximum norm takes five times as long as this
            norms = torch._foreach_max(torch._foreach_abs(gradients))
        else:
            norms = torch._foreach_norm(gradients, ord=float("inf"))
        broken = ~torch.stack([loss.abs(), *norms]).isfinite()
        skip, zero = broken.any(), torch.zeros((), dtype=torch.int64, device=loss.device)
        start = {"in_a_row": zero, "longest": zero, "loss": loss, "broken": broken}
        seen = self.phases.setdefault(phase, start | {"parameters": with_gradient})
        seen["in_a_row"] = (seen["in_a_row"] + 1) * skip
        seen["longest"] = torch.maximum(seen["longest"], seen["in_a_row"])
        seen["loss"] = torch.where(skip, loss, seen["loss"])
        seen["broken"] = torch.where(skip, broken, seen["broken"])
        return skip.float()

    def check(self, limit, state, saver):
        """UserError with a diagnosis if more than `limit` steps of a phase in a row were left out.

        state: the State whose networks were trained; saver: it knows the last good checkpoint.
        """
        for phase, seen in self.phases.items():
            if int(seen["longest"]) <= limit:
                continue
            network = state.G if phase == "G" else state.D
            names = {id(p): name for name, p in network.named_parameters()}
            of_gradients = zip(seen["parameters"], seen["broken"].tolist()[1:])
            broken = [names[id(p)] for p, is_broken in of_gradients if is_broken]
            saver.finish()
            again = f"go on from the last good checkpoint, {saver.saved}," if saver.saved else ""
            raise UserError(
                f"stopped near step {state.step}: {int(seen['longest'])} steps of {phase} in a row "
                f"were not finite; the last had the loss {float(seen['loss']):g}, and gradients "
                f"that are not finite in {len(broken)} of {len(seen['parameters'])} parameters "
                f"({', '.join(broken[:4]) or 'none'}); {again or 'start again'} with lower "
                "learning rates or --precision float32"
            )


# -------------------------------------------------------------------------------------------- grids


def save_grids(run, generator, clips, frames_done, fps, say=print, board=None):
    """Sample grids with fixed latents: one where every clip moves by itself, one where all share
    their motion.

    clips: the real clips, whose classes or conditions the generated ones take. board: the
    tensorboard.Board that gets them, too. A disk that is full is said, and does not stop the
    training.
    """
    count, label, of_frames = GRID_SIDE**2, None, None
    if generator.config.num_labels and clips.labels.ndim == 1:
        label = [i % clips.num_labels for i in range(count)]
    elif generator.config.num_labels:
        label = [clips.condition(i % len(clips)).tolist() for i in range(count)]
    if generator.config.frame_condition_dim:
        t = np.arange(GRID_FRAMES)
        of_frames = [clips.frame_condition(i % len(clips), t) for i in range(count)]
    moment = f"{frames_done // 1000:06d}k" + (str(frames_done) if 0 < frames_done < 1000 else "")
    for name, motion_seed in (("samples", None), ("shared-motion", SHARED_MOTION_SEED)):
        conditions = {"label": label, "frame_condition": of_frames}
        windows = render(
            generator, 0, 0, GRID_FRAMES, count, motion_seed=motion_seed, window=4, **conditions
        )
        made, path = torch.cat(list(windows), dim=1), run / f"{name}-{moment}"
        try:
            write_grid(path, made, fps)
        except OSError as error:
            say(f"warning: could not write {path.name}: {error}")
        if board is not None:
            board.add_grid(name, made, GRID_SIDE, GRID_SIDE, frames_done, fps)


def save_real_grid(run, clips, fps):
    """The same grid of real clips: their first frames."""
    chosen = np.linspace(0, len(clips) - 1, min(len(clips), GRID_SIDE**2)).astype(int)
    length = min(GRID_FRAMES, int(clips.lengths[chosen].min()))
    frames = np.stack([clips.frames(i, np.arange(length)) for i in chosen])
    write_grid(run / "real", torch.from_numpy(frames), fps)


def write_grid(path, clips, fps):
    """uint8 [n, T, 3, H, W] → path.mp4, all clips side by side, and path.png, a row of frames over
    time per clip.
    """
    with VideoWriter(path.with_suffix(".mp4"), fps) as video:
        video.write(grid(clips, GRID_SIDE, GRID_SIDE))
    write_png(path.with_suffix(".png"), film_strips(clips[: 2 * GRID_SIDE], STRIP_FRAMES))


# ----------------------------------------------------------------------------------------- messages


def print_start(config, clips, run, device, state):
    millions = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (state.G, state.D)]
    where = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    compiled = "compiled" if config.compile else "not compiled"
    distributed.say(
        f"{run}: preset {config.preset}, {config.model.resolution}², on {where}, "
        f"{config.precision}, {compiled}, kernels: {kernels.chosen(device)}"
    )
    if config.precision == "bf16" and not has_bf16(device):
        distributed.say(
            "warning: this processor has no instructions for bf16, which is slow without: better "
            "go on with --precision float32"
        )
    if config.precision == "float32" and device.type == "cpu" and has_bf16(device):
        distributed.say("this processor has instructions for bf16: --precision bf16 is faster")
    shortest, longest = clips.lengths.min(), clips.lengths.max()
    distributed.say(
        f"data: {clips.path}, {len(clips)} clips of {shortest} to {longest} frames, "
        f"{clips.fps:g} frames/s"
    )
    if clips.builtin:
        distributed.say(
            "warning: there is no data/sky, so this trains on the built-in procedural sky; "
            "put real clips into data/sky or name them with --data"
        )
    rates, counts = np.unique(clips.rates.round(2), return_counts=True)
    if len(rates) > 1:
        shares = (f"{rate:g}/s {c / len(clips):.0%}" for rate, c in zip(rates, counts))
        distributed.say(
            f"warning: the clips have different frame rates ({', '.join(shares)}), and the model "
            f"takes all frames for equally far apart; prepare them again with --fps {clips.fps:g}"
        )
    distributed.say(
        f"generator {millions[0]:.1f} M parameters, discriminator {millions[1]:.1f} M; "
        f"{config.total_kframes:g} k frames in steps of {config.batch_clips} clips × "
        f"{config.model.frames_per_clip}"
    )
    if config.preset == "tiny":
        # Measured on two cores: from 91 frames a second with AVX-512 to 36 without.
        left = config.total_kframes - state.frames / 1000
        minutes = f"{left / 5.1:.0f} to {left / 2.15:.0f}" if left > 5 else "less than two"
        distributed.say(
            f"the tiny preset takes {minutes} minutes for this on two cores; Ctrl-C saves and stops"
        )


def print_end(state, run, saved, total, clips):
    thousands = state.frames / 1000
    if state.frames < total:
        again = distributed.resume_command(run)
        distributed.say(f"stopped and saved at {thousands:.1f} k frames; go on with: {again}")
        return
    rate, of_clip, config = state.frames / max(state.seconds, 1e-9), "", state.ema.config
    if config.num_labels + config.frame_condition_dim:
        of_clip = f" --condition {shlex.quote(f'{clips.path}:{clips.names[0]}')}"
    distributed.say(
        f"{thousands:.1f} k frames in {state.seconds / 60:.1f} min, {rate:.0f} frames/s; grids are "
        f"in {run}\nsample with: python sample.py --checkpoint {saved} --frames 1024{of_clip}"
    )


def log(state, frames, stats, scores, bar, board=None):
    """Writes a line of statistics, of the last so many frames, and shows the losses. board: the
    tensorboard.Board that gets them, too.
    """
    line = stats.write(
        frames,
        step=state.step,
        frames=state.frames,
        seconds=round(state.seconds, 1),
        ada_p=round(state.ada_p, 5),
        **scores,
    )
    if board is not None:
        board.add_line(line)
    if line["skipped_steps"] and distributed.main():
        bar.write(
            f"warning: {line['skipped_steps']} optimizer steps before step {state.step} were left "
            "out: a loss or gradient was not finite"
        )
    bar.set_postfix_str(f"G {line['loss_G']:.2f} D {line['loss_D']:.2f} ada {state.ada_p:.3f}")
