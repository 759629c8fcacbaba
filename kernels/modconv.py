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
flipped ("flipped"), that of `up` is the ordinary convolution of stride 2 ("down"). The gradient to
the kernels is a product over pixels, tap by tap. Sums are float32 and have one order: runs repeat
exactly. Differentiable once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import reference
from kernels.choose import Op, Unsuitable, registered
from kernels.fir import EPILOGUE, activated, epilogue_backward_op, of_channels
from kernels.launch import channels_first, channels_last, clamps, constants, edge, float32_twin

# Tile of (pixels, output channels, inner dimension), warps, stages, by dtype: convolution, and
# gradient to the kernels (there output channels, input channels, pixels). Chosen from the report of
# `bench/kernels.py --aot`; not yet timed.
CONFIGS = {
    torch.float32: {"conv": (32, 32, 32, 4, 2), "weight": (32, 32, 32, 4, 2)},
    torch.bfloat16: {"conv": (128, 128, 64, 8, 3), "weight": (128, 128, 64, 8, 3)},
}
CONFIGS[torch.float16] = CONFIGS[torch.bfloat16]
# With TMA: rows × columns of a tile of pixels.
TMA_TILES = {torch.float32: (4, 8), torch.bfloat16: (8, 16), torch.float16: (8, 16)}
TRANSPOSE = {"same": "flipped", "up": "down"}
tma_anywhere = False  # for Triton's interpreter, which has no compute capability


class Convolution(NamedTuple):
    """What the kernels know of a call. MODE: same, up, or their transposes flipped, down."""

    H: int
    W: int
    H_OUT: int
    W_OUT: int
    I: int
    O: int
    SIDE: tl.constexpr
    MODE: tl.constexpr
    PRECISION: tl.constexpr
    BLOCK_P: tl.constexpr  # the tile: pixels, as BLOCK_Y rows and BLOCK_X columns with TMA
    BLOCK_O: tl.constexpr
    BLOCK_I: tl.constexpr
    ACTIVATE: tl.constexpr = tl.constexpr(False)  # the epilogue too
    CLAMPS: tl.constexpr = tl.constexpr(False)
    CLAMP: tl.constexpr = tl.constexpr(0.0)
    BLOCK_Y: tl.constexpr = tl.constexpr(1)
    BLOCK_X: tl.constexpr = tl.constexpr(1)


@triton.jit
def _taps(S):
    """Of a program: block of pixels, and with up their parity; rows and columns of taps that they
    share. Pixel q of parity p is pixel 2q + p of y, its taps are p + 2a, and x's pixel is q − a.
    """
    block, py, px = tl.program_id(0), 0, 0
    rows, columns = S.SIDE, S.SIDE
    if S.MODE == "up":
        block, py, px = tl.program_id(0) // 4, tl.program_id(0) // 2 % 2, tl.program_id(0) % 2
        rows, columns = (S.SIDE + 1 - py) // 2, (S.SIDE + 1 - px) // 2
    return block, py, px, rows, columns


@triton.jit
def _finish(epilogue, y_ptr, total, n, o, qy, qx, py, px, S):
    """Stores a tile, after its epilogue. (qy, qx): its pixels, of a parity with up."""
    if S.ACTIVATE:
        demod, bias = of_channels(epilogue[0], epilogue[1], n, o, S.O)
        total = activated(total, demod, bias, S)
    if S.MODE == "up":
        qy, qx = 2 * qy + py, 2 * qx + px
    address = n * S.H_OUT * S.W_OUT * S.O + (qy * S.W_OUT + qx)[:, None] * S.O + o[None, :]
    inside = ((qy < S.H_OUT) & (qx < S.W_OUT))[:, None] & (o < S.O)[None, :]
    tl.store(y_ptr + address, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _conv_kernel(x_ptr, weight_ptr, epilogue, y_ptr, S):
    """x [N, H, W, I] → y; weight [N, O, k·k, I], or of a transpose [N, I, k·k, O]. Grid: blocks of
    pixels (with up, of each parity), blocks of o, frames.
    """
    n = tl.program_id(2).to(tl.int64)
    o = tl.program_id(1) * S.BLOCK_O + tl.arange(0, S.BLOCK_O)
    x_ptr += n * S.H * S.W * S.I
    weight_ptr += n * S.O * S.I * S.SIDE * S.SIDE
    block, py, px, rows, columns = _taps(S)
    across = S.W_OUT
    if S.MODE == "up":
        across = (S.W_OUT + 1 - px) // 2
    pixel = block * S.BLOCK_P + tl.arange(0, S.BLOCK_P)
    qy, qx = pixel // across, pixel % across
    total = tl.zeros([S.BLOCK_P, S.BLOCK_O], tl.float32)
    blocks = tl.cdiv(S.I, S.BLOCK_I)
    for step in range(blocks * rows * columns):
        ay, ax = step // blocks // columns, step // blocks % columns
        i = step % blocks * S.BLOCK_I + tl.arange(0, S.BLOCK_I)
        tap = ay * S.SIDE + ax
        if S.MODE == "up":
            row, column, tap = qy - ay, qx - ax, (py + 2 * ay) * S.SIDE + px + 2 * ax
        elif S.MODE == "down":
            row, column = 2 * qy + ay, 2 * qx + ax
        elif S.MODE == "same":
            row, column = qy + ay - S.SIDE // 2, qx + ax - S.SIDE // 2
        else:
            row, column = qy - ay + S.SIDE // 2, qx - ax + S.SIDE // 2
        inside = (row >= 0) & (row < S.H) & (column >= 0) & (column < S.W)
        address = (row * S.W + column)[:, None] * S.I + i[None, :]
        x = tl.load(x_ptr + address, mask=inside[:, None] & (i < S.I)[None, :], other=0.0)
        if S.MODE == "same" or S.MODE == "up":
            address = (o[None, :] * S.SIDE * S.SIDE + tap) * S.I + i[:, None]
        else:
            address = (i[:, None] * S.SIDE * S.SIDE + tap) * S.O + o[None, :]
        w = tl.load(weight_ptr + address, mask=(i < S.I)[:, None] & (o < S.O)[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision=S.PRECISION)
    _finish(epilogue, y_ptr, total, n, o, qy, qx, py, px, S)


@triton.jit
def _conv_tma_kernel(x_desc, weight_desc, epilogue, y_ptr, S):
    """`_conv_kernel` in the modes same and up by tensor descriptors; weight [N · O, k·k, I]. What
    is outside of x is read as 0; outputs beyond O, of the next frame's kernels, are not stored.
    """
    n = tl.program_id(2)
    first_o = tl.program_id(1) * S.BLOCK_O
    block, py, px, rows, columns = _taps(S)
    across = tl.cdiv(S.W_OUT, S.BLOCK_X)
    if S.MODE == "up":
        across = tl.cdiv((S.W_OUT + 1) // 2, S.BLOCK_X)
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
    o = first_o + tl.arange(0, S.BLOCK_O)
    pixel = tl.arange(0, S.BLOCK_Y * S.BLOCK_X)
    qy, qx = top + pixel // S.BLOCK_X, left + pixel % S.BLOCK_X
    _finish(epilogue, y_ptr, total, n.to(tl.int64), o, qy, qx, py, px, S)


@triton.jit
def _grad_weight_kernel(grad_ptr, x_ptr, grad_weight_ptr, S):
    """∂y, x [N, H, W, I] → ∂W [N, O, k·k, I]. Grid: blocks of o × of i, taps, frames."""
    n = tl.program_id(2).to(tl.int64)
    blocks = tl.cdiv(S.I, S.BLOCK_I)
    o = tl.program_id(0) // blocks * S.BLOCK_O + tl.arange(0, S.BLOCK_O)
    i = tl.program_id(0) % blocks * S.BLOCK_I + tl.arange(0, S.BLOCK_I)
    tap = tl.program_id(1)
    ay, ax = tap // S.SIDE, tap % S.SIDE
    grad_ptr += n * S.H_OUT * S.W_OUT * S.O
    x_ptr += n * S.H * S.W * S.I
    total = tl.zeros([S.BLOCK_O, S.BLOCK_I], tl.float32)
    for step in range(tl.cdiv(S.H * S.W, S.BLOCK_P)):  # over the pixels of x
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


# ---------------------------------------------------------------------------------------- launchers


def _describe(x, sizes, side, mode, config, *tile_of):
    """sizes: H, W, H_OUT, W_OUT, I, O; config: a tile of CONFIGS, which is cut to tile_of."""
    tile = [edge(size, most, least=16) for size, most in zip(tile_of, config)]
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    return Convolution(*sizes, *map(tl.constexpr, (side, mode, precision, *tile)))


def conv_launch(x, weight, mode, demod=None, bias=None, clamp=None, tma=False):
    """x through weight in a mode of `_conv_kernel`, and the epilogue of a layer without FIR."""
    (N, _, H, W), (_, O, I, side, _) = x.shape, weight.shape
    size = {"up": lambda n: 2 * n + side - 2, "down": lambda n: (n - side) // 2 + 1}
    H_out, W_out = map(size.get(mode, int), (H, W))
    if mode in TRANSPOSE.values():
        O, I = I, O
    rows, columns, parities = H_out, W_out, 1
    if mode == "up":  # of the largest parity
        rows, columns, parities = (H_out + 1) // 2, (W_out + 1) // 2, 4
    *tile, warps, stages = CONFIGS[x.dtype]["conv"]
    S = _describe(x, (H, W, H_out, W_out, I, O), side, mode, tile, rows * columns, O, I)
    S = S._replace(**constants(ACTIVATE=demod is not None), **clamps(clamp))
    x, weight = channels_last(x), channels_last(weight)
    y = torch.empty([N, H_out, W_out, O], device=x.device, dtype=x.dtype)
    kernel, sources, blocks = (
        _conv_kernel,
        (x, weight),
        triton.cdiv(rows * columns, S.BLOCK_P.value),
    )
    if tma:
        high, wide = TMA_TILES[x.dtype]
        S = S._replace(**constants(BLOCK_P=high * wide, BLOCK_Y=high, BLOCK_X=wide))
        kernel, blocks = _conv_tma_kernel, triton.cdiv(rows, high) * triton.cdiv(columns, wide)
        o, i = S.BLOCK_O.value, S.BLOCK_I.value
        sources = (
            TensorDescriptor.from_tensor(x, [1, high, wide, i]),
            TensorDescriptor.from_tensor(weight.flatten(2, 3).flatten(0, 1), [o, 1, i]),
        )
    epilogue = (y, y) if demod is None else (demod.contiguous(), bias.contiguous())
    grid = blocks * parities, triton.cdiv(O, S.BLOCK_O.value), N
    kernel[grid](*sources, epilogue, y, S, num_warps=warps, num_stages=stages)
    return channels_first(y)


def conv_tma_launch(x, weight, mode, *epilogue):
    """`conv_launch` with tensor descriptors. Raises Unsuitable."""
    if mode in TRANSPOSE.values():
        raise Unsuitable("transposes have no kernel with TMA")
    hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    if not hopper and not tma_anywhere:
        raise Unsuitable("the device has no TMA")
    if x.shape[1] * x.element_size() % 16:
        raise Unsuitable(f"TMA wants rows of a multiple of 16 bytes, not {x.shape[1]} channels")
    return conv_launch(x, weight, mode, *epilogue, tma=True)


def grad_weight_launch(grad, x, side, mode):
    """Gradient of the kernels [N, O, I, k, k], in channels-last memory."""
    (N, O, H_out, W_out), (_, I, H, W) = grad.shape, x.shape
    *tile, warps, stages = CONFIGS[x.dtype]["weight"]
    tile = tile[2], *tile[:2]  # pixels are the inner dimension
    S = _describe(x, (H, W, H_out, W_out, I, O), side, mode, tile, H * W, O, I)
    grad_weight = torch.empty([N, O, side, side, I], device=x.device, dtype=x.dtype)
    grid = triton.cdiv(O, S.BLOCK_O.value) * triton.cdiv(I, S.BLOCK_I.value), side * side, N
    inputs = channels_last(grad), channels_last(x)
    _grad_weight_kernel[grid](*inputs, grad_weight, S, num_warps=warps, num_stages=stages)
    return channels_first(grad_weight)


# ------------------------------------------------------------------------- candidates, registration


def looped(x, weight, up):
    """One convolution of cuDNN after another."""
    return torch.cat([reference.conv2d_shared(f, w, up) for f, w in zip(x.split(1), weight)])


def unfolded(x, weight, up):
    """Matrix products with the unfolded input; with up=2 of the input, with a folded result."""
    N, O, I, k, _ = weight.shape
    H, W = x.shape[2:]
    if up == 2:
        columns = weight.flatten(3).permute(0, 1, 3, 2).reshape(N, O * k * k, I) @ x.flatten(2)
        return torch.nn.functional.fold(columns, (2 * H + k - 2, 2 * W + k - 2), k, stride=2)
    columns = torch.nn.functional.unfold(x, k, padding=k // 2)
    return (weight.flatten(2) @ columns).view(N, O, H, W)


PLAIN_CONVOLUTIONS = {
    "cuDNN grouped": reference.conv2d_grouped,  # all frames side by side on channels
    "cuDNN looped": looped,
    "matrix products": unfolded,
}


def _plain(convolution, epilogue):
    """A convolution (x, weight, up) as an implementation of the op, with what follows it."""

    def run(x, weight, mode, demod=None, bias=None, clamp=None):
        if mode in TRANSPOSE:
            y = convolution(x, weight, 2 if mode == "up" else 1)
        elif convolution in (looped, unfolded):
            raise Unsuitable("the grouped convolution alone has its transpose")
        else:
            y = reference.conv2d_per_frame_grad_x(x, weight, 2 if mode == "down" else 1)
        y = y.contiguous(memory_format=torch.channels_last)
        return y if demod is None else epilogue(y, demod, bias, 1, clamp)

    return run


CONV = Op(
    "conv2d_per_frame",
    float32_twin(_plain(reference.conv2d_per_frame, reference.epilogue)),
    {"Triton TMA": conv_tma_launch, "Triton": conv_launch}
    | {name: _plain(convolution, EPILOGUE) for name, convolution in PLAIN_CONVOLUTIONS.items()},
)


def _grad_weight(grad, x, side, mode):
    of = reference.conv2d_per_frame_grad_weight(grad, x, side, 2 if mode == "up" else 1)
    return channels_first(channels_last(of))


GRAD_WEIGHT = Op(
    "conv2d_per_frame_grad_weight",
    float32_twin(_grad_weight),
    {"Triton": grad_weight_launch, "cuDNN grouped": _grad_weight},
)


def _keep(inputs, output):
    x, weight, mode, demod, bias, clamp = inputs
    return (x, weight, demod, bias, None if demod is None else output), (mode, clamp)


def _gradient(ctx, grad):
    (x, weight, demod, bias, y), (mode, clamp) = ctx.saved_tensors, ctx.settings
    grad_x = grad_weight = grad_demod = grad_bias = None
    if demod is not None:
        grad, grad_demod, grad_bias = epilogue_backward_op(grad, y, demod, bias, 1, clamp)
    if ctx.needs_input_grad[0]:
        grad_x = conv_op(grad, weight, TRANSPOSE[mode], None, None, None)
    if ctx.needs_input_grad[1]:
        grad_weight = grad_weight_op(grad, x, weight.shape[-1], mode)
    return grad_x, grad_weight, None, grad_demod, grad_bias, None


grad_weight_op = registered(GRAD_WEIGHT, "(Tensor grad, Tensor x, int side, str mode) -> Tensor")
conv_op = registered(
    CONV,
    "(Tensor x, Tensor weight, str mode, Tensor? demod, Tensor? bias, float? clamp) -> Tensor",
    _keep,
    _gradient,
)


def conv2d(x, weight, up=1, demod=None, bias=None, clamp=None):
    """Convolution with one kernel per frame. x: [N, I, H, W], weight: [N, O, I, k, k], of one
    dtype, in any layout; with demod and bias, and without up, then `fir.epilogue` in one pass.

    Returns [N, O, H, W] ('same' padding, k odd), or with up=2 [N, O, 2H + k - 2, 2W + k - 2]
    (without its FIR), in channels-last memory. Differentiable once. Raises ValueError on shapes or
    dtypes that do not go together.
    """
    if x.dtype != weight.dtype or x.dtype not in CONFIGS:
        raise ValueError(
            f"x is {x.dtype} and weight {weight.dtype}: want float32, bfloat16 or float16 for both"
        )
    if len(x) != len(weight) or x.shape[1] != weight.shape[2]:
        shapes = f"x {list(x.shape)} and weight {list(weight.shape)}"
        raise ValueError(f"{shapes}: want [N, I, H, W] and [N, O, I, k, k]")
    return conv_op(x, weight, "up" if up == 2 else "same", demod, bias, clamp)
