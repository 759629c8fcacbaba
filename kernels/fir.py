"""The low-pass filter of spec §1, plain, up and down; and what follows a synthesis convolution (spec §6), in one pass:

    u = fir(x) after a transposed convolution, else x,   z = u · demod + bias,   y = clamp(√2 · leaky_relu(z))

The filter is the outer product of (1,3,3,1)/8 with itself. Resampling is linear: its gradient is the same op
transposed, to any order. The epilogue's gradient needs y, but neither x nor u:

    ∂z = ∂y · y/z (0 where clamped),   ∂x = firᵀ(∂z · demod)
    ∂bias = Σ ∂z,   ∂demod = Σ ∂z u = (Σ ∂z z − bias Σ ∂z) / demod

That is one pass as well. A program filters a strip of columns downwards, reads every row once (four shifted loads,
three of them from the cache) and keeps the last four filtered rows in registers. Memory is channels last; sums are
float32, first in a strip and then over strips, so runs repeat exactly.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.choose import Op

# Pixels across, channels and rows of a strip; pixels and channels of a resampled tile; warps. Chosen from the resource
# report of `bench/kernels.py --aot`; not yet timed.
STRIP, TILE, WARPS = (16, 64, 16), (32, 64), 8
GAIN, SLOPE = tl.constexpr(math.sqrt(2)), tl.constexpr(0.2)


@triton.jit
def _inside(y, x, c, H, W, C):
    """Which of pixels (y, x) and channels c exist → [len(x), len(c)]."""
    y += tl.zeros_like(x)
    return ((x >= 0) & (x < W) & (y >= 0) & (y < H))[:, None] & (c < C)[None, :]


@triton.jit
def _filtered(x_ptr, y, x, c, H, W, C, PAD: tl.constexpr):
    """Row y filtered across, times 8: Σ_d (1,3,3,1)[d] x[y, x + d − PAD, c] → [len(x), len(c)]. Zero outside."""
    h = tl.zeros([x.shape[0], c.shape[0]], tl.float32)
    for d in tl.static_range(4):
        at = x + d - PAD
        address = (y * W + at)[:, None] * C + c[None, :]
        v = tl.load(x_ptr + address, mask=_inside(y, at, c, H, W, C), other=0.0).to(tl.float32)
        h += v * (1 + d * (3 - d))  # (1,3,3,1)[d]
    return h


@triton.jit
def activated(v, demod_ptr, bias_ptr, n, c, C, CLAMP: tl.constexpr):
    """clamp(√2 · leaky_relu(v · demod + bias)) for v [pixels, channels c] of frame n."""
    demod = tl.load(demod_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    v = v * demod + bias
    v = tl.maximum(v, v * SLOPE) * GAIN
    if CLAMP is not None:
        v = tl.minimum(tl.maximum(v, -CLAMP), CLAMP)
    return v


@triton.jit
def _epilogue_kernel(
    x_ptr,
    demod_ptr,
    bias_ptr,
    y_ptr,
    H,
    W,
    H_OUT,
    W_OUT,
    C,
    SCALE: tl.constexpr,
    PAD: tl.constexpr,
    FILTER: tl.constexpr,
    ACTIVATE: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Filter with gain SCALE, activation, or both. Grid: blocks of columns × channels, strips of rows, frames."""
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.program_id(0) // tl.cdiv(C, BLOCK_C) * BLOCK_X + tl.arange(0, BLOCK_X)
    x_ptr += n * H * W * C
    top = tl.program_id(1) * ROWS
    if FILTER:
        h0 = _filtered(x_ptr, top - PAD, x, c, H, W, C, PAD)
        h1 = _filtered(x_ptr, top - PAD + 1, x, c, H, W, C, PAD)
        h2 = _filtered(x_ptr, top - PAD + 2, x, c, H, W, C, PAD)
    for row in range(ROWS):
        y = top + row
        if FILTER:
            h3 = _filtered(x_ptr, y - PAD + 3, x, c, H, W, C, PAD)
            v = (h0 + h3 + 3.0 * (h1 + h2)) * SCALE
            h0, h1, h2 = h1, h2, h3
        else:
            inside = _inside(y, x, c, H, W, C)
            v = tl.load(x_ptr + (y * W + x)[:, None] * C + c[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
        if ACTIVATE:
            v = activated(v, demod_ptr, bias_ptr, n, c, C, CLAMP)
        address = n * H_OUT * W_OUT * C + (y * W_OUT + x)[:, None] * C + c[None, :]
        inside = _inside(y, x, c, H_OUT, W_OUT, C)
        tl.store(y_ptr + address, v.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _resample_kernel(
    x_ptr,
    y_ptr,
    H,
    W,
    H_OUT,
    W_OUT,
    C,
    SCALE: tl.constexpr,
    PAD: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Filter and keep every second pixel; or UP, its transpose. Grid: blocks of pixels, of channels, frames."""
    n = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    y, x = pixel // W_OUT, pixel % W_OUT
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    TAPS: tl.constexpr = 2 if UP else 4
    for a in range(TAPS):
        for b in tl.static_range(TAPS):
            if UP:  # y + PAD = 2 · row + dy, so dy has the parity of y + PAD: two taps out of four
                row, column = (y + PAD) // 2 - a, (x + PAD) // 2 - b
                dy, dx = (y + PAD) % 2 + 2 * a, (x + PAD) % 2 + 2 * b
            else:
                row, column, dy, dx = (
                    2 * y + a - PAD,
                    2 * x + b - PAD,
                    a + tl.zeros_like(y),
                    b + tl.zeros_like(x),
                )
            f = (1 + dy * (3 - dy)) * (1 + dx * (3 - dx))  # (1,3,3,1)[d] = 1 + d (3 − d)
            inside = _inside(row, column, c, H, W, C) & (y < H_OUT)[:, None]
            address = n * H * W * C + (row * W + column)[:, None] * C + c[None, :]
            total += f.to(tl.float32)[:, None] * tl.load(
                x_ptr + address, mask=inside, other=0.0
            ).to(tl.float32)
    address = (n * H_OUT * W_OUT + pixel)[:, None] * C + c[None, :]
    tl.store(
        y_ptr + address,
        (total * SCALE).to(y_ptr.dtype.element_ty),
        mask=(y < H_OUT)[:, None] & (c < C)[None, :],
    )


# ---------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _gradient_of_z(grad_ptr, out_ptr, y, x, c, H, W, C, CLAMP: tl.constexpr):
    """∂z and ∂z · z of pixels (y, x) from ∂y and y; zero outside."""
    inside = _inside(y, x, c, H, W, C)
    address = (y * W + x)[:, None] * C + c[None, :]
    grad = tl.load(grad_ptr + address, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + address, mask=inside, other=0.0).to(tl.float32)
    if CLAMP is not None:
        grad = tl.where(tl.abs(out) < CLAMP, grad, 0.0)
    return grad * tl.where(
        out > 0, GAIN, GAIN * SLOPE
    ), grad * out  # leaky_relu is homogeneous: ∂z z = ∂y y


@triton.jit
def _filtered_gradient(grad_ptr, out_ptr, y, x, c, H, W, C, CLAMP: tl.constexpr):
    """`_filtered` of ∂z, padded by 2 as the transpose of padding by 1 is; and ∂z and ∂z · z of the row itself."""
    h = tl.zeros([x.shape[0], c.shape[0]], tl.float32)
    own, own_z = h, h
    for d in tl.static_range(4):
        grad_z, grad_zz = _gradient_of_z(grad_ptr, out_ptr, y, x + d - 2, c, H, W, C, CLAMP)
        h += grad_z * (1 + d * (3 - d))
        if d == 2:
            own, own_z = grad_z, grad_zz
    return h, own, own_z


@triton.jit
def _epilogue_backward_kernel(
    grad_ptr,
    out_ptr,
    demod_ptr,
    grad_x_ptr,
    sums_ptr,
    H,
    W,
    H_OUT,
    W_OUT,
    C,
    SCALE: tl.constexpr,
    FILTER: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """∂y [H_OUT, W_OUT] → ∂x [H, W], and Σ ∂z, Σ ∂z z of the strip → sums [2, N, strips, C]. Grid: as forward.

    Sums count the strip's own pixels, which its window reads anyway.
    """
    n = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    across = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    x = across * BLOCK_X + tl.arange(0, BLOCK_X)
    grad_ptr += n * H_OUT * W_OUT * C
    out_ptr += n * H_OUT * W_OUT * C
    top = tl.program_id(1) * ROWS
    demod = tl.load(demod_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    total, total_z = (
        tl.zeros([BLOCK_X, BLOCK_C], tl.float32),
        tl.zeros([BLOCK_X, BLOCK_C], tl.float32),
    )
    if FILTER:
        h0, _, _ = _filtered_gradient(grad_ptr, out_ptr, top - 2, x, c, H_OUT, W_OUT, C, CLAMP)
        h1, _, _ = _filtered_gradient(grad_ptr, out_ptr, top - 1, x, c, H_OUT, W_OUT, C, CLAMP)
        h2, total, total_z = _filtered_gradient(
            grad_ptr, out_ptr, top, x, c, H_OUT, W_OUT, C, CLAMP
        )
    for row in range(ROWS):
        y = top + row
        if FILTER:
            h3, own, own_z = _filtered_gradient(
                grad_ptr, out_ptr, y + 1, x, c, H_OUT, W_OUT, C, CLAMP
            )
            v = (h0 + h3 + 3.0 * (h1 + h2)) * SCALE
            h0, h1, h2 = h1, h2, h3
            mine = y + 1 < top + ROWS
            total, total_z = total + tl.where(mine, own, 0.0), total_z + tl.where(mine, own_z, 0.0)
        else:
            v, own_z = _gradient_of_z(grad_ptr, out_ptr, y, x, c, H_OUT, W_OUT, C, CLAMP)
            total, total_z = total + v, total_z + own_z
        address = n * H * W * C + (y * W + x)[:, None] * C + c[None, :]
        inside = _inside(y, x, c, H, W, C)
        tl.store(grad_x_ptr + address, (v * demod).to(grad_x_ptr.dtype.element_ty), mask=inside)
    strips = tl.num_programs(1) * tl.cdiv(W, BLOCK_X)
    address = (n * strips + tl.program_id(1) * tl.cdiv(W, BLOCK_X) + across) * C + c
    tl.store(sums_ptr + address, tl.sum(total, axis=0), mask=c < C)
    tl.store(
        sums_ptr + tl.num_programs(2) * strips * C + address, tl.sum(total_z, axis=0), mask=c < C
    )


# --------------------------------------------------------------------------------------------- launchers, registration


def _channels_last(x):
    """[N, C, H, W] → contiguous [N, H, W, C]: nothing to do for a tensor in channels-last memory."""
    return x.permute(0, 2, 3, 1).contiguous()


def _strips(H, W, C):
    """Tile of the strip kernels as launch arguments, and their grid but for the frames."""
    across, channels, rows = (
        min(most, triton.next_power_of_2(size)) for most, size in zip(STRIP, (W, C, H))
    )
    grid = triton.cdiv(W, across) * triton.cdiv(C, channels), triton.cdiv(H, rows)
    return grid, dict(BLOCK_X=across, BLOCK_C=channels, ROWS=rows, num_warps=WARPS)


def _fir_size(size, stride, padding, transposed):
    if transposed:
        return (size - 1) * stride + 4 - 2 * padding
    return (size + 2 * padding - 4) // stride + 1


def fir_launch(x, gain, stride, padding, transposed):
    """See `fir_op`. x: [N, C, H, W] → [N, C, H', W'] in channels-last memory."""
    N, C, H, W = x.shape
    H_out, W_out = (_fir_size(size, stride, padding, transposed) for size in (H, W))
    x = _channels_last(x)
    y = torch.empty([N, H_out, W_out, C], device=x.device, dtype=x.dtype)
    if (
        stride == 1
    ):  # the transpose of a symmetric filter is the filter with the rest of the padding
        grid, launch = _strips(H_out, W_out, C)
        _epilogue_kernel[grid + (N,)](
            x,
            x,
            x,
            y,
            H,
            W,
            H_out,
            W_out,
            C,
            SCALE=gain / 64,
            FILTER=True,
            ACTIVATE=False,
            PAD=3 - padding if transposed else padding,
            CLAMP=None,
            **launch,
        )
    else:
        pixels, channels = TILE[0], min(TILE[1], triton.next_power_of_2(C))
        _resample_kernel[triton.cdiv(H_out * W_out, pixels), triton.cdiv(C, channels), N](
            x,
            y,
            H,
            W,
            H_out,
            W_out,
            C,
            SCALE=gain / 64,
            PAD=padding,
            UP=transposed,
            BLOCK_P=pixels,
            BLOCK_C=channels,
            num_warps=WARPS,
        )
    return y.permute(0, 3, 1, 2)


def epilogue_launch(x, demod, bias, up, clamp):
    """See `epilogue`."""
    N, C, H, W = x.shape
    H_out, W_out = (H - 1, W - 1) if up == 2 else (H, W)
    x = _channels_last(x)
    y = torch.empty([N, H_out, W_out, C], device=x.device, dtype=x.dtype)
    grid, launch = _strips(H_out, W_out, C)
    _epilogue_kernel[grid + (N,)](
        x,
        demod.contiguous(),
        bias.contiguous(),
        y,
        H,
        W,
        H_out,
        W_out,
        C,
        SCALE=1 / 16,
        PAD=1,
        FILTER=up == 2,
        ACTIVATE=True,
        CLAMP=clamp,
        **launch,
    )
    return y.permute(0, 3, 1, 2)


def epilogue_backward_launch(grad, y, demod, bias, up, clamp):
    """Gradients of x, demod and bias from ∂y and y."""
    N, C, H_out, W_out = y.shape
    H, W = (H_out + 1, W_out + 1) if up == 2 else (H_out, W_out)
    grid, launch = _strips(H, W, C)
    strips = grid[1] * triton.cdiv(W, launch["BLOCK_X"])
    grad_x = torch.empty([N, H, W, C], device=y.device, dtype=y.dtype)
    sums = torch.empty([2, N, strips, C], device=y.device, dtype=torch.float32)
    _epilogue_backward_kernel[grid + (N,)](
        _channels_last(grad),
        _channels_last(y),
        demod.contiguous(),
        grad_x,
        sums,
        H,
        W,
        H_out,
        W_out,
        C,
        SCALE=1 / 16,
        FILTER=up == 2,
        CLAMP=clamp,
        **launch,
    )
    total, total_z = sums.sum(dim=2)
    grad_demod = ((total_z - bias.float() * total) / demod.float()).to(demod.dtype)
    return grad_x.permute(0, 3, 1, 2), grad_demod, total.sum(dim=0).to(bias.dtype)


def float32_twin(function):
    """A plain function as the twin of an op: computed in float32, results in the first argument's dtype and in
    channels-last memory.
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
    """`reference.fir_filter` as an op of PyTorch's: filter and keep every stride-th pixel, or the transpose of that."""
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
    """What follows a synthesis convolution: √2 · leaky_relu(fir(x) · demod + bias), clamped to ±clamp if given.

    x: [N, C, H, W] in any layout; with up=2, of the transposed convolution: filtered with gain 4 to H-1 × W-1.
    demod: [N, C], bias: [C]. Returns y in x's dtype, channels-last memory. Differentiable once.
    """
    return epilogue_op(x, demod, bias, up, None if clamp is None else float(clamp))
