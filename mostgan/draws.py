"""What a training step draws at random: plain functions of a random stream that is keyed by (seed,
step, phase, piece of the batch), so that a run goes on from any step with the same numbers, however
many processes share it.
"""

import numpy as np
import torch

from mostgan import augment
from mostgan.data import sample_fake
from mostgan.loss import Latents
from mostgan.motion import FRAME_ANCHORS

LONGEST_SPAN = 32  # frames of a clip lie at most this far apart (spec §8)
PHASES = ("G", "D", "R1")


def random_stream(seed, step, phase, piece):
    """NumPy's generator for a piece of the batch, by its number, in a phase of a step."""
    # The 2 keeps it apart from the loader's; NumPy takes a key [a, b] for the same as [a, b, 0].
    return np.random.default_rng([seed, 2, step, PHASES.index(phase), piece])


def torch_generator(rng, device="cpu"):
    """PyTorch's generator of a device, seeded by NumPy's."""
    return torch.Generator(device).manual_seed(int(rng.integers(2**62)))


def latents_of_piece(config, clips, device, rng):
    """Latents of one piece of generated clips, with times and conditions as the data's."""
    model, B = config.model, config.batch_clips // config.batch_split
    T, longest = model.frames_per_clip, model.max_num_frames
    label = frame_condition = None
    if model.frame_condition_dim:
        chosen, t, frame_condition = moments_of_clips(config, clips, B, rng)
        frame_condition = torch.from_numpy(frame_condition).to(device)
    else:
        t = sample_fake(clips.lengths, B, T, rng, longest, config.sampling)
        chosen = rng.choice(len(clips), B) if model.num_labels else None
    if model.num_labels:
        conditions = [clips.condition(clip) for clip in chosen]
        label = torch.from_numpy(np.stack(conditions)).to(device)
    generator = torch_generator(rng, device)
    span = LONGEST_SPAN
    if config.sampling == "uniform":
        span = min(int(clips.lengths.max()), longest)
    rows = FRAME_ANCHORS + -(-max(span, T) // model.motion_distance)
    z = torch.randn(B, model.z_dim, generator=generator, device=device)
    noise = torch.randn(B, rows, model.motion_noise_dim, generator=generator, device=device)
    t = torch.from_numpy(t)
    first_anchor = torch.floor(t[:, 0] / model.motion_distance).long()
    return Latents(z, t.to(device), noise, first_anchor.to(device), label, frame_condition)


def moments_of_clips(config, clips, count, rng):
    """Clips to take conditions from, int64 [count], times in them, float64 [count, T], and their
    frames' conditions then, float32 [count, T, E].

    A clip gives its length too, so that generated times meet its words as the real ones do: with
    those of a longer clip, conditions would be held where the data have none.
    """
    T, longest = config.model.frames_per_clip, config.model.max_num_frames
    chosen = rng.choice(np.flatnonzero(clips.lengths >= T), count)
    t, conditions = [], []
    for clip in chosen:
        length = clips.lengths[clip]
        t.append(sample_fake([length], 1, T, rng, longest, config.sampling)[0])
        # As in sample_real: times count from the start of a window of a long clip.
        window = rng.integers(max(0, length - longest) + 1)
        conditions.append(clips.frame_condition(clip, window + t[-1]))
    return chosen, np.stack(t), np.stack(conditions)


def transforms_of_piece(config, device, rng, p):
    """ADA's transforms of one piece, one per clip, or None. Drawn at p = 0 too, so that a compiled
    step never changes.
    """
    if config.augment == "none":
        return None
    B, T = config.batch_clips // config.batch_split, config.model.frames_per_clip
    size = config.model.resolution
    drawn = augment.draw(config.augment, p, B, size, size, torch_generator(rng))
    noise = torch_generator(rng, device)
    return augment.on_device(drawn, (B, 3 * T, size, size), device, generator=noise)
