"""The low-pass filter of spec §1, plain, up and down; and what follows a synthesis convolution
(spec §6), in one pass:

    u = fir(x) after a transposed convolution, else x
    z = u · demod + bias,   y = clamp(√2 · leaky_relu(z))

The filter is the outer product of (1,3,3,1)/8 with itself. Resampling is linear: its gradient is
the same op transposed, to any order. The epilogue's gradient needs y, but neither x nor u:

    ∂z = ∂y · y/z (0 where clamped),   ∂x = firᵀ(∂z · demod)
    ∂bias = Σ ∂z,   ∂demod = Σ ∂z u = (Σ ∂z z − bias Σ ∂z) / demod

That is one pass as well. A program filters a strip of columns downwards, reads every row once (four
shifted loads, three of them from the cache) and keeps the last four filtered rows in registers.
Memory is channels last; sums are float32, first in a strip and then over strips, so runs repeat
exactly.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.choose import Op

# Pixels across, channels and rows of a strip; pixels and channels of a resampled tile; warps.
# Chosen from the resource report of `bench/kernels.py --aot`; not yet timed.
STRIP, TILE, WARPS = (16, 64, 16), (32, 64), 8
GAIN, SLOPE = tl.constexpr(math.sqrt(2)), tl.constexpr(0.2)


class Filter(NamedTuple):
    """What the kernels know of a call. Their inputs are [N, H, W, C], their results [N, H_OUT,
    W_OUT, C]; the backward kernel's the other way round.
    """

    H: int
    W: int
    H_OUT: int
    W_OUT: int
    C: int
    SCALE: tl.constexpr = tl.constexpr(1.0)  # gain / 64
    PAD: tl.constexpr = tl.constexpr(0)
    FILTER: tl.constexpr = tl.constexpr(True)
    UP: tl.constexpr = tl.constexpr(False)
    ACTIVATE: tl.constexpr = tl.constexpr(False)
    CLAMPS: tl.constexpr = tl.constexpr(False)
    CLAMP: tl.constexpr = tl.constexpr(0.0)
    BLOCK_X: tl.constexpr = tl.constexpr(1)  # the tile: columns, or pixels; channels; rows
    BLOCK_C: tl.constexpr = tl.constexpr(1)
    ROWS: tl.constexpr = tl.constexpr(1)


@triton.jit
def _inside(y, x, c, H, W, C):
    """Which of pixels (y, x) and channels c exist → [len(x), len(c)]."""
    y += tl.zeros_like(x)
    return ((x >= 0) & (x < W) & (y >= 0) & (y < H))[:, None] & (c < C)[None, :]


@triton.jit
def _filtered(x_ptr, y, x, c, S):
    """Row y filtered across, times 8: Σ_d (1,3,3,1)[d] x[y, x + d − PAD, c] → [len(x), len(c)].
    Zero outside.
    """
    h = tl.zeros([x.shape[0], c.shape[0]], tl.float32)
    for d in tl.static_range(4):
        at = x + d - S.PAD
        address = (y * S.W + at)[:, None] * S.C + c[None, :]
        v = tl.load(x_ptr + address, mask=_inside(y, at, c, S.H, S.W, S.C), other=0.0).to(
            tl.float32
        )
        h += v * (1 + d * (3 - d))  # (1,3,3,1)[d]
    return h


@triton.jit
def of_channels(demod_ptr, bias_ptr, n, c, C):
    """demod and bias of channels c in frame n → [1, len(c)] each."""
    demod = tl.load(demod_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return demod[None, :], bias[None, :]


@triton.jit
def activated(v, demod, bias, S):
    """clamp(√2 · leaky_relu(v · demod + bias)) for v [pixels, channels]."""
    v = v * demod + bias
    v = tl.maximum(v, v * SLOPE) * GAIN
    if S.CLAMPS:
        v = tl.minimum(tl.maximum(v, -S.CLAMP), S.CLAMP)
    return v


@triton.jit
def _epilogue_kernel(x_ptr, demod_ptr, bias_ptr, y_ptr, S):
    """Filter with gain SCALE, activation, or both. Grid: blocks of columns × channels, strips of
    rows, frames.
    """
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) % tl.cdiv(S.C, S.BLOCK_C) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    x = tl.program_id(0) // tl.cdiv(S.C, S.BLOCK_C) * S.BLOCK_X + tl.arange(0, S.BLOCK_X)
    x_ptr += n * S.H * S.W * S.C
    top = tl.program_id(1) * S.ROWS
    if S.FILTER:
        h0 = _filtered(x_ptr, top - S.PAD, x, c, S)
        h1 = _filtered(x_ptr, top - S.PAD + 1, x, c, S)
        h2 = _filtered(x_ptr, top - S.PAD + 2, x, c, S)
    if S.ACTIVATE:
        demod, bias = of_channels(demod_ptr, bias_ptr, n, c, S.C)
    for row in range(S.ROWS):
        y = top + row
        if S.FILTER:
            h3 = _filtered(x_ptr, y - S.PAD + 3, x, c, S)
            v = (h0 + h3 + 3.0 * (h1 + h2)) * S.SCALE
            h0, h1, h2 = h1, h2, h3
        else:
            inside = _inside(y, x, c, S.H, S.W, S.C)
            address = (y * S.W + x)[:, None] * S.C + c[None, :]
            v = tl.load(x_ptr + address, mask=inside, other=0.0).to(tl.float32)
        if S.ACTIVATE:
            v = activated(v, demod, bias, S)
        address = n * S.H_OUT * S.W_OUT * S.C + (y * S.W_OUT + x)[:, None] * S.C + c[None, :]
        inside = _inside(y, x, c, S.H_OUT, S.W_OUT, S.C)
        tl.store(y_ptr + address, v.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _resample_kernel(x_ptr, y_ptr, S):
    """Filter and keep every second pixel; or UP, its transpose. Grid: blocks of pixels, of
    channels, frames.
    """
    n = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * S.BLOCK_X + tl.arange(0, S.BLOCK_X)
    c = tl.program_id(1) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    y, x = pixel // S.W_OUT, pixel % S.W_OUT
    total = tl.zeros([S.BLOCK_X, S.BLOCK_C], tl.float32)
    TAPS: tl.constexpr = 2 if S.UP else 4
    for a in range(TAPS):
        for b in tl.static_range(TAPS):
            if (
                S.UP
            ):  # y + PAD = 2 · row + dy, so dy has the parity of y + PAD: two taps out of four
                row, column = (y + S.PAD) // 2 - a, (x + S.PAD) // 2 - b
                dy, dx = (y + S.PAD) % 2 + 2 * a, (x + S.PAD) % 2 + 2 * b
            else:
                row, column = 2 * y + a - S.PAD, 2 * x + b - S.PAD
                dy, dx = a + tl.zeros_like(y), b + tl.zeros_like(x)
            f = (1 + dy * (3 - dy)) * (1 + dx * (3 - dx))  # (1,3,3,1)[d] = 1 + d (3 − d)
            inside = _inside(row, column, c, S.H, S.W, S.C) & (y < S.H_OUT)[:, None]
            address = n * S.H * S.W * S.C + (row * S.W + column)[:, None] * S.C + c[None, :]
            v = tl.load(x_ptr + address, mask=inside, other=0.0).to(tl.float32)
            total += f.to(tl.float32)[:, None] * v
    address = (n * S.H_OUT * S.W_OUT + pixel)[:, None] * S.C + c[None, :]
    inside = (y < S.H_OUT)[:, None] & (c < S.C)[None, :]
    tl.store(y_ptr + address, (total * S.SCALE).to(y_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------- backward


@triton.jit
def _gradient_of_z(grad_ptr, out_ptr, y, x, c, S):
    """∂z and ∂z · z of pixels (y, x) from ∂y and y; zero outside."""
    inside = _inside(y, x, c, S.H_OUT, S.W_OUT, S.C)
    address = (y * S.W_OUT + x)[:, None] * S.C + c[None, :]
    grad = tl.load(grad_ptr + address, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + address, mask=inside, other=0.0).to(tl.float32)
    if S.CLAMPS:
        grad = tl.where(tl.abs(out) < S.CLAMP, grad, 0.0)
    # leaky_relu is homogeneous: ∂z z = ∂y y
    return grad * tl.where(out > 0, GAIN, GAIN * SLOPE), grad * out


@triton.jit
def _filtered_gradient(grad_ptr, out_ptr, y, x, c, S):
    """`_filtered` of ∂z, padded by 2 as the transpose of padding by 1 is; and ∂z and ∂z · z of the
    row itself.
    """
    h = tl.zeros([x.shape[0], c.shape[0]], tl.float32)
    own, own_z = h, h
    for d in tl.static_range(4):
        grad_z, grad_zz = _gradient_of_z(grad_ptr, out_ptr, y, x + d - 2, c, S)
        h += grad_z * (1 + d * (3 - d))
        if d == 2:
            own, own_z = grad_z, grad_zz
    return h, own, own_z


@triton.jit
def _epilogue_backward_kernel(grad_ptr, out_ptr, demod_ptr, grad_x_ptr, sums_ptr, S):
    """∂y [H_OUT, W_OUT] → ∂x [H, W], and Σ ∂z, Σ ∂z z of the strip → sums [2, N, strips, C]. Grid:
    as forward.

    Sums count the strip's own pixels, which its window reads anyway.
    """
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) % tl.cdiv(S.C, S.BLOCK_C) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    across = tl.program_id(0) // tl.cdiv(S.C, S.BLOCK_C)
    x = across * S.BLOCK_X + tl.arange(0, S.BLOCK_X)
    grad_ptr += n * S.H_OUT * S.W_OUT * S.C
    out_ptr += n * S.H_OUT * S.W_OUT * S.C
    top = tl.program_id(1) * S.ROWS
    demod = tl.load(demod_ptr + n * S.C + c, mask=c < S.C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([S.BLOCK_X, S.BLOCK_C], tl.float32)
    total_z = total
    if S.FILTER:
        h0, _, _ = _filtered_gradient(grad_ptr, out_ptr, top - 2, x, c, S)
        h1, _, _ = _filtered_gradient(grad_ptr, out_ptr, top - 1, x, c, S)
        h2, total, total_z = _filtered_gradient(grad_ptr, out_ptr, top, x, c, S)
    for row in range(S.ROWS):
        y = top + row
        if S.FILTER:
            h3, own, own_z = _filtered_gradient(grad_ptr, out_ptr, y + 1, x, c, S)
            v = (h0 + h3 + 3.0 * (h1 + h2)) * S.SCALE
            h0, h1, h2 = h1, h2, h3
            mine = y + 1 < top + S.ROWS
            total, total_z = total + tl.where(mine, own, 0.0), total_z + tl.where(mine, own_z, 0.0)
        else:
            v, own_z = _gradient_of_z(grad_ptr, out_ptr, y, x, c, S)
            total, total_z = total + v, total_z + own_z
        address = n * S.H * S.W * S.C + (y * S.W + x)[:, None] * S.C + c[None, :]
        inside = _inside(y, x, c, S.H, S.W, S.C)
        tl.store(grad_x_ptr + address, (v * demod).to(grad_x_ptr.dtype.element_ty), mask=inside)
    strips = tl.num_programs(1) * tl.cdiv(S.W, S.BLOCK_X)
    address = (n * strips + tl.program_id(1) * tl.cdiv(S.W, S.BLOCK_X) + across) * S.C + c
    tl.store(sums_ptr + address, tl.sum(total, axis=0), mask=c < S.C)
    address += tl.num_programs(2) * strips * S.C
    tl.store(sums_ptr + address, tl.sum(total_z, axis=0), mask=c < S.C)


# -------------------------------------------------------------------------- launchers, registration


def _channels_last(x):
    """[N, C, H, W] → contiguous [N, H, W, C]: nothing to do for a tensor in channels-last
    memory.
    """
    return x.permute(0, 2, 3, 1).contiguous()


def _constants(**values):
    """Values that are compiled in."""
    return {name: tl.constexpr(value) for name, value in values.items()}


def _strips(H, W, C):
    """Tile of the strip kernels, and their grid but for the frames."""
    tile = [min(most, triton.next_power_of_2(size)) for most, size in zip(STRIP, (W, C, H))]
    grid = triton.cdiv(W, tile[0]) * triton.cdiv(C, tile[1]), triton.cdiv(H, tile[2])
    return grid, _constants(BLOCK_X=tile[0], BLOCK_C=tile[1], ROWS=tile[2])


def _clamps(clamp):
    return _constants(CLAMPS=clamp is not None, CLAMP=float(clamp or 0))


def _fir_size(size, stride, padding, transposed):
    if transposed:
        return (size - 1) * stride + 4 - 2 * padding
    return (size + 2 * padding - 4) // stride + 1


def fir_launch(x, gain, stride, padding, transposed):
    """See `fir_op`. x: [N, C, H, W] → [N, C, H', W'] in channels-last memory."""
    N, C, H, W = x.shape
    H_out, W_out = (_fir_size(size, stride, padding, transposed) for size in (H, W))
    x, scale = _channels_last(x), _constants(SCALE=gain / 64)
    y = torch.empty([N, H_out, W_out, C], device=x.device, dtype=x.dtype)
    if (
        stride == 1
    ):  # the transpose of a symmetric filter is the filter with the rest of the padding
        grid, tile = _strips(H_out, W_out, C)
        pad = _constants(PAD=3 - padding if transposed else padding)
        S = Filter(H, W, H_out, W_out, C, **scale, **pad, **tile)
        _epilogue_kernel[(*grid, N)](x, x, x, y, S, num_warps=WARPS)
    else:
        pixels, channels = TILE[0], min(TILE[1], triton.next_power_of_2(C))
        settings = _constants(PAD=padding, UP=transposed, BLOCK_X=pixels, BLOCK_C=channels)
        grid = triton.cdiv(H_out * W_out, pixels), triton.cdiv(C, channels), N
        S = Filter(H, W, H_out, W_out, C, **scale, **settings)
        _resample_kernel[grid](x, y, S, num_warps=WARPS)
    return y.permute(0, 3, 1, 2)


def epilogue_launch(x, demod, bias, up, clamp):
    """See `epilogue`."""
    N, C, H, W = x.shape
    H_out, W_out = (H - 1, W - 1) if up == 2 else (H, W)
    y = torch.empty([N, H_out, W_out, C], device=x.device, dtype=x.dtype)
    grid, tile = _strips(H_out, W_out, C)
    settings = _constants(SCALE=1 / 16, PAD=1, FILTER=up == 2, ACTIVATE=True)
    S = Filter(H, W, H_out, W_out, C, **settings, **_clamps(clamp), **tile)
    inputs = _channels_last(x), demod.contiguous(), bias.contiguous()
    _epilogue_kernel[(*grid, N)](*inputs, y, S, num_warps=WARPS)
    return y.permute(0, 3, 1, 2)


def epilogue_backward_launch(grad, y, demod, bias, up, clamp):
    """Gradients of x, demod and bias from ∂y and y."""
    N, C, H_out, W_out = y.shape
    H, W = (H_out + 1, W_out + 1) if up == 2 else (H_out, W_out)
    grid, tile = _strips(H, W, C)
    strips = grid[1] * triton.cdiv(W, tile["BLOCK_X"].value)
    grad_x = torch.empty([N, H, W, C], device=y.device, dtype=y.dtype)
    sums = torch.empty([2, N, strips, C], device=y.device, dtype=torch.float32)
    settings = _constants(SCALE=1 / 16, FILTER=up == 2)
    S = Filter(H, W, H_out, W_out, C, **settings, **_clamps(clamp), **tile)
    inputs = _channels_last(grad), _channels_last(y), demod.contiguous()
    _epilogue_backward_kernel[(*grid, N)](*inputs, grad_x, sums, S, num_warps=WARPS)
    total, total_z = sums.sum(dim=2)
    grad_demod = ((total_z - bias.float() * total) / demod.float()).to(demod.dtype)
    return grad_x.permute(0, 3, 1, 2), grad_demod, total.sum(dim=0).to(bias.dtype)


def float32_twin(function):
    """A plain function as the twin of an op: computed in float32, results in the first argument's
    dtype and in channels-last memory.
    """

    def twin(*args):
        dtype = args[0].dtype
        out = function(
            *(a.float() if torch.is_tensor(a) and dtype != torch.float64 else a for a in args)
        )
        return out.to(dtype, memory_format=torch.channels_last)

    return twin


FIR = Op("fir", float32_twin(reference.fir_filter), {"Triton": fir_launch})


@torch.library.custom_op("mostgan::fir", mutates_args=())
def fir_op(x: Tensor, gain: float, stride: int, padding: int, transposed: bool) -> Tensor:
    """`reference.fir_filter` as an op of PyTorch's: filter and keep every stride-th pixel, or the
    transpose of that.
    """
    return FIR(x, gain, stride, padding, transposed)


@fir_op.register_fake
def _(x, gain, stride, padding, transposed):
    H, W = (_fir_size(size, stride, padding, transposed) for size in x.shape[2:])
    return x.new_empty([x.shape[0], H, W, x.shape[1]]).permute(0, 3, 1, 2)


def _save_fir(ctx, inputs, output):
    ctx.settings = inputs[1:]


def _fir_backward(ctx, grad):
    gain, stride, padding, transposed = ctx.settings
    return fir_op(grad, gain, stride, padding, not transposed), None, None, None, None


fir_op.register_autograd(_fir_backward, setup_context=_save_fir)


def _backward_twin(grad, y, demod, bias, up, clamp):
    tensors = (a.float() for a in (grad, y, demod, bias))
    grad_x, grad_demod, grad_bias = reference.epilogue_backward(*tensors, up, clamp)
    grad_x = grad_x.to(y.dtype, memory_format=torch.channels_last)
    return grad_x, grad_demod.to(demod.dtype), grad_bias.to(bias.dtype)


EPILOGUE = Op("epilogue", float32_twin(reference.epilogue), {"Triton": epilogue_launch})
EPILOGUE_BACKWARD = Op("epilogue_backward", _backward_twin, {"Triton": epilogue_backward_launch})


@torch.library.custom_op("mostgan::epilogue", mutates_args=())
def epilogue_op(x: Tensor, demod: Tensor, bias: Tensor, up: int, clamp: float | None) -> Tensor:
    """`epilogue` as an op of PyTorch's, opaque to the compiler."""
    return EPILOGUE(x, demod, bias, up, clamp)


@epilogue_op.register_fake
def _(x, demod, bias, up, clamp):
    N, C, H, W = x.shape
    return x.new_empty([N, H - (up == 2), W - (up == 2), C]).permute(0, 3, 1, 2)


@torch.library.custom_op("mostgan::epilogue_backward", mutates_args=())
def epilogue_backward_op(
    grad: Tensor, y: Tensor, demod: Tensor, bias: Tensor, up: int, clamp: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `epilogue` to x, demod and bias as an op of PyTorch's."""
    return EPILOGUE_BACKWARD(grad, y, demod, bias, up, clamp)


@epilogue_backward_op.register_fake
def _(grad, y, demod, bias, up, clamp):
    N, C, H, W = y.shape
    grad_x = y.new_empty([N, H + (up == 2), W + (up == 2), C]).permute(0, 3, 1, 2)
    return grad_x, demod.new_empty(demod.shape), bias.new_empty(bias.shape)


def _save_epilogue(ctx, inputs, output):
    _, demod, bias, ctx.up, ctx.clamp = inputs
    ctx.save_for_backward(output, demod, bias)


def _epilogue_backward(ctx, grad):
    return *epilogue_backward_op(grad, *ctx.saved_tensors, ctx.up, ctx.clamp), None, None


epilogue_op.register_autograd(_epilogue_backward, setup_context=_save_epilogue)


def epilogue(x, demod, bias, up=1, clamp=None):
    """What follows a synthesis convolution: √2 · leaky_relu(fir(x) · demod + bias), clamped to
    ±clamp if given.

    x: [N, C, H, W] in any layout; with up=2, of the transposed convolution: filtered with gain 4 to
    H-1 × W-1.
    demod: [N, C], bias: [C]. Returns y in x's dtype, channels-last memory. Differentiable once.
    """
    return epilogue_op(x, demod, bias, up, None if clamp is None else float(clamp))
