"""The generator: latent and times → frames. Read `forward` of Generator, then down: Synthesis, Block, SynthesisLayer.

Shapes: B clips, T frames per clip, N = B·T frames clip by clip. What the frames of a clip share (w, content styles) is
computed per clip; what the layers share (motion vectors) once per frame.
"""

import math

import torch
from torch import nn

import kernels
from mostgan.config import ModelConfig
from mostgan.layers import Linear, Mapping
from mostgan.motion import MotionCodes, MotionNetwork, content_latent, motion_noise


class ContentMapping(nn.Module):
    """z → w, and the running mean of w for truncation (spec §3)."""

    def __init__(self, config):
        super().__init__()
        in_dim = config.z_dim
        if config.num_labels:
            self.embed = Linear(config.num_labels, config.w_dim)
            in_dim += config.w_dim
        self.layers = Mapping(in_dim, config.w_dim, config.mapping_layers)
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def forward(self, z, label=None):
        """z: [B, z_dim], label: one-hot [B, num_labels] → w [B, w_dim]."""
        x = kernels.normalize(z)
        if label is not None:
            x = torch.cat([x, kernels.normalize(self.embed(label))], dim=1)
        return self.layers(x)


class SynthesisLayer(nn.Module):
    """3×3 modulated convolution, optionally up=2, with content style and motion styles (spec §6)."""

    def __init__(self, config, in_channels, out_channels, resolution, up=1):
        super().__init__()
        self.up = up
        self.content_first = config.modulation_order == "content_first"
        self.prenorm = resolution in config.prenorm_resolutions
        self.demod_only = resolution in config.motion_demod_only_resolutions
        self.rank, self.in_channels = config.rank, in_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.affine = Linear(config.w_dim, in_channels, bias_init=1.0)
        self.hypernetwork = None
        if config.motion_styles and resolution in config.motion_resolutions:
            factors = config.rank * (in_channels + 3 + 3)
            self.hypernetwork = Linear(config.motion_vector_dim, factors, bias=False, activation="lrelu")

    def forward(self, x, w, motion_vectors=None):
        """x: [N, I, H, W], w: [B, w_dim], motion_vectors: [N, K, motion_vector_dim].

        Returns features [N, O, up·H, up·W] and MoStAtt's score [N, O, K], None without motion styles.
        """
        weight, content_style = self.weight, self.affine(w)
        if self.prenorm:
            weight = weight / (weight.abs().amax(dim=(1, 2, 3), keepdim=True) * math.sqrt(weight[0].numel()))
            content_style = content_style / content_style.abs().amax(dim=1, keepdim=True)
        if self.hypernetwork is None:
            x, demod, score = self.content_convolution(x, weight, content_style), None, None
        else:
            frame_weight, score = self.motion_modulate(weight, content_style, motion_vectors)
            demod = kernels.demodulation(frame_weight)
            if self.demod_only:
                x = self.content_convolution(x, weight, content_style)
            else:
                x = kernels.conv2d_per_frame(x, frame_weight, self.up)
        if demod is None:  # Σ (weight · s)² over inputs and taps is a matrix product: no weight per clip is made
            demod = (content_style.square() @ weight.square().sum(dim=(2, 3)).t() + 1e-8).rsqrt()
            demod = demod.repeat_interleave(len(x) // len(demod), dim=0)
        if self.up == 2:
            x = kernels.fir(x, (1, 1), gain=4.0)
        return kernels.bias_act(x, self.bias, "lrelu", scale=demod), score

    def content_convolution(self, x, weight, content_style):
        """Convolution with weight · s of each clip: s on the weight if there is one clip, else on the features."""
        if len(content_style) == 1:
            weight = weight * content_style.view(1, -1, 1, 1)
        else:
            x = x * content_style.repeat_interleave(len(x) // len(content_style), dim=0)[:, :, None, None]
        return kernels.conv2d_shared(x, weight, self.up)

    def motion_modulate(self, weight, content_style, motion_vectors):
        """MoStAtt in the order of paper 4.3 → weight per frame [N, O, I, 3, 3] and score [N, O, K]."""
        frames, motion_styles, _ = motion_vectors.shape
        motion_style = self.hypernetwork(motion_vectors.flatten(0, 1)).view(frames, motion_styles, self.rank, -1)
        content_style = content_style[:, None, :, None, None]
        if self.content_first:  # strategy i
            return kernels.mostatt(weight * content_style, motion_style)
        frame_weight, score = kernels.mostatt(weight.unsqueeze(0), motion_style)  # strategy ii
        return frame_weight * content_style.repeat_interleave(frames // len(content_style), dim=0), score


class ToRGB(nn.Module):
    """1×1 modulated convolution to an image, without demodulation or motion styles (spec §6)."""

    def __init__(self, config, in_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.affine = Linear(config.w_dim, in_channels, bias_init=1.0)

    def forward(self, x, w):
        """x: [N, I, H, W], w: [B, w_dim] → [N, 3, H, W]. One small kernel per clip."""
        content_style = self.affine(w) / math.sqrt(x.shape[1])
        weight = self.weight[:, :, 0, 0] * content_style.unsqueeze(1)  # [B, 3, I]
        clips, (frames, channels, height, width) = len(w), x.shape
        x = x.permute(0, 2, 3, 1).reshape(clips, -1, channels)  # a view in channels-last memory
        rgb = torch.baddbmm(self.bias.to(x.dtype).expand(clips, 1, -1), x, weight.to(x.dtype).transpose(1, 2))
        return rgb.view(frames, height, width, 3).permute(0, 3, 1, 2)


class Block(nn.Module):
    """One resolution: conv0 (up=2) → conv1 → toRGB; at 4×4 a learned constant and the motion code → conv1 → toRGB."""

    def __init__(self, config, resolution):
        super().__init__()
        channels = config.channels(resolution)
        if resolution == 4:
            self.const = nn.Parameter(torch.randn(channels, 4, 4))
            self.conv1 = SynthesisLayer(config, channels + config.motion_code_dim, channels, 4)
        else:
            self.conv0 = SynthesisLayer(config, config.channels(resolution // 2), channels, resolution, up=2)
            self.conv1 = SynthesisLayer(config, channels, channels, resolution)
        self.torgb = ToRGB(config, channels)


class Synthesis(nn.Module):
    """w, motion codes, motion vectors → frames: blocks 4, 8, …, resolution with skip connections (spec §6)."""

    def __init__(self, config):
        super().__init__()
        self.resolutions = config.resolutions
        for resolution in self.resolutions:
            setattr(self, f"b{resolution}", Block(config, resolution))

    def forward(self, w, motion_code, motion_vectors):
        """Returns frames [N, 3, H, W] and the scores of every MoStAtt layer, each [N, O, K]."""
        frames, const = len(motion_code), self.b4.const
        x = torch.cat([const.expand(frames, -1, -1, -1), motion_code[:, :, None, None].expand(-1, -1, 4, 4)], dim=1)
        x = x.contiguous(memory_format=torch.channels_last)
        image, scores = None, []
        for resolution in self.resolutions:
            block = getattr(self, f"b{resolution}")
            for conv in ([block.conv0] if resolution > 4 else []) + [block.conv1]:
                x, score = conv(x, w, motion_vectors)
                if score is not None:
                    scores.append(score)
            rgb = block.torgb(x, w).float()  # the image is summed in float32 under autocast too
            image = rgb if image is None else kernels.upsample2d(image) + rgb
        return image, scores


class Generator(nn.Module):
    """MoStGAN-V's generator: a pure function of latent, times, motion noise and label.

    `generator(z, t, motion_noise)` → frames; `render` streams video from a seed.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.mapping = ContentMapping(config)
        self.motion_codes = MotionCodes(config)
        self.motion_network = MotionNetwork(config) if config.motion_styles else None
        self.synthesis = Synthesis(config)

    def forward(self, z, t, motion_noise, first_anchor=None, label=None, psi=1.0, return_scores=False):
        """Frames of clips at any times.

        z: [B, z_dim] content latents; t: [B, T] times in frames, float64 to keep far times exact.
        motion_noise: [B, J, motion_noise_dim], rows for anchors first_anchor [B] onwards (0 if None) up to
        floor(t / motion_distance) + 21; or one row of noise per frame, [N, 22, …] and [N] (`motion.motion_noise`
        draws either). label: one-hot [B, num_labels]. psi: truncation, 1 none … 0 the mean w.
        Returns [N, 3, H, W], about [-1, 1], frame = clip · T + index; with return_scores also the list of [N, O, K].
        """
        w = self.mapping(z, label)
        if psi != 1:
            w = torch.lerp(self.mapping.w_avg, w, psi)
        frames, scores = self.synthesize(w, t, motion_noise, first_anchor, label)
        return (frames, scores) if return_scores else frames

    def synthesize(self, w, t, motion_noise, first_anchor=None, label=None):
        """As `forward`, from w [B, w_dim] on; returns frames and scores."""
        rows = len(motion_noise)
        if first_anchor is None:
            first_anchor = torch.zeros(rows, dtype=torch.long, device=t.device)
        if label is not None:
            label = label.repeat_interleave(rows // len(w), dim=0)
        motion_code = self.motion_codes(t.double().reshape(rows, -1), motion_noise, first_anchor, label)
        motion_vectors = self.motion_network(w, motion_code) if self.motion_network is not None else None
        return self.synthesis(w, motion_code, motion_vectors)
