"""Convolution with one kernel per frame (spec §6), stride 1 or transposed with stride 2, as implicit matrix products:

    same:  y[n, q, o] = Σ_a,i x[n, q + a − k//2, i] W[n, o, a, i]     p, q, a: row and column, of pixels and of kernels
    up:    y[n, 2p + a, o] = Σ_i x[n, p, i] W[n, o, a, i]             → 2H + k − 2 rows

A program makes a tile of (pixels, output channels) of one frame, adding up products of tiles over taps and input
channels: the unfolded input is never in memory. Pixels and kernels are channels last, so every tap reads channels side
by side. With "up", output pixels of one parity share their taps, and a tile is of one parity: no zero is multiplied.
In a layer without FIR, the epilogue (fir.py) is done on the tile before it is stored.

There are two kernels for the same. One computes addresses; the other leaves that, and the padding with zeros, to the
tensor memory accelerator (TMA) of Hopper and later GPUs: its tile is a rectangle of pixels.

The gradient to the input is such a convolution again, O and I swapped: that of `same` has its taps flipped, that of
`up` is the ordinary convolution of stride 2 ("down"). The gradient to the kernels is a product over pixels, tap by
tap. Sums are float32 and have one order: runs repeat exactly. Differentiable once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import reference
from kernels.choose import Op, Unsuitable
from kernels.fir import EPILOGUE, activated, epilogue_backward_op, float32_twin

# Tile of (pixels, output channels, inner dimension), warps, stages, by dtype: convolution, and gradient to the kernels
# (there output channels, input channels, pixels). Chosen from the report of `bench/kernels.py --aot`; not yet timed.
CONFIGS = {
    torch.float32: {"conv": (32, 32, 32, 4, 2), "weight": (32, 32, 32, 4, 2)},
    torch.bfloat16: {"conv": (128, 128, 64, 8, 3), "weight": (128, 128, 64, 8, 3)},
    torch.float16: {"conv": (128, 128, 64, 8, 3), "weight": (128, 128, 64, 8, 3)},
}
# With TMA: rows × columns of a tile of pixels, output channels, input channels, warps, stages.
TMA_CONFIGS = {
    torch.float32: (4, 8, 32, 32, 4, 2),
    torch.bfloat16: (8, 16, 128, 64, 8, 3),
    torch.float16: (8, 16, 128, 64, 8, 3),
}
tma_anywhere = False  # for Triton's interpreter, which has no compute capability


@triton.jit
def _conv_kernel(
    x_ptr,
    weight_ptr,
    demod_ptr,
    bias_ptr,
    y_ptr,
    H,
    W,
    H_OUT,
    W_OUT,
    I,
    O,
    MODE: tl.constexpr,
    SIDE: tl.constexpr,
    ACTIVATE: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x [N, H, W, I] → y [N, H_OUT, W_OUT, O]; weight [N, O, k·k, I], or [N, I, k·k, O] in the transposed modes.

    MODE: same, flipped (its transpose), up, down (its transpose). ACTIVATE: the epilogue too. Grid: blocks of pixels
    (with up, of each parity), blocks of o, frames.
    """
    n = tl.program_id(2).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    x_ptr += n * H * W * I
    weight_ptr += n * O * I * SIDE * SIDE
    if (
        MODE == "up"
    ):  # pixel q of parity (py, px) is pixel 2q + (py, px) of y, its taps are (py, px) + 2a: p = q − a
        block, py, px = tl.program_id(0) // 4, tl.program_id(0) // 2 % 2, tl.program_id(0) % 2
        across, rows, columns = (W_OUT + 1 - px) // 2, (SIDE + 1 - py) // 2, (SIDE + 1 - px) // 2
    else:
        block, across, rows, columns = tl.program_id(0), W_OUT, SIDE, SIDE
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    qy, qx = pixel // across, pixel % across
    total = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    blocks = tl.cdiv(I, BLOCK_I)
    for step in range(rows * columns * blocks):
        ay, ax = step // blocks // columns, step // blocks % columns
        i = step % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
        if MODE == "up":
            row, column, tap = qy - ay, qx - ax, (py + 2 * ay) * SIDE + px + 2 * ax
        elif MODE == "down":
            row, column, tap = 2 * qy + ay, 2 * qx + ax, ay * SIDE + ax
        elif MODE == "same":
            row, column, tap = qy + ay - SIDE // 2, qx + ax - SIDE // 2, ay * SIDE + ax
        else:
            row, column, tap = qy - ay + SIDE // 2, qx - ax + SIDE // 2, ay * SIDE + ax
        inside = ((row >= 0) & (row < H) & (column >= 0) & (column < W))[:, None] & (i < I)[None, :]
        x = tl.load(x_ptr + (row * W + column)[:, None] * I + i[None, :], mask=inside, other=0.0)
        if MODE == "same" or MODE == "up":
            address = (o[None, :] * SIDE * SIDE + tap) * I + i[:, None]
        else:
            address = (i[:, None] * SIDE * SIDE + tap) * O + o[None, :]
        w = tl.load(weight_ptr + address, mask=(i < I)[:, None] & (o < O)[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    if ACTIVATE:
        total = activated(total, demod_ptr, bias_ptr, n, o, O, CLAMP)
    if MODE == "up":
        qy, qx = 2 * qy + py, 2 * qx + px
    address = n * H_OUT * W_OUT * O + (qy * W_OUT + qx)[:, None] * O + o[None, :]
    tl.store(
        y_ptr + address,
        total.to(y_ptr.dtype.element_ty),
        mask=(qy < H_OUT)[:, None] & (o < O)[None, :],
    )


@triton.jit
def _conv_tma_kernel(
    x_desc,
    weight_desc,
    demod_ptr,
    bias_ptr,
    y_ptr,
    H_OUT,
    W_OUT,
    I,
    O,
    UP: tl.constexpr,
    SIDE: tl.constexpr,
    ACTIVATE: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`_conv_kernel` in the modes same and up by tensor descriptors: x [N, H, W, I], weight [N · O, k·k, I].

    What lies outside of x is read as 0; outputs beyond O are of the next frame's kernels, and are not stored.
    Grid: blocks of pixels (with up, of each parity), blocks of o, frames.
    """
    n = tl.program_id(2)
    first_o = tl.program_id(1) * BLOCK_O
    if UP:
        block, py, px = tl.program_id(0) // 4, tl.program_id(0) // 2 % 2, tl.program_id(0) % 2
        across, rows, columns = (W_OUT + 1) // 2, (SIDE + 1 - py) // 2, (SIDE + 1 - px) // 2
    else:
        block, across, rows, columns = tl.program_id(0), W_OUT, SIDE, SIDE
    across = tl.cdiv(across, BLOCK_X)
    top, left = block // across * BLOCK_Y, block % across * BLOCK_X
    taps = rows * columns
    total = tl.zeros([BLOCK_Y * BLOCK_X, BLOCK_O], tl.float32)
    for step in range(taps * tl.cdiv(I, BLOCK_I)):
        ay, ax = step % taps // columns, step % taps % columns
        i = step // taps * BLOCK_I
        if UP:
            row, column, tap = top - ay, left - ax, (py + 2 * ay) * SIDE + px + 2 * ax
        else:
            row, column, tap = top + ay - SIDE // 2, left + ax - SIDE // 2, ay * SIDE + ax
        x = x_desc.load([n, row, column, i]).reshape([BLOCK_Y * BLOCK_X, BLOCK_I])
        w = weight_desc.load([n * O + first_o, tap, i]).reshape([BLOCK_O, BLOCK_I])
        total = tl.dot(x, w.T, total, input_precision=PRECISION)
    n = n.to(tl.int64)
    o = first_o + tl.arange(0, BLOCK_O)
    if ACTIVATE:
        total = activated(total, demod_ptr, bias_ptr, n, o, O, CLAMP)
    pixel = tl.arange(0, BLOCK_Y * BLOCK_X)
    qy, qx = top + pixel // BLOCK_X, left + pixel % BLOCK_X
    if UP:
        qy, qx = 2 * qy + py, 2 * qx + px
    address = n * H_OUT * W_OUT * O + (qy * W_OUT + qx)[:, None] * O + o[None, :]
    inside = ((qy < H_OUT) & (qx < W_OUT))[:, None] & (o < O)[None, :]
    tl.store(y_ptr + address, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grad_weight_kernel(
    grad_ptr,
    x_ptr,
    grad_weight_ptr,
    H,
    W,
    H_OUT,
    W_OUT,
    I,
    O,
    UP: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """∂y [N, H_OUT, W_OUT, O], x [N, H, W, I] → ∂W [N, O, k·k, I]. Grid: blocks of o × of i, taps, frames."""
    n = tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(I, BLOCK_I)
    o = tl.program_id(0) // blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    tap = tl.program_id(1)
    ay, ax = tap // SIDE, tap % SIDE
    grad_ptr += n * H_OUT * W_OUT * O
    x_ptr += n * H * W * I
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for step in range(
        tl.cdiv(H * W, BLOCK_P)
    ):  # over the pixels of x; with same padding y has as many
        pixel = step * BLOCK_P + tl.arange(0, BLOCK_P)
        row, column = pixel // W, pixel % W
        if UP:
            qy, qx = 2 * row + ay, 2 * column + ax
        else:
            qy, qx = row - ay + SIDE // 2, column - ax + SIDE // 2
        inside = (row < H) & (qy >= 0) & (qy < H_OUT) & (qx >= 0) & (qx < W_OUT)
        address = (qy * W_OUT + qx)[:, None] * O + o[None, :]
        grad = tl.load(grad_ptr + address, mask=inside[:, None] & (o < O)[None, :], other=0.0)
        x = tl.load(
            x_ptr + pixel[:, None] * I + i[None, :],
            mask=(row < H)[:, None] & (i < I)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(grad), x, total, input_precision=PRECISION)
    address = ((n * O + o)[:, None] * SIDE * SIDE + tap) * I + i[None, :]
    inside = (o < O)[:, None] & (i < I)[None, :]
    tl.store(grad_weight_ptr + address, total.to(grad_weight_ptr.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------- launchers, registration


def _launch(name, dtype, *sizes):
    """A configuration's tile cut to the sizes, and precision, warps and stages, as launch arguments."""
    *tile, warps, stages = CONFIGS[dtype][name]
    tile = [max(16, min(most, triton.next_power_of_2(size))) for most, size in zip(tile, sizes)]
    return tile, dict(
        PRECISION="ieee" if dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages
    )


def _check(x, weight):
    if x.dtype != weight.dtype or x.dtype not in CONFIGS:
        raise ValueError(
            f"x is {x.dtype} and weight {weight.dtype}: want float32, bfloat16 or float16 for both"
        )
    if len(x) != len(weight) or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x {list(x.shape)} and weight {list(weight.shape)}: want [N, I, H, W] and [N, O, I, k, k]"
        )


def _channels_last(x):
    """[.., C, H, W] → contiguous [.., H, W, C]: nothing to do for a tensor in channels-last memory."""
    return x.movedim(-3, -1).contiguous()


def _up_size(size, side, up):
    return 2 * (size - 1) + side if up == 2 else size


def conv_launch(x, weight, mode, demod=None, bias=None, clamp=None):
    """x [N, C, H, W] through weight [N, O, I, k, k] in a mode of `_conv_kernel`, in channels-last memory.

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
    (block_p, block_o, block_i), launch = _launch("conv", x.dtype, pixels, O, I)
    y = torch.empty([N, H_out, W_out, O], device=x.device, dtype=x.dtype)
    blocks = triton.cdiv(pixels, block_p) * (4 if mode == "up" else 1)
    _conv_kernel[blocks, triton.cdiv(O, block_o), N](
        _channels_last(x),
        _channels_last(weight),
        y if demod is None else demod.contiguous(),
        y if bias is None else bias.contiguous(),
        y,
        H,
        W,
        H_out,
        W_out,
        I,
        O,
        MODE=mode,
        SIDE=side,
        ACTIVATE=demod is not None,
        CLAMP=clamp,
        BLOCK_P=block_p,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        **launch,
    )
    return y.permute(0, 3, 1, 2)


def conv_tma_launch(x, weight, up, demod=None, bias=None, clamp=None):
    """`conv_launch` in the modes same (up 1) and up (up 2), with tensor descriptors. Raises Unsuitable."""
    if not tma_anywhere and not (
        x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    ):
        raise Unsuitable("the device has no TMA")
    (N, I, H, W), (_, O, _, side, _) = x.shape, weight.shape
    if I * x.element_size() % 16:
        raise Unsuitable(f"TMA wants rows of a multiple of 16 bytes, not {I} channels")
    block_y, block_x, block_o, block_i, warps, stages = TMA_CONFIGS[x.dtype]
    block_o, block_i = (
        max(16, min(most, triton.next_power_of_2(size)))
        for most, size in ((block_o, O), (block_i, I))
    )
    x, weight = _channels_last(x), _channels_last(weight).flatten(2, 3).flatten(0, 1)
    H_out, W_out = (_up_size(size, side, up) for size in (H, W))
    y = torch.empty([N, H_out, W_out, O], device=x.device, dtype=x.dtype)
    rows, columns = ((size + 1) // 2 for size in (H_out, W_out)) if up == 2 else (H_out, W_out)
    blocks = triton.cdiv(rows, block_y) * triton.cdiv(columns, block_x) * (4 if up == 2 else 1)
    _conv_tma_kernel[blocks, triton.cdiv(O, block_o), N](
        TensorDescriptor.from_tensor(x, [1, block_y, block_x, block_i]),
        TensorDescriptor.from_tensor(weight, [block_o, 1, block_i]),
        y if demod is None else demod.contiguous(),
        y if bias is None else bias.contiguous(),
        y,
        H_out,
        W_out,
        I,
        O,
        UP=up == 2,
        SIDE=side,
        ACTIVATE=demod is not None,
        CLAMP=clamp,
        BLOCK_Y=block_y,
        BLOCK_X=block_x,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
    )
    return y.permute(0, 3, 1, 2)


def grad_weight_launch(grad, x, side, up):
    """Gradient of the kernels [N, O, I, k, k], in channels-last memory."""
    (N, O, H_out, W_out), (_, I, H, W) = grad.shape, x.shape
    (block_o, block_i, block_p), launch = _launch("weight", x.dtype, O, I, H * W)
    grad_weight = torch.empty([N, O, side, side, I], device=x.device, dtype=x.dtype)
    grid = triton.cdiv(O, block_o) * triton.cdiv(I, block_i), side * side, N
    _grad_weight_kernel[grid](
        _channels_last(grad),
        _channels_last(x),
        grad_weight,
        H,
        W,
        H_out,
        W_out,
        I,
        O,
        UP=up == 2,
        SIDE=side,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
        BLOCK_P=block_p,
        **launch,
    )
    return grad_weight.movedim(-1, 2)


# ------------------------------------------------------------------------------------------- candidates, registration


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
    """Batched matrix products with the unfolded input; with up=2 of the input, whose result is folded."""
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
    """Convolution with one kernel per frame. x: [N, I, H, W], weight: [N, O, I, k, k], of one dtype, in any layout.

    Returns [N, O, H, W] ('same' padding, k odd), or with up=2 [N, O, 2H + k - 2, 2W + k - 2] (without its FIR), in
    channels-last memory. Differentiable once. Raises ValueError on shapes or dtypes that do not go together.
    """
    _check(x, weight)
    return conv_op(x, weight, up)


def conv2d_epilogue(x, weight, demod, bias, clamp=None):
    """`conv2d_per_frame` without up, then `kernels.fir.epilogue`: a synthesis layer without FIR, in one pass.

    Raises ValueError as `conv2d_per_frame` does.
    """
    _check(x, weight)
    return conv_epilogue_op(x, weight, demod, bias, None if clamp is None else float(clamp))
