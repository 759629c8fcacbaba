"""Convolution with one kernel per frame (spec §6), stride 1 or transposed with stride 2, as
implicit matrix products:

    same:  y[n, q, o] = Σ_a,i x[n, q + a − k//2, i] W[n, o, a, i]
    up:    y[n, 2p + a, o] = Σ_i x[n, p, i] W[n, o, a, i]             → 2H + k − 2 rows

where p and q are the row and column of a pixel, and a those of a kernel's tap.

A program makes a tile of (pixels, output channels) of one frame, adding up products of tiles over
taps and input channels: the unfolded input is never in memory. Pixels and kernels are channels
last, so every tap reads channels side by side. With "up", output pixels of one parity share their
taps, and a tile is of one parity: no zero is multiplied. In a layer without FIR, the epilogue
(fir.py) is done on the tile before it is stored.

There are two kernels for the same. One computes addresses; the other leaves that, and the padding
with zeros, to the tensor memory accelerator (TMA) of Hopper and later GPUs: its tile is a rectangle
of pixels.

The gradient to the input is such a convolution again, O and I swapped: that of `same` has its taps
flipped, that of `up` is the ordinary convolution of stride 2 ("down"). The gradient to the kernels
is a product over pixels, tap by tap. Sums are float32 and have one order: runs repeat exactly.
Differentiable once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import reference
from kernels.choose import Op, Unsuitable
from kernels.fir import EPILOGUE, activated, epilogue_backward_op, float32_twin, of_channels

# Tile of (pixels, output channels, inner dimension), warps, stages, by dtype: convolution, and
# gradient to the kernels (there output channels, input channels, pixels). Chosen from the report of
# `bench/kernels.py --aot`; not yet timed.
CONFIGS = {
    torch.float32: {"conv": (32, 32, 32, 4, 2), "weight": (32, 32, 32, 4, 2)},
    torch.bfloat16: {"conv": (128, 128, 64, 8, 3), "weight": (128, 128, 64, 8, 3)},
    torch.float16: {"conv": (128, 128, 64, 8, 3), "weight": (128, 128, 64, 8, 3)},
}
# With TMA: rows × columns of a tile of pixels.
TMA_TILES = {torch.float32: (4, 8), torch.bfloat16: (8, 16), torch.float16: (8, 16)}
tma_anywhere = False  # for Triton's interpreter, which has no compute capability


class Convolution(NamedTuple):
    """What the kernels know of a call. MODE: same, flipped (its transpose), up, down (its
    transpose).
    """

    H: int
    W: int
    H_OUT: int
    W_OUT: int
    I: int
    O: int
    SIDE: tl.constexpr
    MODE: tl.constexpr
    PRECISION: tl.constexpr
    ACTIVATE: tl.constexpr  # the epilogue too
    CLAMPS: tl.constexpr
    CLAMP: tl.constexpr
    BLOCK_P: (
        tl.constexpr
    )  # the tile: pixels, as BLOCK_Y rows and BLOCK_X columns with TMA; channels
    BLOCK_O: tl.constexpr
    BLOCK_I: tl.constexpr
    BLOCK_Y: tl.constexpr = tl.constexpr(1)
    BLOCK_X: tl.constexpr = tl.constexpr(1)


@triton.jit
def _conv_kernel(x_ptr, weight_ptr, demod_ptr, bias_ptr, y_ptr, S):
    """x [N, H, W, I] → y [N, H_OUT, W_OUT, O]; weight [N, O, k·k, I], or [N, I, k·k, O] in the
    transposed modes.

    Grid: blocks of pixels (with up, of each parity), blocks of o, frames.
    """
    n = tl.program_id(2).to(tl.int64)
    o = tl.program_id(1) * S.BLOCK_O + tl.arange(0, S.BLOCK_O)
    x_ptr += n * S.H * S.W * S.I
    weight_ptr += n * S.O * S.I * S.SIDE * S.SIDE
    if S.MODE == "up":
        # Pixel q of parity (py, px) is pixel 2q + (py, px) of y, its taps are (py, px) + 2a: p = q
        # − a.
        block, py, px = tl.program_id(0) // 4, tl.program_id(0) // 2 % 2, tl.program_id(0) % 2
        across = (S.W_OUT + 1 - px) // 2
        rows, columns = (S.SIDE + 1 - py) // 2, (S.SIDE + 1 - px) // 2
    else:
        block, across, rows, columns = tl.program_id(0), S.W_OUT, S.SIDE, S.SIDE
    pixel = block * S.BLOCK_P + tl.arange(0, S.BLOCK_P)
    qy, qx = pixel // across, pixel % across
    total = tl.zeros([S.BLOCK_P, S.BLOCK_O], tl.float32)
    blocks = tl.cdiv(S.I, S.BLOCK_I)
    for step in range(blocks * rows * columns):
        ay, ax = step // blocks // columns, step // blocks % columns
        i = step % blocks * S.BLOCK_I + tl.arange(0, S.BLOCK_I)
        if S.MODE == "up":
            row, column, tap = qy - ay, qx - ax, (py + 2 * ay) * S.SIDE + px + 2 * ax
        elif S.MODE == "down":
            row, column, tap = 2 * qy + ay, 2 * qx + ax, ay * S.SIDE + ax
        elif S.MODE == "same":
            row, column, tap = qy + ay - S.SIDE // 2, qx + ax - S.SIDE // 2, ay * S.SIDE + ax
        else:
            row, column, tap = qy - ay + S.SIDE // 2, qx - ax + S.SIDE // 2, ay * S.SIDE + ax
        inside = (row >= 0) & (row < S.H) & (column >= 0) & (column < S.W)
        address = (row * S.W + column)[:, None] * S.I + i[None, :]
        x = tl.load(x_ptr + address, mask=inside[:, None] & (i < S.I)[None, :], other=0.0)
        if S.MODE == "same" or S.MODE == "up":
            address = (o[None, :] * S.SIDE * S.SIDE + tap) * S.I + i[:, None]
        else:
            address = (i[:, None] * S.SIDE * S.SIDE + tap) * S.O + o[None, :]
        w = tl.load(weight_ptr + address, mask=(i < S.I)[:, None] & (o < S.O)[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision=S.PRECISION)
    if S.ACTIVATE:
        demod, bias = of_channels(demod_ptr, bias_ptr, n, o, S.O)
        total = activated(total, demod, bias, S)
    if S.MODE == "up":
        qy, qx = 2 * qy + py, 2 * qx + px
    address = n * S.H_OUT * S.W_OUT * S.O + (qy * S.W_OUT + qx)[:, None] * S.O + o[None, :]
    inside = (qy < S.H_OUT)[:, None] & (o < S.O)[None, :]
    tl.store(y_ptr + address, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _conv_tma_kernel(x_desc, weight_desc, demod_ptr, bias_ptr, y_ptr, S):
    """`_conv_kernel` in the modes same and up by tensor descriptors: x [N, H, W, I], weight [N · O,
    k·k, I].

    What lies outside of x is read as 0; outputs beyond O are of the next frame's kernels, and are
    not stored. Grid: blocks of pixels (with up, of each parity), blocks of o, frames.
    """
    n = tl.program_id(2)
    first_o = tl.program_id(1) * S.BLOCK_O
    if S.MODE == "up":
        block, py, px = tl.program_id(0) // 4, tl.program_id(0) // 2 % 2, tl.program_id(0) % 2
        across, rows, columns = (S.W_OUT + 1) // 2, (S.SIDE + 1 - py) // 2, (S.SIDE + 1 - px) // 2
    else:
        block, across, rows, columns = tl.program_id(0), S.W_OUT, S.SIDE, S.SIDE
    across = tl.cdiv(across, S.BLOCK_X)
    top, left = block // across * S.BLOCK_Y, block % across * S.BLOCK_X
    taps = rows * columns
    total = tl.zeros([S.BLOCK_Y * S.BLOCK_X, S.BLOCK_O], tl.float32)
    for step in range(tl.cdiv(S.I, S.BLOCK_I) * taps):
        ay, ax = step % taps // columns, step % taps % columns
        i = step // taps * S.BLOCK_I
        if S.MODE == "up":
            row, column, tap = top - ay, left - ax, (py + 2 * ay) * S.SIDE + px + 2 * ax
        else:
            row, column, tap = top + ay - S.SIDE // 2, left + ax - S.SIDE // 2, ay * S.SIDE + ax
        x = x_desc.load([n, row, column, i]).reshape([S.BLOCK_Y * S.BLOCK_X, S.BLOCK_I])
        w = weight_desc.load([n * S.O + first_o, tap, i]).reshape([S.BLOCK_O, S.BLOCK_I])
        total = tl.dot(x, w.T, total, input_precision=S.PRECISION)
    n = n.to(tl.int64)
    o = first_o + tl.arange(0, S.BLOCK_O)
    if S.ACTIVATE:
        demod, bias = of_channels(demod_ptr, bias_ptr, n, o, S.O)
        total = activated(total, demod, bias, S)
    pixel = tl.arange(0, S.BLOCK_Y * S.BLOCK_X)
    qy, qx = top + pixel // S.BLOCK_X, left + pixel % S.BLOCK_X
    if S.MODE == "up":
        qy, qx = 2 * qy + py, 2 * qx + px
    address = n * S.H_OUT * S.W_OUT * S.O + (qy * S.W_OUT + qx)[:, None] * S.O + o[None, :]
    inside = ((qy < S.H_OUT) & (qx < S.W_OUT))[:, None] & (o < S.O)[None, :]
    tl.store(y_ptr + address, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grad_weight_kernel(grad_ptr, x_ptr, grad_weight_ptr, S):
    """∂y [N, H_OUT, W_OUT, O], x [N, H, W, I] → ∂W [N, O, k·k, I]. Grid: blocks of o × of i, taps,
    frames.
    """
    n = tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(S.I, S.BLOCK_I)
    o = tl.program_id(0) // blocks * S.BLOCK_O + tl.arange(0, S.BLOCK_O)
    i = tl.program_id(0) % blocks * S.BLOCK_I + tl.arange(0, S.BLOCK_I)
    tap = tl.program_id(1)
    ay, ax = tap // S.SIDE, tap % S.SIDE
    grad_ptr += n * S.H_OUT * S.W_OUT * S.O
    x_ptr += n * S.H * S.W * S.I
    total = tl.zeros([S.BLOCK_O, S.BLOCK_I], tl.float32)
    for step in range(
        tl.cdiv(S.H * S.W, S.BLOCK_P)
    ):  # over the pixels of x; with same padding y has as many
        pixel = step * S.BLOCK_P + tl.arange(0, S.BLOCK_P)
        row, column = pixel // S.W, pixel % S.W
        if S.MODE == "up":
            qy, qx = 2 * row + ay, 2 * column + ax
        else:
            qy, qx = row - ay + S.SIDE // 2, column - ax + S.SIDE // 2
        inside = (row < S.H) & (qy >= 0) & (qy < S.H_OUT) & (qx >= 0) & (qx < S.W_OUT)
        address = (qy * S.W_OUT + qx)[:, None] * S.O + o[None, :]
        grad = tl.load(grad_ptr + address, mask=inside[:, None] & (o < S.O)[None, :], other=0.0)
        inside = (row < S.H)[:, None] & (i < S.I)[None, :]
        x = tl.load(x_ptr + pixel[:, None] * S.I + i[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(grad), x, total, input_precision=S.PRECISION)
    address = ((n * S.O + o)[:, None] * S.SIDE * S.SIDE + tap) * S.I + i[None, :]
    inside = (o < S.O)[:, None] & (i < S.I)[None, :]
    tl.store(grad_weight_ptr + address, total.to(grad_weight_ptr.dtype.element_ty), mask=inside)


# -------------------------------------------------------------------------- launchers, registration


def _launch(name, x, sizes, side, mode, *tile_of, clamp=None, activate=False):
    """The kernels' description of a call, and its warps and stages. sizes: H, W, H_OUT, W_OUT, I,
    O; tile_of: what the configuration's tile is cut to.
    """
    *tile, warps, stages = CONFIGS[x.dtype][name]
    edges = [max(16, min(most, triton.next_power_of_2(n))) for most, n in zip(tile, tile_of)]
    if name == "weight":  # its pixels are the inner dimension
        edges = [edges[2], *edges[:2]]
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    flags = activate, clamp is not None, float(clamp or 0)
    S = Convolution(*sizes, *map(tl.constexpr, (side, mode, precision, *flags, *edges)))
    return S, {"num_warps": warps, "num_stages": stages}


def _check(x, weight):
    if x.dtype != weight.dtype or x.dtype not in CONFIGS:
        raise ValueError(
            f"x is {x.dtype} and weight {weight.dtype}: want float32, bfloat16 or float16 for both"
        )
    if len(x) != len(weight) or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)}: want [N, I, H, W] and [N, O, I, "
            "k, k]"
        )


def _channels_last(x):
    """[.., C, H, W] → contiguous [.., H, W, C]: nothing to do for a tensor in channels-last
    memory.
    """
    return x.movedim(-3, -1).contiguous()


def _up_size(size, side, up):
    return 2 * (size - 1) + side if up == 2 else size


def _or(tensor, other):
    return other if tensor is None else tensor.contiguous()


def conv_launch(x, weight, mode, demod=None, bias=None, clamp=None):
    """x [N, C, H, W] through weight [N, O, I, k, k] in a mode of `_conv_kernel`, in channels-last
    memory.

    demod, bias, clamp: of the epilogue of a layer without FIR, or None.
    """
    (N, _, H, W), (_, O, I, side, _) = x.shape, weight.shape
    if mode == "down":
        H_out, W_out = (H - side) // 2 + 1, (W - side) // 2 + 1
    else:
        H_out, W_out = (_up_size(size, side, 2 if mode == "up" else 1) for size in (H, W))
    if mode in ("flipped", "down"):
        O, I = I, O
    pixels = H_out * W_out
    if mode == "up":
        pixels = (H_out + 1) // 2 * ((W_out + 1) // 2)  # of the largest parity
    sizes, epilogue = (H, W, H_out, W_out, I, O), {"clamp": clamp, "activate": demod is not None}
    S, launch = _launch("conv", x, sizes, side, mode, pixels, O, I, **epilogue)
    y = torch.empty([N, H_out, W_out, O], device=x.device, dtype=x.dtype)
    blocks = triton.cdiv(pixels, S.BLOCK_P.value) * (4 if mode == "up" else 1)
    _conv_kernel[blocks, triton.cdiv(O, S.BLOCK_O.value), N](
        _channels_last(x), _channels_last(weight), _or(demod, y), _or(bias, y), y, S, **launch
    )
    return y.permute(0, 3, 1, 2)


def conv_tma_launch(x, weight, up, demod=None, bias=None, clamp=None):
    """`conv_launch` in the modes same (up 1) and up (up 2), with tensor descriptors. Raises
    Unsuitable.
    """
    if not tma_anywhere and not (
        x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    ):
        raise Unsuitable("the device has no TMA")
    (N, I, H, W), (_, O, _, side, _) = x.shape, weight.shape
    if I * x.element_size() % 16:
        raise Unsuitable(f"TMA wants rows of a multiple of 16 bytes, not {I} channels")
    H_out, W_out = (_up_size(size, side, up) for size in (H, W))
    mode, rows, columns, parities = "same", H_out, W_out, 1
    if up == 2:
        mode, rows, columns, parities = "up", (H_out + 1) // 2, (W_out + 1) // 2, 4
    height, width = TMA_TILES[x.dtype]
    sizes, epilogue = (H, W, H_out, W_out, I, O), {"clamp": clamp, "activate": demod is not None}
    S, launch = _launch("conv", x, sizes, side, mode, height * width, O, I, **epilogue)
    S = S._replace(BLOCK_Y=tl.constexpr(height), BLOCK_X=tl.constexpr(width))
    block_o, block_i = S.BLOCK_O.value, S.BLOCK_I.value
    y = torch.empty([N, H_out, W_out, O], device=x.device, dtype=x.dtype)
    x, weight = _channels_last(x), _channels_last(weight).flatten(2, 3).flatten(0, 1)
    blocks = triton.cdiv(rows, height) * triton.cdiv(columns, width) * parities
    _conv_tma_kernel[blocks, triton.cdiv(O, block_o), N](
        TensorDescriptor.from_tensor(x, [1, height, width, block_i]),
        TensorDescriptor.from_tensor(weight, [block_o, 1, block_i]),
        _or(demod, y),
        _or(bias, y),
        y,
        S,
        **launch,
    )
    return y.permute(0, 3, 1, 2)


def grad_weight_launch(grad, x, side, up):
    """Gradient of the kernels [N, O, I, k, k], in channels-last memory."""
    (N, O, H_out, W_out), (_, I, H, W) = grad.shape, x.shape
    sizes, mode = (H, W, H_out, W_out, I, O), "up" if up == 2 else "same"
    S, launch = _launch("weight", x, sizes, side, mode, O, I, H * W)
    grad_weight = torch.empty([N, O, side, side, I], device=x.device, dtype=x.dtype)
    blocks = triton.cdiv(O, S.BLOCK_O.value) * triton.cdiv(I, S.BLOCK_I.value)
    _grad_weight_kernel[blocks, side * side, N](
        _channels_last(grad), _channels_last(x), grad_weight, S, **launch
    )
    return grad_weight.movedim(-1, 2)


# ------------------------------------------------------------------------- candidates, registration


def _last(y):
    return y.contiguous(memory_format=torch.channels_last)


def grouped(x, weight, up):
    """All frames side by side on channels, in one grouped convolution of cuDNN."""
    return _last(reference.conv2d_grouped(x, weight, up))


def looped(x, weight, up):
    """One convolution of cuDNN after another."""
    frames = [reference.conv2d_shared(f, w, up) for f, w in zip(x.split(1), weight.unbind(0))]
    return _last(torch.cat(frames))


def unfolded(x, weight, up):
    """Batched matrix products with the unfolded input; with up=2 of the input, whose result is
    folded.
    """
    N, O, I, k, _ = weight.shape
    H, W = x.shape[2:]
    if up == 2:
        columns = weight.flatten(3).permute(0, 1, 3, 2).reshape(N, O * k * k, I) @ x.flatten(2)
        size = _up_size(H, k, 2), _up_size(W, k, 2)
        return _last(torch.nn.functional.fold(columns, size, k, stride=2))
    columns = torch.nn.functional.unfold(x, k, padding=k // 2)
    return _last((weight.flatten(2) @ columns).view(N, O, H, W))


PLAIN_CONVOLUTIONS = {"cuDNN grouped": grouped, "cuDNN looped": looped, "matrix products": unfolded}
CONV = Op(
    "conv2d_per_frame",
    float32_twin(reference.conv2d_per_frame),
    {
        "Triton TMA": conv_tma_launch,
        "Triton": lambda x, weight, up: conv_launch(x, weight, "up" if up == 2 else "same"),
    }
    | PLAIN_CONVOLUTIONS,
)
GRAD_X = Op(
    "conv2d_per_frame_grad_x",
    float32_twin(reference.conv2d_per_frame_grad_x),
    {
        "Triton": lambda grad, weight, up: conv_launch(
            grad, weight, "down" if up == 2 else "flipped"
        ),
        "cuDNN grouped": lambda *args: _last(reference.conv2d_per_frame_grad_x(*args)),
    },
)


def _grad_weight(grad, x, side, up):
    return _channels_last(reference.conv2d_per_frame_grad_weight(grad, x, side, up)).movedim(-1, 2)


def _grad_weight_twin(grad, x, side, up):
    return _grad_weight(grad.float(), x.float(), side, up).to(x.dtype)


GRAD_WEIGHT = Op(
    "conv2d_per_frame_grad_weight",
    _grad_weight_twin,
    {"Triton": grad_weight_launch, "cuDNN grouped": _grad_weight},
)


def _then_epilogue(convolution):
    def both(x, weight, demod, bias, clamp):
        return EPILOGUE(convolution(x, weight, 1), demod, bias, 1, clamp)

    return both


def _activated_twin(x, weight, demod, bias, clamp):
    y = reference.conv2d_per_frame(x, weight)
    return reference.epilogue(y, demod, bias, 1, clamp)


CONV_EPILOGUE = Op(
    "conv2d_epilogue",
    float32_twin(_activated_twin),
    {
        "Triton TMA": lambda x, w, *epilogue: conv_tma_launch(x, w, 1, *epilogue),
        "Triton": lambda x, w, *epilogue: conv_launch(x, w, "same", *epilogue),
    }
    | {name: _then_epilogue(convolution) for name, convolution in PLAIN_CONVOLUTIONS.items()},
)


@torch.library.custom_op("mostgan::conv2d_per_frame", mutates_args=())
def conv_op(x: Tensor, weight: Tensor, up: int) -> Tensor:
    """`conv2d_per_frame` as an op of PyTorch's, opaque to the compiler."""
    return CONV(x, weight, up)


@conv_op.register_fake
def _(x, weight, up):
    (N, _, H, W), (_, O, _, side, _) = x.shape, weight.shape
    return x.new_empty([N, _up_size(H, side, up), _up_size(W, side, up), O]).permute(0, 3, 1, 2)


@torch.library.custom_op("mostgan::conv2d_per_frame_grad_x", mutates_args=())
def grad_x_op(grad: Tensor, weight: Tensor, up: int) -> Tensor:
    """Gradient of `conv2d_per_frame` to its input."""
    return GRAD_X(grad, weight, up)


@grad_x_op.register_fake
def _(grad, weight, up):
    (N, _, H, W), (_, _, I, side, _) = grad.shape, weight.shape
    H, W = ((H - side) // 2 + 1, (W - side) // 2 + 1) if up == 2 else (H, W)
    return grad.new_empty([N, H, W, I]).permute(0, 3, 1, 2)


@torch.library.custom_op("mostgan::conv2d_per_frame_grad_weight", mutates_args=())
def grad_weight_op(grad: Tensor, x: Tensor, side: int, up: int) -> Tensor:
    """Gradient of `conv2d_per_frame` to its kernels."""
    return GRAD_WEIGHT(grad, x, side, up)


@grad_weight_op.register_fake
def _(grad, x, side, up):
    return x.new_empty([len(x), grad.shape[1], side, side, x.shape[1]]).movedim(-1, 2)


@torch.library.custom_op("mostgan::conv2d_epilogue", mutates_args=())
def conv_epilogue_op(
    x: Tensor, weight: Tensor, demod: Tensor, bias: Tensor, clamp: float | None
) -> Tensor:
    """`conv2d_per_frame` without up, and the epilogue, in one pass."""
    return CONV_EPILOGUE(x, weight, demod, bias, clamp)


@conv_epilogue_op.register_fake
def _(x, weight, demod, bias, clamp):
    N, _, H, W = x.shape
    return x.new_empty([N, H, W, weight.shape[1]]).permute(0, 3, 1, 2)


def _save(ctx, inputs, output):
    x, weight, ctx.up = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, grad, x, weight, up):
    grad_x = grad_x_op(grad, weight, up) if ctx.needs_input_grad[0] else None
    grad_weight = grad_weight_op(grad, x, weight.shape[-1], up) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight


def _backward(ctx, grad):
    return *_gradients(ctx, grad, *ctx.saved_tensors, ctx.up), None


conv_op.register_autograd(_backward, setup_context=_save)


def _save_with_epilogue(ctx, inputs, output):
    x, weight, demod, bias, ctx.clamp = inputs
    ctx.save_for_backward(x, weight, demod, bias, output)


def _backward_with_epilogue(ctx, grad):
    x, weight, demod, bias, y = ctx.saved_tensors
    grad, grad_demod, grad_bias = epilogue_backward_op(grad, y, demod, bias, 1, ctx.clamp)
    return *_gradients(ctx, grad, x, weight, 1), grad_demod, grad_bias, None


conv_epilogue_op.register_autograd(_backward_with_epilogue, setup_context=_save_with_epilogue)


def conv2d_per_frame(x, weight, up=1):
    """Convolution with one kernel per frame. x: [N, I, H, W], weight: [N, O, I, k, k], of one
    dtype, in any layout.

    Returns [N, O, H, W] ('same' padding, k odd), or with up=2 [N, O, 2H + k - 2, 2W + k - 2]
    (without its FIR), in channels-last memory. Differentiable once. Raises ValueError on shapes or
    dtypes that do not go together.
    """
    _check(x, weight)
    return conv_op(x, weight, up)


def conv2d_epilogue(x, weight, demod, bias, clamp=None):
    """`conv2d_per_frame` without up, then `kernels.fir.epilogue`: a synthesis layer without FIR, in
    one pass.

    Raises ValueError as `conv2d_per_frame` does.
    """
    _check(x, weight)
    return conv_epilogue_op(x, weight, demod, bias, None if clamp is None else float(clamp))
