"""The low-pass filter of spec §1, plain, up and down; and what follows a synthesis convolution
(spec §6), in one pass:

    u = fir(x) after a transposed convolution, else x
    z = u · demod + bias,   y = clamp(√2 · leaky_relu(z))

The filter is the outer product of (1,3,3,1)/8 with itself. Resampling is linear: its gradient is
the same op transposed, to any order. The epilogue's gradient needs y, but neither x nor u:

    ∂z = ∂y · y/z (0 where clamped),   ∂x = firᵀ(∂z · demod)
    ∂bias = Σ ∂z,   ∂demod = Σ ∂z u = Σ ∂z (z − bias) / demod

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

from kernels import reference
from kernels.choose import Op, registered
from kernels.launch import channels_first, channels_last, clamps, constants, edge, float32_twin

# Pixels across, channels and rows of a strip; pixels and channels of a resampled tile; warps.
# Chosen from the resource report of `bench/kernels.py --aot`; not yet timed.
STRIP, TILE, WARPS = (16, 64, 16), (32, 64), 8
GAIN, SLOPE = tl.constexpr(math.sqrt(2)), tl.constexpr(0.2)


class Filter(NamedTuple):
    """What the kernels know of a call, from [N, H, W, C] to [N, H_OUT, W_OUT, C], or backward."""

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
def _pixels(y, x, c, H, W, C):
    """Address of pixels (y, x) and channels c in [H, W, C], and which exist: [len(x), len(c)]."""
    y += tl.zeros_like(x)
    inside = ((x >= 0) & (x < W) & (y >= 0) & (y < H))[:, None] & (c < C)[None, :]
    return (y * W + x)[:, None] * C + c[None, :], inside


@triton.jit
def _load(x_ptr, y, x, c, H, W, C):
    """Pixels (y, x) of [H, W, C] in float32, zero outside."""
    address, inside = _pixels(y, x, c, H, W, C)
    return tl.load(x_ptr + address, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(y_ptr, v, y, x, c, H, W, C):
    address, inside = _pixels(y, x, c, H, W, C)
    tl.store(y_ptr + address, v.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _strip(S):
    """A program's frame, columns, channels, first row. Grid: columns × channels, rows, frames."""
    blocks = tl.cdiv(S.C, S.BLOCK_C)
    c = tl.program_id(0) % blocks * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    x = tl.program_id(0) // blocks * S.BLOCK_X + tl.arange(0, S.BLOCK_X)
    return tl.program_id(2).to(tl.int64), x, c, tl.program_id(1) * S.ROWS


@triton.jit
def _filtered(x_ptr, y, x, c, S):
    """Row y filtered across, times 8: Σ_d (1,3,3,1)[d] x[y, x + d − PAD, c] → [len(x), len(c)]."""
    h = tl.zeros([x.shape[0], c.shape[0]], tl.float32)
    for d in tl.static_range(4):  # (1,3,3,1)[d] = 1 + d (3 − d)
        h += _load(x_ptr, y, x + d - S.PAD, c, S.H, S.W, S.C) * (1 + d * (3 - d))
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
    """Filter with gain SCALE, activation, or both. Grid: `_strip`."""
    n, x, c, top = _strip(S)
    x_ptr += n * S.H * S.W * S.C
    y_ptr += n * S.H_OUT * S.W_OUT * S.C
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
            v = _load(x_ptr, y, x, c, S.H, S.W, S.C)
        if S.ACTIVATE:
            v = activated(v, demod, bias, S)
        _store(y_ptr, v, y, x, c, S.H_OUT, S.W_OUT, S.C)


@triton.jit
def _resample_kernel(x_ptr, y_ptr, S):
    """Filter and keep every second pixel; or UP, its transpose. Grid: pixels, channels, frames."""
    n = tl.program_id(2).to(tl.int64)
    x_ptr += n * S.H * S.W * S.C
    y_ptr += n * S.H_OUT * S.W_OUT * S.C
    pixel = tl.program_id(0) * S.BLOCK_X + tl.arange(0, S.BLOCK_X)
    c = tl.program_id(1) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    y, x = pixel // S.W_OUT, pixel % S.W_OUT
    total = tl.zeros([S.BLOCK_X, S.BLOCK_C], tl.float32)
    TAPS: tl.constexpr = 2 if S.UP else 4
    for a in range(TAPS):
        for b in tl.static_range(TAPS):
            if S.UP:  # y + PAD = 2 row + dy, so dy has the parity of y + PAD: two taps of four
                row, column = (y + S.PAD) // 2 - a, (x + S.PAD) // 2 - b
                dy, dx = (y + S.PAD) % 2 + 2 * a, (x + S.PAD) % 2 + 2 * b
            else:
                row, column = 2 * y + a - S.PAD, 2 * x + b - S.PAD
                dy, dx = a + tl.zeros_like(y), b + tl.zeros_like(x)
            f = (1 + dy * (3 - dy)) * (1 + dx * (3 - dx))  # (1,3,3,1)[d] = 1 + d (3 − d)
            v = _load(x_ptr, row, column, c, S.H, S.W, S.C)
            total += f.to(tl.float32)[:, None] * v
    _store(y_ptr, total * S.SCALE, y, x, c, S.H_OUT, S.W_OUT, S.C)


@triton.jit
def _gradient_of_z(grad_ptr, out_ptr, bias, y, x, c, S):
    """∂z and ∂z · (z − bias) of pixels (y, x) from ∂y and y; zero outside."""
    grad = _load(grad_ptr, y, x, c, S.H_OUT, S.W_OUT, S.C)
    out = _load(out_ptr, y, x, c, S.H_OUT, S.W_OUT, S.C)
    if S.CLAMPS:
        grad = tl.where(tl.abs(out) < S.CLAMP, grad, 0.0)
    grad *= tl.where(out > 0, GAIN, GAIN * SLOPE)
    # Bias is taken off pixel by pixel: off the sum, it would take leading digits with it.
    z = tl.where(out > 0, out, out / SLOPE) / GAIN
    return grad, grad * (z - bias)


@triton.jit
def _filtered_gradient(grad_ptr, out_ptr, bias, y, x, c, S):
    """`_filtered` of ∂z, padded by 2 for the transpose; and the row's own `_gradient_of_z`."""
    h = tl.zeros([x.shape[0], c.shape[0]], tl.float32)
    own, own_u = h, h
    for d in tl.static_range(4):
        grad, grad_u = _gradient_of_z(grad_ptr, out_ptr, bias, y, x + d - 2, c, S)
        h += grad * (1 + d * (3 - d))
        if d == 2:
            own, own_u = grad, grad_u
    return h, own, own_u


@triton.jit
def _add(total, lost, v):
    """total + v, and what rounding takes from it, to be taken off the next v (Kahan's sum)."""
    v -= lost
    new = total + v
    return new, new - total - v


@triton.jit
def _epilogue_backward_kernel(grad_ptr, out_ptr, demod_ptr, bias_ptr, grad_x_ptr, sums_ptr, S):
    """∂y → ∂x, and Σ ∂z, Σ ∂z (z − bias) of the strip → sums [2, N, strips, C]. Grid: `_strip`."""
    n, x, c, top = _strip(S)
    grad_ptr += n * S.H_OUT * S.W_OUT * S.C
    out_ptr += n * S.H_OUT * S.W_OUT * S.C
    grad_x_ptr += n * S.H * S.W * S.C
    demod, bias = of_channels(demod_ptr, bias_ptr, n, c, S.C)
    total = tl.zeros([S.BLOCK_X, S.BLOCK_C], tl.float32)
    total_u, lost, lost_u = total, total, total
    if S.FILTER:
        h0, _, _ = _filtered_gradient(grad_ptr, out_ptr, bias, top - 2, x, c, S)
        h1, _, _ = _filtered_gradient(grad_ptr, out_ptr, bias, top - 1, x, c, S)
        h2, total, total_u = _filtered_gradient(grad_ptr, out_ptr, bias, top, x, c, S)
    for row in range(S.ROWS):
        y = top + row
        if S.FILTER:
            h3, own, own_u = _filtered_gradient(grad_ptr, out_ptr, bias, y + 1, x, c, S)
            v = (h0 + h3 + 3.0 * (h1 + h2)) * S.SCALE
            h0, h1, h2 = h1, h2, h3
            mine = y + 1 < top + S.ROWS
            own, own_u = tl.where(mine, own, 0.0), tl.where(mine, own_u, 0.0)
        else:
            own, own_u = _gradient_of_z(grad_ptr, out_ptr, bias, y, x, c, S)
            v = own
        total, lost = _add(total, lost, own)
        total_u, lost_u = _add(total_u, lost_u, own_u)
        _store(grad_x_ptr, v * demod, y, x, c, S.H, S.W, S.C)
    across = tl.cdiv(S.W, S.BLOCK_X)
    strip = tl.program_id(1) * across + tl.program_id(0) // tl.cdiv(S.C, S.BLOCK_C)
    strips = tl.num_programs(1) * across
    address = (n * strips + strip) * S.C + c
    tl.store(sums_ptr + address, tl.sum(total.to(tl.float64), axis=0), mask=c < S.C)
    address += tl.num_programs(2) * strips * S.C
    tl.store(sums_ptr + address, tl.sum(total_u.to(tl.float64), axis=0), mask=c < S.C)


# ---------------------------------------------------------------------------------------- launchers


def _strips(H, W, C):
    """Tile of the strip kernels, and their grid but for the frames."""
    x, c, rows = (edge(size, most) for size, most in zip((W, C, H), STRIP))
    grid = triton.cdiv(W, x) * triton.cdiv(C, c), triton.cdiv(H, rows)
    return grid, constants(BLOCK_X=x, BLOCK_C=c, ROWS=rows)


def _fir_size(size, stride, padding, transposed):
    if transposed:
        return (size - 1) * stride + 4 - 2 * padding
    return (size + 2 * padding - 4) // stride + 1


def _filter_launch(x, size, demod, bias, settings):
    """The strip kernel on x [N, C, H, W], whose result has a size of (H_OUT, W_OUT)."""
    N, C, H, W = x.shape
    y = torch.empty([N, *size, C], device=x.device, dtype=x.dtype)
    grid, tile = _strips(*size, C)
    S = Filter(H, W, *size, C, **settings, **tile)
    inputs = channels_last(x), demod.contiguous(), bias.contiguous()
    _epilogue_kernel[(*grid, N)](*inputs, y, S, num_warps=WARPS)
    return channels_first(y)


def fir_launch(x, gain, stride, padding, transposed):
    """`reference.fir_filter` of x [N, C, H, W]."""
    N, C, H, W = x.shape
    size = [_fir_size(n, stride, padding, transposed) for n in (H, W)]
    settings = constants(SCALE=gain / 64, UP=transposed)
    if stride == 1:  # the filter is symmetric: its transpose pads with the rest of its width
        pad = constants(PAD=3 - padding if transposed else padding)
        return _filter_launch(x, size, x, x, settings | pad)
    pixels, channels = TILE[0], edge(C, TILE[1])
    settings |= constants(PAD=padding, BLOCK_X=pixels, BLOCK_C=channels)
    y = torch.empty([N, *size, C], device=x.device, dtype=x.dtype)
    grid = triton.cdiv(size[0] * size[1], pixels), triton.cdiv(C, channels), N
    S = Filter(H, W, *size, C, **settings)
    _resample_kernel[grid](channels_last(x), y, S, num_warps=WARPS)
    return channels_first(y)


def epilogue_launch(x, demod, bias, up, clamp):
    """`reference.epilogue` of x [N, C, H, W], with up=2 that of the transposed convolution."""
    size = [n - (up == 2) for n in x.shape[2:]]
    settings = constants(SCALE=1 / 16, PAD=1, FILTER=up == 2, ACTIVATE=True)
    return _filter_launch(x, size, demod, bias, settings | clamps(clamp))


def epilogue_backward_launch(grad, y, demod, bias, up, clamp):
    """Gradients of x, demod and bias from ∂y and y."""
    N, C, H_out, W_out = y.shape
    H, W = (n + (up == 2) for n in (H_out, W_out))
    grid, tile = _strips(H, W, C)
    strips = grid[1] * triton.cdiv(W, tile["BLOCK_X"].value)
    grad_x = torch.empty([N, H, W, C], device=y.device, dtype=y.dtype)
    sums = torch.empty([2, N, strips, C], device=y.device, dtype=torch.float64)
    settings = constants(SCALE=1 / 16, FILTER=up == 2)
    S = Filter(H, W, H_out, W_out, C, **settings, **clamps(clamp), **tile)
    inputs = channels_last(grad), channels_last(y), demod.contiguous(), bias.contiguous()
    _epilogue_backward_kernel[(*grid, N)](*inputs, grad_x, sums, S, num_warps=WARPS)
    total, total_u = sums.sum(dim=2)
    grad_demod = (total_u / demod).to(demod.dtype)
    return channels_first(grad_x), grad_demod, total.sum(dim=0).to(bias.dtype)


# ------------------------------------------------------------------------------------- registration


def _fir_gradient(ctx, grad):
    gain, stride, padding, transposed = ctx.settings
    return fir_op(grad, gain, stride, padding, not transposed), None, None, None, None


FIR = Op("fir", float32_twin(reference.fir_filter), {"Triton": fir_launch})
fir_op = registered(
    FIR,
    "(Tensor x, float gain, int stride, int padding, bool transposed) -> Tensor",
    lambda inputs, output: ((), inputs[1:]),
    _fir_gradient,
)


def _backward_twin(grad, y, demod, bias, up, clamp):
    tensors = (a.float() for a in (grad, y, demod, bias))
    grad_x, grad_demod, grad_bias = reference.epilogue_backward(*tensors, up, clamp)
    grad_x = channels_first(channels_last(grad_x.to(y.dtype)))
    return grad_x, grad_demod.to(demod.dtype), grad_bias.to(bias.dtype)


def _epilogue_gradient(ctx, grad):
    return *epilogue_backward_op(grad, *ctx.saved_tensors, *ctx.settings), None, None


EPILOGUE = Op("epilogue", float32_twin(reference.epilogue), {"Triton": epilogue_launch})
EPILOGUE_BACKWARD = Op("epilogue_backward", _backward_twin, {"Triton": epilogue_backward_launch})
epilogue_backward_op = registered(
    EPILOGUE_BACKWARD,
    "(Tensor grad, Tensor y, Tensor demod, Tensor bias, int up, float? clamp)"
    " -> (Tensor, Tensor, Tensor)",
)
epilogue_op = registered(
    EPILOGUE,
    "(Tensor x, Tensor demod, Tensor bias, int up, float? clamp) -> Tensor",
    lambda inputs, output: ((output, *inputs[1:3]), inputs[3:]),
    _epilogue_gradient,
)
