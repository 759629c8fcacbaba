"""The generator: latent and times → frames. Read `forward` of Generator, then down: Synthesis,
Block, SynthesisLayer.

Shapes: B clips, T frames per clip, N = B·T frames clip by clip. What the frames of a clip share (w,
content styles) is computed per clip; what the layers share (motion vectors) once per frame.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

import kernels
from mostgan.config import ModelConfig
from mostgan.layers import Linear, Mapping, full_precision
from mostgan.motion import MotionCodes, MotionNetwork


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
        # [num_labels, w_dim], of an imported model with classes: what rendering truncates to
        self.class_means = None

    @full_precision
    def forward(self, z, label=None):
        """z: [B, z_dim], label: [B, num_labels], a class as one-hot → w [B, w_dim]."""
        x = kernels.normalize(z)
        if label is not None:
            x = torch.cat([x, kernels.normalize(self.embed(label))], dim=1)
        return self.layers(x)


class LayerContent(NamedTuple):
    """What the frames of a clip share in a synthesis layer: computed once per clip, however long
    the clip.
    """

    raw_weight: torch.Tensor  # [O, I, 3, 3]
    style: torch.Tensor  # content style s, [B, I]
    # raw_weight · s, [B, O, I, 3, 3], where it serves more than one window
    weight: torch.Tensor | None
    # [B, O], in layers without motion styles; None where it is in the weight, too
    demod: torch.Tensor | None
    # [K], where motion styles are scaled by hand (paper B.1)
    style_gain: torch.Tensor | None = None


class SynthesisLayer(nn.Module):
    """3×3 modulated convolution, optionally up=2, with content style and motion styles (spec
    §6).
    """

    def __init__(self, config, in_channels, out_channels, resolution, up=1):
        super().__init__()
        self.up = up
        self.content_first = config.modulation_order == "content_first"
        self.prenorm = resolution in config.prenorm_resolutions
        self.demod_only = resolution in config.motion_demod_only_resolutions
        self.rank, self.in_channels, self.clamp = config.rank, in_channels, config.activation_clamp
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.affine = Linear(config.w_dim, in_channels, bias_init=1.0)
        self.hypernetwork = None
        if config.motion_styles and resolution in config.motion_resolutions:
            factors = config.rank * (in_channels + 3 + 3)
            affine = config.hypernetwork == "affine"
            self.hypernetwork = Linear(
                config.motion_vector_dim, factors, bias=affine, bias_init=1.0, lrelu=not affine
            )

    @full_precision
    def content(self, w, style_gain=None, dtype=None):
        """What all frames of a clip share in this layer. w: [B, w_dim]; style_gain: as
        `kernels.mostatt` takes it; dtype: of convolutions.
        """
        weight, style = self.weight, self.affine(w)
        if self.prenorm:
            largest = weight.abs().amax(dim=(1, 2, 3), keepdim=True)
            weight = weight / (largest * math.sqrt(weight[0].numel()))
            style = style / style.abs().amax(dim=1, keepdim=True)
        content_weight = demod = None
        # In training, many clips share a weight once: MoStAtt then takes weight and s as they are.
        shares_weight = self.hypernetwork is not None and self.content_first and not self.training
        if len(w) == 1 or shares_weight:
            content_weight = weight * style[:, None, :, None, None]
        if self.hypernetwork is None:  # Σ (weight · s)² over inputs and taps is a matrix product
            demod = (style.square() @ weight.square().sum(dim=(2, 3)).t() + 1e-8).rsqrt()
            if len(w) == 1 and kernels.folds(w):
                folded = kernels.demodulated(content_weight[0], demod[0], self.up)
                content_weight, demod = folded.to(dtype).unsqueeze(0), None
        return LayerContent(weight, style, content_weight, demod, style_gain)

    def forward(self, x, content, motion_vectors=None):
        """x: [N, I, H, W], content: of `content(w)`, motion_vectors: [N, K, motion_vector_dim].

        Returns features [N, O, up·H, up·W] and MoStAtt's score [N, O, K], None without motion
        styles.
        """
        # x.shape[0] rather than len(x): torch.export keeps a shape open.
        frames_per_clip = x.shape[0] // len(content.style)
        score = frame_weight = None
        if self.hypernetwork is None and content.demod is None:
            folded = content.weight[0], self.bias, self.up, self.clamp
            return kernels.conv2d_bias_lrelu(x, *folded), None
        if self.hypernetwork is None:
            demod = content.demod.repeat_interleave(frames_per_clip, dim=0)
        else:
            frame_weight, score, demod = self.motion_modulate(content, motion_vectors)
        epilogue = demod, self.bias, self.up, self.clamp
        if frame_weight is not None and not self.demod_only:
            return kernels.conv2d_epilogue(x, frame_weight, *epilogue), score
        if len(content.style) == 1:  # s goes into the weight, and saves a pass over the features
            x = kernels.conv2d_shared(x, content.weight[0], self.up)
        else:
            style = content.style.repeat_interleave(frames_per_clip, dim=0)[:, :, None, None]
            x = kernels.conv2d_shared(x * style.to(x.dtype), content.raw_weight, self.up)
        return kernels.epilogue(x, *epilogue), score

    def motion_modulate(self, content, motion_vectors):
        """MoStAtt in the order of paper 4.3 → weight [N, O, I, 3, 3], score [N, O, K] and
        demodulation [N, O].
        """
        motion_style = self.hypernetwork(motion_vectors.flatten(0, 1))
        motion_style = motion_style.view(*motion_vectors.shape[:2], self.rank, -1)
        weight, style = content.weight, None
        if weight is None or not self.content_first:
            weight, style = content.raw_weight.unsqueeze(0), content.style
        return kernels.mostatt_demod(
            weight,
            motion_style,
            style,
            want_weight=not self.demod_only,
            style_gain=content.style_gain,
            content_first=self.content_first,
        )


class ToRGB(nn.Module):
    """1×1 modulated convolution to an image, without demodulation or motion styles (spec §6)."""

    def __init__(self, config, in_channels):
        super().__init__()
        self.clamp = config.activation_clamp
        self.weight = nn.Parameter(torch.randn(3, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.affine = Linear(config.w_dim, in_channels, bias_init=1.0)

    @full_precision
    def content(self, w):
        """w: [B, w_dim] → one small kernel per clip, [B, 3, I]."""
        content_style = self.affine(w) / math.sqrt(self.weight.shape[1])
        return self.weight[:, :, 0, 0] * content_style.unsqueeze(1)

    def forward(self, x, weight):
        """x: [N, I, H, W], weight: [B, 3, I] of `content(w)` → [N, 3, H, W]."""
        clips, (frames, channels, height, width) = len(weight), x.shape
        x = x.permute(0, 2, 3, 1).reshape(clips, -1, channels)  # a view in channels-last memory
        rgb = torch.baddbmm(
            self.bias.to(x.dtype).expand(clips, 1, -1), x, weight.to(x.dtype).transpose(1, 2)
        )
        rgb = rgb.view(frames, height, width, 3).permute(0, 3, 1, 2)
        return rgb if self.clamp is None else rgb.clamp(-self.clamp, self.clamp)


class Block(nn.Module):
    """One resolution: conv0 (up=2) → conv1 → toRGB; at 4×4 a learned constant and the motion code →
    conv1 → toRGB.
    """

    def __init__(self, config, resolution):
        super().__init__()
        channels = config.channels(resolution)
        if resolution == 4:
            self.const = nn.Parameter(torch.randn(channels, 4, 4))
            self.conv1 = SynthesisLayer(config, channels + config.motion_code_dim, channels, 4)
        else:
            self.conv0 = SynthesisLayer(
                config, config.channels(resolution // 2), channels, resolution, up=2
            )
            self.conv1 = SynthesisLayer(config, channels, channels, resolution)
        self.torgb = ToRGB(config, channels)


class Synthesis(nn.Module):
    """w, motion codes, motion vectors → frames: blocks 4, 8, …, resolution with skip connections
    (spec §6).
    """

    def __init__(self, config):
        super().__init__()
        self.resolutions = config.resolutions
        for resolution in self.resolutions:
            setattr(self, f"b{resolution}", Block(config, resolution))

    def layers(self):
        """(synthesis convolutions, toRGB) of each block, lowest resolution first."""
        for resolution in self.resolutions:
            block = getattr(self, f"b{resolution}")
            yield ([block.conv0] if resolution > 4 else []) + [block.conv1], block.torgb

    def content(self, w, style_gain=None):
        """Per clip, what every layer needs of w [B, w_dim]: as `layers`, but their contents."""
        dtype = kernels.working_dtype(w)
        return [
            ([conv.content(w, style_gain, dtype) for conv in convs], torgb.content(w))
            for convs, torgb in self.layers()
        ]

    def forward(self, content, motion_code, motion_vectors):
        """content: of `content(w)`; motion_code: [N, motion_code_dim]; motion_vectors: [N, K, …] or
        None.

        Returns frames [N, 3, H, W] and the scores of every MoStAtt layer, each [N, O, K].
        """
        const = self.b4.const.expand(motion_code.shape[0], -1, -1, -1)
        x = torch.cat([const, motion_code[:, :, None, None].expand(-1, -1, 4, 4)], dim=1)
        x = x.contiguous(memory_format=torch.channels_last)
        image, scores = None, []
        for (convs, torgb), (conv_contents, rgb_weight) in zip(self.layers(), content):
            for conv, conv_content in zip(convs, conv_contents):
                x, score = conv(x, conv_content, motion_vectors)
                if score is not None:
                    scores.append(score)
            # The image is summed in float32, under autocast too.
            rgb = torgb(x, rgb_weight).to(motion_code.dtype)
            image = rgb if image is None else kernels.upsample2d(image) + rgb
        return image, scores


class Generator(nn.Module):
    """MoStGAN-V's generator: a pure function of latent, times, motion noise and conditions.

    `generator(z, t, noise)` → frames; `mostgan.render` streams video from a seed.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.mapping = ContentMapping(config)
        self.motion_codes = MotionCodes(config)
        self.motion_network = MotionNetwork(config) if config.motion_styles else None
        self.synthesis = Synthesis(config)

    def forward(
        self,
        z,
        t,
        noise,
        first_anchor=None,
        label=None,
        psi=1.0,
        return_scores=False,
        frame_condition=None,
    ):
        """Frames of clips at any times.

        z: [B, z_dim] content latents; t: [B, T] times in frames, float64 to keep far times exact.
        noise: motion noise [B, J, motion_noise_dim], rows for anchors first_anchor [B] onwards (0
        if None) up to floor(t / motion_distance) + 21; or noise per frame, [N, 22, …] and [N]
        (`motion.motion_noise` draws either).
        label: [B, num_labels], a clip's condition, a class as one-hot; frame_condition: [B, T,
        frame_condition_dim], that of the moments t (spec §13). psi: truncation, 1 none … 0 the mean
        w. Returns [N, 3, H, W], about [-1, 1], frame = clip · T + index; with return_scores also
        the list of [N, O, K].
        """
        w = self.content_code(z, label, psi)
        motion = self.motion(w, t, noise, first_anchor, label, frame_condition)
        frames, scores = self.synthesis(self.synthesis.content(w), *motion)
        return (frames, scores) if return_scores else frames

    def content_code(self, z, label=None, psi=1.0):
        """z: [B, z_dim] → truncated w [B, w_dim]."""
        w = self.mapping(z, label)
        return w if psi == 1 else torch.lerp(self.mapping.w_avg, w, psi)

    def motion(self, w, t, noise, first_anchor=None, label=None, frame_condition=None):
        """Per frame, what all layers share: motion codes [N, motion_code_dim] and motion vectors
        [N, K, …] or None.
        """
        rows = len(noise)
        if first_anchor is None:
            first_anchor = torch.zeros(rows, dtype=torch.long, device=noise.device)
        if label is not None:
            label = label.repeat_interleave(rows // len(label), dim=0)
        motion_code = self.motion_codes(t.double().reshape(rows, -1), noise, first_anchor, label)
        if self.motion_network is None:
            return motion_code, None
        if frame_condition is not None:
            frame_condition = frame_condition.flatten(0, 1)
        return motion_code, self.motion_network(w, motion_code, frame_condition)
