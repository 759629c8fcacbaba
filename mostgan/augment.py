"""Adaptive discriminator augmentation (ADA): the pipelines of spec §8a and the controller of spec
§8.

Use: `frames = apply(frames, draw("bgc", p, clips, height, width, cpu_generator))`; a compiled
function takes what `on_device` makes of the draw and calls `resample` and `recolor`.

The transforms are drawn on the host, so every shape is known there and nothing waits for the
device. Inside `resample` shapes vary from call to call: it is an op of its own, which torch.compile
does not look into.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import UserError


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline does besides x flip, shifts and scaling, which all of them do. Multipliers
    scale p; 0 is off.
    """

    rot90: bool = False
    anisotropy: bool = False
    rotate: float = 0.0  # multiplier of the two rotations
    rotate_max: float = 1.0  # largest angle, as a fraction of π
    color: bool = False
    noise: float = 0.0  # multiplier
    cutout: bool = False


PIPELINES = {
    "bgc": Pipeline(rot90=True, anisotropy=True, rotate=1.0, color=True),
    "bgc_noro": Pipeline(anisotropy=True, color=True),
    "easy": Pipeline(rotate=0.5, rotate_max=0.1, noise=0.1, cutout=True),
}

_EYE = torch.eye(3, dtype=torch.float64)
_SYM6 = torch.tensor(
    [
        0.015404109327027373,
        0.0034907120842174702,
        -0.11799011114819057,
        -0.048311742585633,
        0.4910559419267466,
        0.787641141030194,
        0.3379294217276218,
        -0.07263752278646252,
        -0.021060292512300564,
        0.04472490177066578,
        0.0017677118642428036,
        -0.007800708325034148,
    ],
    dtype=torch.float64,
)


class AugmentParams(NamedTuple):
    """The transforms of B clips: float64, on the host. None: the pipeline has no such stage."""

    geometry: Tensor  # [B, 3, 3] output to input, in pixels, centred on the image, x right, y down
    color: Tensor | None  # [B, 3, 4]: rgb becomes m[:, :3] rgb + m[:, 3]
    # [B] standard deviation; from `on_device`: the noise itself, shaped as the frames.
    noise: Tensor | None
    cutout: Tensor | None  # [B, 2] centre (x, y) as fractions of the image; inf where not applied


class _Draws:
    """The random draws for a batch of clips, [B] each; in deterministic mode their values at a
    percentile.
    """

    def __init__(
        self, num_clips: int, p: float, generator: torch.Generator | None, percentile: float | None
    ):
        self.b, self.p, self.percentile = num_clips, p, percentile
        self.options = {"generator": generator, "dtype": torch.float64}

    def uniform(self) -> Tensor:
        if self.percentile is None:
            return torch.rand(self.b, **self.options)
        return torch.full((self.b,), self.percentile, dtype=torch.float64)

    def normal(self) -> Tensor:
        if self.percentile is None:
            return torch.randn(self.b, **self.options)
        # As is: the spec leaves out the √2 of the inverse CDF.
        return torch.erfinv(2 * self.uniform() - 1)

    def gate(
        self, value: Tensor, otherwise: Tensor | float, probability: float | None = None
    ) -> Tensor:
        """Clip by clip, `value` with the given probability (p unless stated), else `otherwise`."""
        if self.percentile is not None:
            return value
        chosen = self.uniform() < (self.p if probability is None else probability)
        return torch.where(chosen.view(-1, *[1] * (value.ndim - 1)), value, otherwise)


def draw(
    pipeline: str,
    p: float,
    num_clips: int,
    height: int,
    width: int,
    generator: torch.Generator | None = None,
    percentile: float | None = None,
) -> AugmentParams:
    """Draw the transforms of `num_clips` clips of `height` × `width` pixels, each applied with
    probability p (§8a).

    generator: on the CPU; it advances by the same amount whatever p is.
    percentile: deterministic mode, in which every transform applies and every draw sits at this
    percentile.
    """
    if pipeline not in PIPELINES:
        raise UserError(
            f"unknown augmentation pipeline {pipeline!r}; known: {', '.join(PIPELINES)}"
        )
    pipe, draws = PIPELINES[pipeline], _Draws(num_clips, p, generator, percentile)
    geometry = _draw_geometry(pipe, draws, height, width)
    color = _draw_color(draws) if pipe.color else None
    noise = draws.gate(0.1 * draws.normal().abs(), 0.0, p * pipe.noise) if pipe.noise else None
    cutout = (
        draws.gate(torch.stack([draws.uniform(), draws.uniform()], 1), math.inf)
        if pipe.cutout
        else None
    )
    return AugmentParams(geometry, color, noise, cutout)


def _affine(xx=1.0, xy=0.0, yx=0.0, yy=1.0, x=0.0, y=0.0) -> Tensor:
    """[[xx, xy, x], [yx, yy, y], [0, 0, 1]] in float64, from numbers and tensors [B]: [B, 3, 3], or
    [3, 3].
    """
    entries = [torch.as_tensor(e, dtype=torch.float64) for e in (xx, xy, x, yx, yy, y, 0, 0, 1)]
    return torch.stack(torch.broadcast_tensors(*entries), -1).unflatten(-1, (3, 3))


def _rotation(angle: Tensor) -> Tensor:
    return _affine(angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _draw_geometry(pipe: Pipeline, draws: _Draws, height: int, width: int) -> Tensor:
    """Geometric matrices [B, 3, 3]: the table of spec §8a, in its order, each multiplied on the
    right.
    """

    def rotation() -> Tensor:  # either of the two happens with p · multiplier
        angle = (2 * draws.uniform() - 1) * math.pi * pipe.rotate_max
        return draws.gate(_rotation(angle), _EYE, 1 - math.sqrt(1 - draws.p * pipe.rotate))

    g = draws.gate(_affine(xx=1 - 2 * (2 * draws.uniform()).floor()), _EYE)
    if pipe.rot90:
        g = g @ draws.gate(_rotation(math.pi / 2 * (4 * draws.uniform()).floor()), _EYE)
    x, y = (-(n * (2 * draws.uniform() - 1) / 8).round() for n in (width, height))
    g = g @ draws.gate(_affine(x=x, y=y), _EYE)
    s = torch.exp2(0.2 * draws.normal())
    g = g @ draws.gate(_affine(xx=1 / s, yy=1 / s), _EYE)
    if pipe.rotate:
        g = g @ rotation()
    if pipe.anisotropy:
        s = torch.exp2(0.2 * draws.normal())
        g = g @ draws.gate(_affine(xx=1 / s, yy=s), _EYE)
    if pipe.rotate and draws.percentile is None:  # 0 in deterministic mode
        g = g @ rotation()
    x, y = (-draws.normal() * n / 8 for n in (width, height))
    return g @ draws.gate(_affine(x=x, y=y), _EYE)


def _draw_color(draws: _Draws) -> Tensor:
    """Colour matrices [B, 3, 4], a linear map and an offset: in the spec's order, each multiplied
    on the left.
    """
    vv = torch.full((3, 3), 1 / 3, dtype=torch.float64)  # v vᵀ with v = (1, 1, 1)/√3, the luma axis
    # cross @ a = v × a.
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
    brightness = draws.gate(0.2 * draws.normal(), 0.0)
    m = draws.gate(torch.exp2(0.5 * draws.normal())[:, None, None] * _EYE, _EYE)  # contrast
    # Luma flip.
    m = draws.gate(_EYE - 2 * vv * (2 * draws.uniform()).floor()[:, None, None], _EYE) @ m
    angle = ((2 * draws.uniform() - 1) * math.pi)[:, None, None]
    m = draws.gate(vv + angle.cos() * (_EYE - vv) + angle.sin() * cross, _EYE) @ m  # hue
    # Saturation.
    m = draws.gate(vv + torch.exp2(draws.normal())[:, None, None] * (_EYE - vv), _EYE) @ m
    # Brightness is first: m (rgb + b).
    return torch.cat([m, brightness[:, None, None] * m.sum(2, keepdim=True)], 2)


def apply(
    frames: Tensor, params: AugmentParams, generator: torch.Generator | None = None
) -> Tensor:
    """Augment frames [B, T*3, H, W] in [-1, 1]; the T frames of a clip are transformed alike.

    Twice differentiable in the frames (R1). A clip whose every draw is the identity comes out
    bit-exact. generator: for the pixel noise, on the frames' device.
    """
    frames = _full(frames)
    params = on_device(params, frames.shape, frames.device, frames.dtype, generator)
    return recolor(resample(frames, params.geometry), params)


def _full(
    frames: Tensor,
) -> Tensor:  # half precision cannot tell one pixel's coordinate from the next
    return frames.float() if frames.dtype in (torch.float16, torch.bfloat16) else frames


def on_device(
    params: AugmentParams, shape, device, dtype=torch.float32, generator=None
) -> AugmentParams:
    """The draw ready for frames of this shape [B, T*3, H, W]: colors and cutout there, pixel noise
    drawn there.
    """
    _, color, noise, cutout = (
        None if p is None else p.to(device, dtype, non_blocking=True) for p in params
    )
    if noise is not None:
        noise = noise[:, None, None, None] * torch.randn(
            shape, generator=generator, device=device, dtype=dtype
        )
    return AugmentParams(params.geometry, color, noise, cutout)


def recolor(frames: Tensor, params: AugmentParams) -> Tensor:
    """All but the geometry, in plain ops. params: from `on_device`."""
    if params.color is not None:
        m = params.color[:, None, :, :, None, None]  # [B, 1, 3, 4, 1, 1]
        r, g, b = frames.unflatten(1, (-1, 1, 3)).unbind(3)  # [B, T, 1, H, W] each
        frames = (
            m[:, :, :, 0] * r + m[:, :, :, 1] * g + m[:, :, :, 2] * b + m[:, :, :, 3]
        ).flatten(1, 2)
    if params.noise is not None:
        frames = frames + params.noise
    if params.cutout is not None:
        sizes, centres = (frames.shape[3], frames.shape[2]), params.cutout.unbind(1)
        cut_x, cut_y = (
            (_centred(n, frames) / n + 0.5 - centre[:, None]).abs() < 1 / 8
            for n, centre in zip(sizes, centres, strict=True)
        )
        frames = frames.masked_fill((cut_y[:, :, None] & cut_x[:, None, :])[:, None], 0.0)
    return frames


@torch.library.custom_op("mostgan::resample", mutates_args=())
def _resample_op(frames: Tensor, geometry: Tensor, transposed: bool) -> Tensor:
    with torch.autocast(frames.device.type, enabled=False):
        return _resample(frames, geometry, transposed)


@_resample_op.register_fake
def _(frames, geometry, transposed):
    return frames.new_empty(frames.shape)


def _save_geometry(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.transposed = inputs[2]


def _resample_backward(ctx, grad):
    return _resample_op(grad, *ctx.saved_tensors, not ctx.transposed), None, None


_resample_op.register_autograd(_resample_backward, setup_context=_save_geometry)


def resample(frames: Tensor, geometry: Tensor, transposed: bool = False) -> Tensor:
    """Transform frames [B, C, H, W] by geometry [B, 3, 3] (on the host), or apply the transpose of
    that linear map.

    Each is the other's gradient: differentiable any number of times, which R1 needs and grid_sample
    is not.
    """
    return _resample_op(_full(frames), geometry, transposed)


def _send(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.device, like.dtype, non_blocking=True)


def _resample(frames: Tensor, geometry: Tensor, transposed: bool) -> Tensor:
    """`resample`: 2× finer by sym6, sampled bilinearly, 2× coarser (§8a).

    All of it is linear. Where a clip is not turned it is even separable: a matrix [H, H] and a
    matrix [W, W].
    """
    moves = (geometry != _EYE).flatten(1).any(1)
    if not moves.any():
        return frames.clone(memory_format=torch.contiguous_format)
    sizes = frames.shape[2:]
    up, down = [_up_matrix(n, frames) for n in sizes], [_down_matrix(n, frames) for n in sizes]
    # Output to input in pixels of the finer images, which lie half a pixel off.
    fine = (
        _affine(x=-0.5, y=-0.5)
        @ _affine(2, yy=2)
        @ geometry
        @ _affine(0.5, yy=0.5)
        @ _affine(x=0.5, y=0.5)
    )
    axes = []
    for i, n, u, d in zip((1, 0), sizes, up, down, strict=True):
        line = _send(fine[:, i], frames)[:, :, None]  # [B, 3, 1]
        at = (line[:, i] * _centred(2 * (n + 6), frames) + line[:, 2] + 3 * n - 0.5).clamp(
            0, 6 * n - 1
        )
        low = at.long().clamp(max=6 * n - 2)
        axis = d @ u[low].lerp(u[low + 1], (at - low)[:, :, None])
        axes.append(axis.mT if transposed else axis)
    out = torch.einsum("bchw,byh,bxw->bcyx", frames, *axes)
    turned = (geometry[:, [0, 1], [1, 0]].abs().amax(1) > 1e-9).nonzero()[:, 0]
    if len(turned):
        index = turned.to(frames.device, non_blocking=True)
        of_turned = _resample_turned(
            frames.index_select(0, index), fine[turned], up, down, transposed
        )
        out = out.index_copy(0, index, of_turned)
    return torch.where(_send(moves, frames)[:, None, None, None] > 0, out, frames).contiguous()


def _resample_turned(
    frames: Tensor, fine: Tensor, up: list[Tensor], down: list[Tensor], transposed: bool
) -> Tensor:
    """The same for any geometry, given between the pixels of the finer images, [B, 3, 3].

    Of the finer input, a window is made that holds all samples of every clip and follows the clip's
    translation.
    """
    height, width = frames.shape[2:]
    size = torch.tensor([width, height])
    # How far the samples reach; 2 more to round and to interpolate.
    reach = fine[:, :2, :2].abs() @ (size + 6.0).double() + 2
    # Three images, mirrored at their edges, hold all there is.
    window = torch.minimum(2 * reach.amax(0).ceil().long(), 6 * size)
    centre = fine[:, :2, 2].round().long().clamp(window // 2 - 3 * size, 3 * size - window // 2)
    up_x, up_y = (
        u[(c[:, None] + (len(u) - k) // 2 + torch.arange(k)).to(u.device, non_blocking=True)]
        for u, k, c in zip(reversed(up), window.tolist(), centre.unbind(1), strict=True)
    )  # [B, window x, W], [B, window y, H]
    # To grid_sample's coordinates: -1 and 1 are the borders of the window.
    x, y = 2 / window.double()
    g = _send(_affine(x, yy=y) @ _affine(x=-centre[:, 0], y=-centre[:, 1]) @ fine, frames)[
        ..., None, None
    ]
    x, y = _centred(2 * (width + 6), frames), _centred(2 * (height + 6), frames)[:, None]
    grid = torch.stack([g[:, i, 0] * x + g[:, i, 1] * y + g[:, i, 2] for i in (0, 1)], -1)
    if not transposed:
        image = torch.einsum("bchw,byh,bxw->bcyx", frames, up_y, up_x)
        return down[0] @ torch.ops.aten.grid_sampler_2d(image, grid, 0, 0, False) @ down[1].T
    grad, size = down[0].T @ frames @ down[1], window.flip(0).tolist()
    if torch.are_deterministic_algorithms_enabled():
        image = _spread(grad, grid, size)
    else:
        image = frames.new_zeros(()).expand(*frames.shape[:2], *size)  # only its shape matters
        image = torch.ops.aten.grid_sampler_2d_backward(
            grad, image, grid, 0, 0, False, (True, False)
        )[0]
    return torch.einsum("bcyx,byh,bxw->bchw", image, up_y, up_x)


def _spread(values: Tensor, grid: Tensor, size: list[int]) -> Tensor:
    """Transpose of bilinear grid_sampler_2d: values [B, C, h, w] at grid [B, h, w, 2] → images [B,
    C, *size].

    By scatter_add, which has a deterministic form on a GPU, as grid_sampler_2d's own backward has
    not.
    """
    height, width = size
    x, y = ((grid[..., i] + 1) * n / 2 - 0.5 for i, n in enumerate((width, height)))
    image = values.new_zeros(*values.shape[:2], height * width)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = x.floor() + dx, y.floor() + dy
        weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
        weight = weight * ((column >= 0) & (column < width) & (row >= 0) & (row < height))
        index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
        image.scatter_add_(
            2,
            index.flatten(1)[:, None].expand(-1, values.shape[1], -1),
            (values * weight[:, None]).flatten(2),
        )
    return image.unflatten(2, size)


def _centred(n: int, like: Tensor) -> Tensor:
    """Coordinates of n pixels in a row, 0 in the middle."""
    return torch.arange(0.5 - n / 2, n / 2, device=like.device, dtype=like.dtype)


def _taps(index: Tensor, like: Tensor) -> Tensor:
    """The filter's tap at each integer index, 0 outside."""
    taps = _send(_SYM6 / _SYM6.sum(), like)
    return torch.where((index >= 0) & (index < len(taps)), taps[index.clamp(0, len(taps) - 1)], 0.0)


def _up_matrix(n: int, like: Tensor) -> Tensor:
    """[6 n, n], from n pixels to 2× finer ones, from 2 n before the image to 2 n after it:
    reflect-pad by n - 1, insert zeros, convolve with the filter (padding 6, 5; gain 2).
    """
    row = torch.arange(-2 * n, 4 * n, device=like.device)[:, None]
    pixel = torch.arange(n, device=like.device)
    matrix = _taps(row + 5 - 2 * pixel, like)
    matrix[:, 1:] += _taps(row + 5 + 2 * pixel[1:], like)  # the pixel's mirror images, at -pixel
    # And at 2 (n - 1) - pixel.
    matrix[:, :-1] += _taps(row + 5 - 2 * (2 * n - 2 - pixel[:-1]), like)
    return 2 * matrix * ((row >= 2 - 2 * n) & (row < 4 * n - 2))  # nothing beyond the padding


def _down_matrix(n: int, like: Tensor) -> Tensor:
    """[n, 2 (n + 6)]: crop a pixel a side, correlate with the filter, keep even pixels."""
    column = torch.arange(2 * (n + 6), device=like.device)
    return _taps(column - 1 - 2 * torch.arange(n, device=like.device)[:, None], like)


def update_p(
    p: float,
    mean_sign: float,
    batch_clips: int,
    interval: int = 4,
    target: float = 0.6,
    kclips: float = 100,
) -> float:
    """ADA's controller, called every `interval` steps with the mean sign of D's logits on real
    clips (spec §8).
    """
    step = batch_clips * interval / (kclips * 1000)
    return min(max(p + step * ((mean_sign > target) - (mean_sign < target)), 0.0), 1.0)
