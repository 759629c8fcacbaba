"""Motion in continuous time: motion noise, motion codes (spec §2), motion vectors (spec §4), frame
conditions (spec §13).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mostgan.layers import Linear, full_precision

CODE_ANCHORS = 21  # code u_j depends on noise rows j … j+20
FRAME_ANCHORS = CODE_ANCHORS + 1  # a frame lies between codes u_l and u_{l+1}
_CONTENT_STREAM, _MOTION_STREAM = 0, 1


def _normal(seed, stream, first, count):
    """Normal numbers first … first+count−1 of a stream: float32 [count].

    Counter-based (Philox 4x64, four numbers a counter step; Box-Muller), so that any stretch is
    drawn alone; numpy promises these raw bits for ever, as it does not for its own normal(). first
    may be negative: the counter, of 256 bits, goes round.
    """
    start, skip = divmod(first, 4)
    bits = np.random.Philox(key=[seed, stream], counter=start % 2**256).random_raw(
        -(-(count + skip) // 4) * 4
    )
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53  # strictly inside (0, 1)
    radius, angle = np.sqrt(-2 * np.log(uniform[0::2])), 2 * np.pi * uniform[1::2]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return torch.from_numpy(normal[skip : skip + count].astype(np.float32))


def content_latent(seeds, dim):
    """The content latents z of seeds: float32 [B, dim]."""
    return torch.stack([_normal(seed, _CONTENT_STREAM, 0, dim) for seed in seeds])


def _anchor_noise(seed, first, rows, dim, loop):
    """Rows z_j of anchors j = first … first+rows−1: float32 [rows, dim]. loop: z_j is z_{j mod
    loop}; None: no loop.
    """
    if loop is None:
        return _normal(seed, _MOTION_STREAM, first * dim, rows * dim).view(rows, dim)
    return torch.stack(
        [_normal(seed, _MOTION_STREAM, j % loop * dim, dim) for j in range(first, first + rows)]
    )


def motion_noise(seeds, t, config, loop=None):
    """Exactly the motion noise that frames at times t [B, T] need, clip b from seeds[b]. Times may
    be negative.

    Row z_j is a function of (seed, j) alone: any window of an endless video has its noise in memory
    for that window only. loop: z_j = z_{j mod loop}: motion closes to a loop of so many anchors, if
    t is taken modulo its length too. At an anchor v(t) is that anchor's aligner (spec §2.6)
    whatever the waves did, so there time may go back to 0. Returns noise float32 [G, J,
    motion_noise_dim] and the anchor index of each first row, int64 [G], for G = B; or G = N = B·T
    where the frames of a clip lie so far apart that noise per frame is less.
    """
    anchor = torch.floor(t.double().cpu() / config.motion_distance).long()
    rows = int((anchor.amax(1) - anchor.amin(1)).max()) + FRAME_ANCHORS
    if rows > FRAME_ANCHORS * t.shape[1]:
        seeds = [seed for seed in seeds for _ in range(t.shape[1])]
        anchor, rows = anchor.reshape(-1, 1), FRAME_ANCHORS
    first, dim = anchor.amin(1), config.motion_noise_dim
    noise = [_anchor_noise(s, int(j), rows, dim, loop) for s, j in zip(seeds, first)]
    return torch.stack(noise).to(t.device), first.to(t.device)


def condition_at(rows, t):
    """A frame condition at real times t [T], in frames, of its rows [n, E] at the frames 0 … n − 1:
    [T, E]. Between two frames it is interpolated linearly, before the first and after the last it
    is held (spec §13).
    """
    t = np.clip(np.asarray(t, np.float64), 0, len(rows) - 1)
    before = t.astype(np.int64)
    share = (t - before)[:, None].astype(np.float32)
    after = rows[np.minimum(before + 1, len(rows) - 1)]
    return rows[before] * (1 - share) + after * share


class MotionCodes(nn.Module):
    """Noise of anchors → motion code v(t) of every frame, by acyclic positional encoding (spec
    §2).
    """

    def __init__(self, config):
        super().__init__()
        self.motion_distance, self.max_period = config.motion_distance, config.max_period
        self.shortest_period = config.shortest_period or config.motion_distance
        dim, self.num_frequencies = config.motion_noise_dim, config.num_frequencies
        self.conv0 = nn.Parameter(torch.randn(dim, dim + config.num_labels, 11) / 0.01)
        self.conv0_bias = nn.Parameter(torch.zeros(dim))
        self.conv1 = nn.Parameter(torch.randn(dim, dim, 11) / 0.01)
        self.conv1_bias = nn.Parameter(torch.zeros(dim))
        self.period = Linear(dim, self.num_frequencies, bias=False)
        self.phase = Linear(dim, self.num_frequencies, bias=False)
        self.aligner = Linear(dim, config.motion_code_dim, bias=False)

    def frequencies(self, device):
        """ω in radians per frame, longest period first: float64 [F]. From the config alone, so in
        full precision.
        """
        shortest, longest = math.log2(self.shortest_period), math.log2(self.max_period)
        log_period = torch.linspace(
            longest, shortest, self.num_frequencies, dtype=torch.float64, device=device
        )
        return 2 * math.pi / torch.exp2(log_period)

    def anchor_codes(self, noise):
        """Noise rows [G, J, C] → codes u, float64 [G, J − 20, C]: unpadded convolutions, leaky ReLU
        without gain.

        As matrix products of windows: PyTorch's convolution in float64 takes twice as long.
        """
        u = noise.double()
        for weight, bias in ((self.conv0, self.conv0_bias), (self.conv1, self.conv1_bias)):
            weight_gain = 0.01 / math.sqrt(weight[0].numel())
            windows = u.unfold(1, weight.shape[2], 1).flatten(2)  # [G, J − 10, C·11]
            u = F.linear(windows, weight.flatten(1).double() * weight_gain, bias.double() * 0.01)
            u = F.leaky_relu(u, 0.2)
        return u

    @full_precision
    def forward(self, t, noise, first_anchor, label=None):
        """t: float64 [G, S] times of S frames per row of noise; noise: [G, J, C], row 0 being
        anchor first_anchor [G]; label: [G, num_labels] → motion codes [G·S, motion_code_dim]. Rows
        needed: anchors floor(t/D) … + 21.

        In float64 from the noise to the sine: radians reach 10⁸ in far frames, so a period that is
        off in its eighth digit would be another phase. It is a small part of the work, and done
        once per anchor.
        """
        if label is not None:
            noise = torch.cat([noise, label.unsqueeze(1).expand(-1, noise.shape[1], -1)], dim=2)
        u = self.anchor_codes(noise)
        D = self.motion_distance
        left = torch.floor(t / D)
        alpha = ((t - left * D) / D).reshape(-1, 1)
        clip = torch.arange(len(u), device=u.device).unsqueeze(1)
        index = left.long() - first_anchor.unsqueeze(1)
        u_left, u_right = u[clip, index].flatten(0, 1), u[clip, index + 1].flatten(0, 1)

        omega = self.frequencies(t.device)
        omega_p = omega * (torch.tanh(self.period.double_forward(u_left)) + 1)
        phase = self.phase.double_forward(u_left) * (omega * (self.max_period / (2 * math.pi)))
        waves = []
        for tau in (t, left * D, (left + 1) * D):
            raw = omega_p * tau.reshape(-1, 1) + phase
            waves.append(torch.cat([raw.sin(), raw.cos()], dim=1))
        e, e_left, e_right = waves
        a_left, a_right = self.aligner.double_forward(u_left), self.aligner.double_forward(u_right)
        v = e - torch.lerp(e_left, e_right, alpha) + torch.lerp(a_left, a_right, alpha)
        return v.to(self.conv0.dtype)


class MotionNetwork(nn.Module):
    """[w, v(t), e(t)] → K motion vectors a frame, shared by all layers (spec §4 and §13)."""

    def __init__(self, config):
        super().__init__()
        self.motion_styles = config.motion_styles
        hidden = config.motion_styles * config.w_dim
        in_dim = config.w_dim + config.motion_code_dim + config.frame_condition_dim
        self.fc0 = Linear(in_dim, hidden, lrelu=True)
        self.fc1 = Linear(hidden, config.motion_styles * config.motion_vector_dim)

    @full_precision
    def forward(self, w, motion_code, frame_condition=None):
        """w: [B, w_dim], motion_code: [N, motion_code_dim], frame_condition: e(t) [N, E] or None →
        motion vectors [N, K, motion_vector_dim].
        """
        w = w.repeat_interleave(motion_code.shape[0] // len(w), dim=0)
        of_frames = [w, motion_code] + ([] if frame_condition is None else [frame_condition])
        vectors = self.fc1(self.fc0(torch.cat(of_frames, dim=1)))
        return vectors.unflatten(1, (self.motion_styles, -1))
