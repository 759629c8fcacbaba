"""The discriminator: the frames of a clip and their times → one logit per clip (spec §7, paper 3.1
and 3.5).
"""

import math

import torch
from torch import nn

import kernels
from mostgan.config import ModelConfig
from mostgan.layers import Conv2d, Linear, Mapping, full_precision


class ResidualBlock(nn.Module):
    """H×W → H/2×W/2: conv0 → conv1 (down=2), plus a 1×1 skip, each branch at gain √½."""

    def __init__(self, in_channels, hidden_channels, out_channels, from_rgb=False, clamp=None):
        super().__init__()
        self.fromrgb = Conv2d(3, in_channels, 1, lrelu=True, clamp=clamp) if from_rgb else None
        self.conv0 = Conv2d(in_channels, hidden_channels, 3, lrelu=True, clamp=clamp)
        self.conv1 = Conv2d(
            hidden_channels, out_channels, 3, lrelu=True, down=2, gain=math.sqrt(0.5), clamp=clamp
        )
        self.skip = Conv2d(in_channels, out_channels, 1, bias=False, down=2, gain=math.sqrt(0.5))

    def forward(self, x):
        """x: [N, in_channels or 3, H, W] → [N, out_channels, H/2, W/2]."""
        if self.fromrgb is not None:
            x = self.fromrgb(x)
        return self.skip(x) + self.conv1(self.conv0(x))


class TimeCondition(nn.Module):
    """Differences between consecutive frame times, and conditions of the clip and of its frames →
    cmap, which the logit is projected on.
    """

    def __init__(self, config, out_dim):
        super().__init__()
        self.max_num_frames, self.used = config.max_num_frames, config.time_condition
        self.table = nn.Embedding(config.max_num_frames, 256)
        waves = 2 * int(math.log2(config.max_num_frames))
        of_times = (256 + waves) * (config.frames_per_clip - 1)
        of_frames = config.frames_per_clip * config.frame_condition_dim
        self.embed = Linear(config.num_labels + of_times + of_frames, out_dim)
        self.layers = Mapping(out_dim, out_dim, config.mapping_layers)

    @full_precision
    def forward(self, t, label=None, frame_condition=None):
        """t: [B, T] in frames, label: [B, num_labels], frame_condition: [B, T, E] → cmap [B,
        out_dim].
        """
        delta = t.diff(dim=1)
        octaves = torch.arange(int(math.log2(self.max_num_frames)), device=t.device)
        raw = delta.to(self.table.weight.dtype).unsqueeze(2) * (
            math.pi / self.max_num_frames * torch.exp2(octaves)
        )
        condition = torch.cat(
            [self.table(delta.round().long()), raw.sin(), raw.cos()], dim=2
        ).flatten(1)
        if label is not None:
            condition = torch.cat([label, condition], dim=1)
        if frame_condition is not None:  # raw, after the times (spec §13)
            condition = torch.cat([condition, frame_condition.flatten(1)], dim=1)
        if not self.used:
            condition = condition * 0  # an ablation of the release
        return self.layers(kernels.normalize(self.embed(condition)))


def minibatch_std(x, group):
    """Append the minibatch standard deviation as a channel (spec §7). x: [B, C, H, W] → [B, C + 1,
    H, W].

    Clip i is in group i mod (B / G), G = min(group, B), of which B must be a multiple.
    """
    clips, channels, height, width = x.shape
    group = min(group, clips)
    y = x.reshape(group, clips // group, channels, height, width)
    std = (y.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    return torch.cat(
        [x, std.repeat(group).view(clips, 1, 1, 1).expand(-1, -1, height, width)], dim=1
    )


class Epilogue(nn.Module):
    """4×4 features of a clip → a vector to be projected on cmap."""

    def __init__(self, config, out_dim):
        super().__init__()
        channels, hidden = config.channels(4), config.discriminator_hidden_dim
        self.mbstd_group = config.mbstd_group
        self.conv = Conv2d(channels + 1, channels, 3, lrelu=True, clamp=config.activation_clamp)
        self.fc = Linear(channels * 4 * 4, hidden, lrelu=True)
        self.out = Linear(hidden, out_dim)

    @full_precision
    def forward(self, x):
        """x: [B, C, 4, 4] → [B, out_dim]."""
        x = self.conv(minibatch_std(x, self.mbstd_group))
        return self.out(self.fc(x.flatten(1)))


class Discriminator(nn.Module):
    """`discriminator(frames, t, label, frame_condition)` → one logit per clip."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.resolutions = config.resolutions[:0:-1]  # resolution … 8
        images = config.frames_per_clip * (2 if config.motion_difference else 1)
        in_channels = config.channels(config.resolution)
        for r in self.resolutions:
            out_channels = config.channels(r // 2)
            if r // 2 == config.concat_resolution:
                out_channels //= 2
            if r == config.concat_resolution:
                in_channels *= images
            block = ResidualBlock(
                in_channels,
                config.channels(r),
                out_channels,
                r == config.resolution,
                config.activation_clamp,
            )
            setattr(self, f"b{r}", block)
            in_channels = out_channels
        self.b4 = Epilogue(config, config.channels(4))
        self.time_condition = TimeCondition(config, config.channels(4))

    def forward(self, frames, t, label=None, frame_condition=None):
        """frames: [N, 3, H, W] in [-1, 1], clip by clip; t: [B, T] times in frames, T =
        frames_per_clip ≥ 2; label: [B, num_labels], a class as one-hot; frame_condition: [B, T,
        frame_condition_dim] → logits [B]. B must be a multiple of min(mbstd_group, B).
        """
        clips = len(t)
        x = frames.unflatten(0, t.shape)
        if self.config.motion_difference:
            x = torch.cat([x, x - x.roll(-1, dims=1)], dim=1)  # Eq. 4: d_i = x_i − x_{(i+1) mod T}
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for r in self.resolutions:
            if r == self.config.concat_resolution:
                x = x.reshape(clips, -1, r, r).contiguous(memory_format=torch.channels_last)
            x = getattr(self, f"b{r}")(x)
        cmap = self.time_condition(t, label, frame_condition)
        return (self.b4(x.to(cmap.dtype)) * cmap).sum(dim=1) / math.sqrt(cmap.shape[1])
