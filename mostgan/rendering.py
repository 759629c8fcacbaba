"""Rendering: seeds and a way through time → windows of frames, in constant memory and constant time
per frame.

A video is a function of time t (in frames of the training data) alone: its motion is v(t), its
content is fixed or a function of t too. So any stretch of it can be rendered alone, slower, faster,
backwards or in a circle.
"""

import itertools
import math
from fractions import Fraction
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch

from mostgan.config import UserError
from mostgan.device import in_order, memory_bytes, one_core_threads
from mostgan.motion import condition_at, content_latent, motion_noise

LARGEST = 10**6  # of a truncation or a gain: no use is near
FARTHEST = 10**8  # frames from 0, either way: so far float64 tells phases apart to eight digits
# What a CPU's thread makes at once: one large frame of each clip, for a larger batch would leave
# the core's caches; of small ones several, lest threads wait for Python rather than compute.
PIXELS_AT_ONCE = 256 * 256


class Way(NamedTuple):
    """A way through time: frame number i is at offset + i · step, modulo period if it is a loop."""

    offset: Fraction
    step: Fraction
    first: int  # the number of the first frame that is wanted
    loop: int | None  # frames after which the way repeats …
    anchors: int | None  # … the anchors of motion noise that it passes …
    period: int | None  # … and the time between them


class Shown(NamedTuple):
    """What the clips of a rendering show."""

    seeds: list  # content seeds, a tuple per clip
    motion_seeds: list
    condition: torch.Tensor | None  # [clips, num_labels]
    psi: float
    content_frames: float  # time from one content seed to the next
    style_gain: torch.Tensor | None  # [K]
    frame_condition: list | None = None  # rows [n, E] per clip, of the frames 0 … n − 1


def render(
    generator,
    seed,
    start=0,
    frames=16,
    clips=1,
    *,
    motion_seed=None,
    label=None,
    frame_condition=None,
    psi=1.0,
    window=None,
    step=1,
    loop=None,
    content_frames=100,
    style_gain=None,
):
    """Streams a video: yields uint8 [clips, n, 3, H, W] for consecutive windows of n ≤ window
    frames.

    seed: of the first clip, clip i having seed + i; or a list with, per clip, a seed, or a tuple of
    seeds through which its content moves smoothly and round again, content_frames of time from one
    to the next. motion_seed: of all clips, or a list; None: as the content (of a tuple the first).
    label: class index, or one per clip; or condition vectors, float [num_labels] or [clips,
    num_labels]. frame_condition: rows of the frames of the data 0, 1, …, n − 1, float [n,
    frame_condition_dim], or a list with such rows per clip. At a time between two of them it is
    interpolated linearly, before the first and after the last it is held (spec §13); in a loop, the
    rows are spread over it once, and the last goes over into the first. psi: truncation.
    start: time of the first frame; step: time between frames, negative for backwards. Times are
    from −10⁸ to 10⁸ frames of the data.
    loop: frames after which the video repeats exactly; `loop_step` says at what pace. The way
    through a tuple of seeds then takes one loop. style_gain: {style: gain}, scales motion styles by
    hand (paper B.1; 0 removes one).
    window: frames of a clip rendered at once; None: what suits the device. Start and step are taken
    as decimals.

    Memory does not depend on start or frames, and a frame is the same in whatever stretch it is
    rendered: windows lie on a fixed raster of frames, so that the same numbers meet in the same
    products. On a GPU this holds for windows of one length on one kind of GPU, with the same clips;
    there a piece's first and last windows are rendered whole. Raises UserError on arguments that
    the model cannot serve, before the first window is asked for.
    """
    config, device = generator.config, generator.mapping.w_avg.device
    start, step = exact(start), exact(step)
    check_render(start, step, frames, clips, psi, window, loop, content_frames)
    way = way_through_time(config, start, step, loop)
    seeds, motion_seeds = clip_seeds(seed, motion_seed, clips)
    if loop is not None:
        content_frames = Fraction(way.period, len(seeds[0]))
    condition, gain = conditions(config, label, clips, device), gains(config, style_gain, device)
    of_frames = frame_conditions(config, frame_condition, clips)
    shown = Shown(seeds, motion_seeds, condition, psi, float(content_frames), gain, of_frames)
    return windows(generator, shown, way, frames, window or choose_window(config, clips, device))


@torch.inference_mode()
def windows(generator, shown, way, frames, window):
    """Yields the windows of `render`: `frames` frames of what is shown, along the way."""
    device = generator.mapping.w_avg.device
    if device.type != "cuda":
        with one_core_threads(threads_that_fit(generator.config, len(shown.seeds))) as submit:
            made = frames_on_cpu(generator, shown, way, frames, submit)
            for _, wanted in stretches(way, frames, window):
                count = wanted.stop - wanted.start
                yield torch.cat(list(itertools.islice(made, count)), dim=1)
        return
    still = still_content(generator, shown)
    for t, wanted in stretches(way, frames, window):
        motion = motion_of(generator, shown, way, still, t)
        # A GPU always renders windows of one shape.
        yield frames_of(generator, shown, still, motion, slice(0, window), wanted)


def frames_on_cpu(generator, shown, way, frames, submit):
    """Yields the frames of a rendering on a CPU, one of each clip at a time: uint8 [clips, 1, 3, H,
    W].

    submit: of `one_core_threads`, which make frames side by side. All that is computed is computed
    in those threads, and the same frames together whatever the window: no bit depends on the number
    of threads or on the window.
    """
    config, clips = generator.config, len(shown.seeds)
    still = submit(still_content, generator, shown).result()
    length = choose_window(config, clips, torch.device("cpu"))
    together = min(length, max(1, PIXELS_AT_ONCE // (clips * config.resolution**2)))
    motions = (
        (motion_of, generator, shown, way, still, t) for t, _ in stretches(way, frames, length)
    )
    jobs = (
        (frames_of, generator, shown, still, motion, slice(i, i + together), wanted)
        for motion, (_, wanted) in zip(in_order(submit, motions, 1), stretches(way, frames, length))
        for i in range(wanted.start // together * together, wanted.stop, together)
    )
    for made in in_order(submit, jobs, 4 * torch.get_num_threads()):
        yield from made.split(1, dim=1)


def threads_that_fit(config, clips):
    """The number of threads whose features half of a CPU's memory holds while each of them makes a
    frame of every clip; at least 1.
    """
    # Input and output of the largest layer, and as much again between them, in float32.
    of_frame = max(4 * 4 * r * r * config.channels(r) for r in config.resolutions)
    return max(1, memory_bytes(torch.device("cpu")) // 2 // (clips * of_frame))


def stretches(way, frames, length):
    """Cuts `frames` frames along the way at a fixed raster of so many: yields the times of a whole
    stretch of the raster, float64 [length], and which of them are wanted, a slice.
    """
    index = way.first
    while frames > 0:
        index = index if way.loop is None else index % way.loop
        lead = index % length
        left = frames if way.loop is None else min(frames, way.loop - index)
        count = min(length - lead, left)
        yield frame_times(way, index - lead, length), slice(lead, lead + count)
        index, frames = index + count, frames - count


def still_content(generator, shown):
    """What all frames share: w of the content's stops [clips, stops, w_dim], and the content of the
    layers if it does not move, else None.
    """
    stops = content_stops(generator, shown)
    if stops.shape[1] > 1:
        return stops, None
    return stops, generator.synthesis.content(stops[:, 0], shown.style_gain)


def motion_of(generator, shown, way, still, t):
    """What differs from frame to frame, at times t [n] of each clip: w [clips · n, w_dim], or None
    where it does not move, motion codes and motion vectors.
    """
    stops, content = still
    t = t.expand(len(stops), -1)
    noise, first_anchor = motion_noise(shown.motion_seeds, t, generator.config, way.anchors)
    w = stops[:, 0]
    if content is None:
        w = content_at(stops, t / shown.content_frames).flatten(0, 1)
    of_frames = None
    if shown.frame_condition is not None:
        of_frames = [moments(rows, t[0], way.period) for rows in shown.frame_condition]
        of_frames = torch.from_numpy(np.stack(of_frames)).to(stops.device)
    motion = (x.to(stops.device) for x in (t, noise, first_anchor))
    motion = generator.motion(w, *motion, shown.condition, of_frames)
    return (w if content is None else None, *motion)


def frames_of(generator, shown, still, moving, together, wanted):
    """uint8 [clips, n, 3, H, W]: of the frames that are made together the wanted ones, both slices
    of what `motion_of` gave.
    """
    clips = len(shown.seeds)
    # [clips · window, …] → [clips · n, …], in one memory layout: a compiled synthesis is of one.
    w, code, vectors = (
        x if x is None else x.unflatten(0, (clips, -1))[:, together].flatten(0, 1).contiguous()
        for x in moving
    )
    content = still[1] if w is None else generator.synthesis.content(w, shown.style_gain)
    frames = generator.synthesis(content, code, vectors)[0].unflatten(0, (clips, -1))
    first = max(0, wanted.start - together.start)
    return to_uint8(frames[:, first : wanted.stop - together.start])


# --------------------------------------------------------------------------------------------- time


def exact(number):
    """A number as the fraction that its decimal digits state: 0.1 is 1/10, whatever its binary
    form.
    """
    try:
        return Fraction(str(number))
    except ValueError:
        raise UserError(f"a time, speed or rate is {number}, but must be a finite number") from None


def way_through_time(config, start, step, loop):
    """The Way of a video from `start` on, in steps of `step`; loop: see `render`."""
    anchors = period = None
    if loop is not None:
        step, anchors = loop_step(config, step, loop)
        period = anchors * config.motion_distance
    first = math.floor(start / step)
    return Way(start - first * step, step, first, loop, anchors, period)


def loop_step(config, step, loop):
    """(step, anchors) of a loop of so many frames at about the pace `step`.

    Motion closes at anchors (motion_noise), motion_distance apart: so a loop is the nearest whole
    number of them, at least one, and its pace is what makes them last `loop` frames exactly.
    """
    anchors = max(1, round(loop * abs(step) / config.motion_distance))
    pace = Fraction(anchors * config.motion_distance, loop)
    return (pace if step > 0 else -pace), anchors


def frame_times(way, first, count):
    """Times of frames number first … first + count − 1, rounded once: float64 [count]."""
    times = (way.offset + i * way.step for i in range(first, first + count))
    if way.period is not None:
        times = (t % way.period for t in times)
    return torch.tensor([float(t) for t in times], dtype=torch.float64)


# ------------------------------------------------------------------------- content and conditions


def clip_seeds(seed, motion_seed, clips):
    """Seeds per clip: content as tuples, all of one length, and motion, as `render` takes them."""
    seeds = [seed + i for i in range(clips)] if isinstance(seed, Integral) else list(seed)
    seeds = [(s,) if isinstance(s, Integral) else tuple(s) for s in seeds]
    if motion_seed is None:
        motion_seeds = [s[0] for s in seeds if s]
    else:
        is_one = isinstance(motion_seed, Integral)
        motion_seeds = [motion_seed] * clips if is_one else list(motion_seed)
    one_length = len({len(s) for s in seeds}) == 1 and seeds[0]
    if not len(seeds) == len(motion_seeds) == clips or not one_length:
        raise UserError(
            f"{len(seeds)} content seeds and {len(motion_seeds)} motion seeds for {clips} clips: "
            "give one of each per clip, or tuples of content seeds, all equally long"
        )
    for s in [s for of_clip in seeds for s in of_clip] + motion_seeds:
        if not 0 <= s < 2**63:
            raise UserError(f"seed {s}: a seed must be 0 or more, and less than 2⁶³")
    return seeds, motion_seeds


def conditions(config, label, clips, device):
    """label, as `render` takes it → a condition vector per clip, float32 [clips, num_labels]; None
    without labels.
    """
    C = config.num_labels
    if label is None and not C:
        return None
    told = f"a class from 0 to {C - 1}, or a vector of {C} numbers, all finite"
    told = f"the model is conditional: give --label or --condition, {told}"
    if label is None:
        raise UserError(told)
    if not C:
        what = f"label is {label}" if np.ndim(label) == 0 else "the clip has a vector"
        raise UserError(f"{what}, but the model was trained without labels: leave it out")
    wanted = torch.as_tensor(label)
    is_vector = wanted.is_floating_point() or wanted.ndim == 2
    if is_vector and not wanted.isfinite().all():
        raise UserError(told)
    if is_vector and wanted.shape in ((C,), (clips, C)):
        return wanted.to(device, torch.float32).expand(clips, C)
    whole = not is_vector and wanted.dtype != torch.bool and wanted.shape in ((), (1,), (clips,))
    if not whole or not ((0 <= wanted) & (wanted < C)).all():
        what = f"the shape {list(wanted.shape)}" if is_vector else label
        raise UserError(f"{told}, not {what}")
    return torch.eye(C, device=device)[wanted.reshape(-1)].expand(clips, C)


def frame_conditions(config, given, clips):
    """frame_condition, as `render` takes it → rows float32 [n, E] per clip, a list; None without
    them.
    """
    E = config.frame_condition_dim
    if given is None and not E:
        return None
    if not E:
        raise UserError("the model was trained without frame conditions: leave them out")
    told = f"the model takes {E} numbers at every frame: give --condition with rows [n, {E}]"
    if given is None:
        raise UserError(told)
    given = given if isinstance(given, (list, tuple)) else [given] * clips
    rows = [torch.as_tensor(of_clip, dtype=torch.float32).cpu().numpy() for of_clip in given]
    for of_clip in rows:
        if of_clip.ndim != 2 or of_clip.shape[1] != E or not len(of_clip):
            raise UserError(f"{told} of them, not of the shape {list(of_clip.shape)}")
        if not np.isfinite(of_clip).all():
            raise UserError(f"{told} of finite numbers")
    if len(rows) != clips:
        raise UserError(f"{told}, or a list with such rows for each of {clips} clips")
    return rows


def moments(rows, t, period):
    """A frame condition [T, E] at times t [T], of its rows [n, E]; period: that of a loop, or
    None.
    """
    if period is not None:
        rows, t = np.concatenate([rows, rows[:1]]), t * (len(rows) / period)
    return condition_at(rows, t)


def content_stops(generator, shown):
    """w of the seeds that each clip's content goes through: [clips, stops, w_dim]."""
    seeds, label = shown.seeds, shown.condition
    z = content_latent([s for of_clip in seeds for s in of_clip], generator.config.z_dim)
    z = z.to(generator.mapping.w_avg)
    if label is not None:
        label = label.repeat_interleave(len(seeds[0]), dim=0)
    w = generator.mapping(z, label)
    if shown.psi != 1:
        w = torch.lerp(truncation_center(generator.mapping, label), w, shown.psi)
    return w.unflatten(0, (len(seeds), -1))


def truncation_center(mapping, condition):
    """What ψ = 0 gives: the mean w; for a class of an imported model, that class's mean w.
    Broadcasts to [N, w_dim].

    condition: [N, num_labels] or None.
    """
    if condition is None or mapping.class_means is None:
        return mapping.w_avg
    one_hot = ((condition == 0) | (condition == 1)).all(1) & (condition.sum(1) == 1)
    of_class = mapping.class_means.to(mapping.w_avg)[condition.argmax(1)]
    return torch.where(one_hot[:, None], of_class, mapping.w_avg)


def content_at(stops, u):
    """Content on its way round: the closed Catmull-Rom spline, smooth in velocity too; at u = 0, 1,
    … it is at stop u.

    stops: w [clips, S, w_dim]; u: float64 [clips, T], in stops → [clips, T, w_dim].
    """
    before = u.floor()
    x = (u - before).unsqueeze(2).to(stops)
    clip = torch.arange(len(stops)).unsqueeze(1)
    p = [stops[clip, (before.long() + i) % stops.shape[1]] for i in (-1, 0, 1, 2)]
    cubic = 3 * (p[1] - p[2]) + p[3] - p[0]
    return p[1] + x / 2 * (p[2] - p[0] + x * (2 * p[0] - 5 * p[1] + 4 * p[2] - p[3] + x * cubic))


def gains(config, style_gain, device):
    """{style: gain} → one gain per style [K], or None."""
    if not style_gain:
        return None
    gain = torch.ones(config.motion_styles, device=device)
    for style, value in style_gain.items():
        if not 0 <= style < config.motion_styles:
            have = "has none"
            if config.motion_styles:
                have = f"has styles 0 to {config.motion_styles - 1}"
            raise UserError(f"motion style {style}: the model {have}")
        if not abs(value) <= LARGEST:
            told = f"must be a finite number, at most {LARGEST:,}"
            raise UserError(f"motion style {style}: its gain is {value}, but {told}")
        gain[style] = value
    return gain


# ------------------------------------------------------------------------------------------ windows


def choose_window(config, clips, device):
    """Frames of each clip to render at once: a power of two, from the device's memory in all, not
    from what is free, so that the same command gives the same windows.

    On a CPU, frames are synthesized a few at a time: a window costs little and is short only so
    that the first frames of many clips come soon. It is also the stretch whose motion is computed
    at once, whatever the window asked for. On a GPU: as many as a quarter of the memory holds, up
    to 64, however few are asked for: a short piece of a video must meet the same kernels as the
    whole, and pays for that with frames that nobody sees.
    """
    if device.type == "cuda":
        sizes = [(r * r, config.channels(r)) for r in config.resolutions]
        of_layer = max(4 * 4 * channels * (pixels + 9 * channels) for pixels, channels in sizes)
        limit = min(64, memory_bytes(device) // 4 // (clips * of_layer))
    else:
        of_frame = 3 * 8 * config.resolution**2
        limit = min(max(4, 16 // clips), memory_bytes(device) // 8 // (clips * of_frame))
    return 2 ** int(math.log2(max(1, limit)))


def to_uint8(frames):
    """Float frames in [-1, 1] → uint8, as spec §0 evaluates them."""
    return (frames * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def check_render(start, step, frames, clips, psi, window, loop, content_frames):
    """Raise UserError on arguments that `render` cannot serve."""
    for name, value in (("clips", clips), ("frames", frames), ("window", window), ("loop", loop)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")
    if step == 0 or content_frames <= 0:
        raise UserError(
            "a step of no time shows one frame for ever: the speed must not be 0, nor may "
            "content_frames"
        )
    if not abs(psi) <= LARGEST:
        raise UserError(f"psi is {psi}, but must be a finite number, at most {LARGEST:,}")
    last = start if loop is not None else start + (frames - 1) * step
    if max(abs(start), abs(last)) > FARTHEST:
        raise UserError(
            f"start is {float(start):g} and the last frame is at {float(last):g}, but both must be "
            "from −10⁸ to 10⁸ frames"
        )
