"""MoStAtt from its rank factors (spec §5, Eq. 2), forward and backward. For frame n of clip b, with
j = (i, y, x):

    W[o,j]     = weight[o,j] · s[i]            s: content style of the clip (strategy i), else 1
    M_κ[j]     = Σ_r a_r[i] b_r[y] c_r[x] / √R        never in memory: tile by tile in registers
    score[o,κ] = ⟨W[o], M_κ⟩ / √J,  A = softmax_κ score           J = I·k·k
    P[o,j]     = Σ_κ A[o,κ] M_κ[j]                 K ≤ 16: cheaper to compute twice than to store
    p          = max over (o,j) of |P|
    F[o,j]     = 1 + leaky_relu(P[o,j] / p)
    W'[o,j]    = weight[o,j] · s[i] · F[o,j],  demod[o] = rsqrt(Σ_j W'² + 1e-8)

The two strategies of paper 4.3 differ in the score alone. The scores are one matrix product of the
weights, a row per (o, y, x), with the factors a · s of all frames, which a kernel then sums with b
· c over taps and ranks. Two kernels follow: p, then W'. The weights are read as they are stored: a
copy per clip, times s, is made nowhere. Weights are read and written as [.., O, k·k, I], channels
last. Sums are float32 and have one order: runs repeat exactly. The gradient is in
mostatt_backward.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.choose import Op

# A tile's output channels and input channels, warps, pipeline stages; by whether tensor cores may
# round to tf32. Chosen from the resource report of `bench/kernels.py --aot`; not yet timed.
CONFIGS = {
    "tf32": {
        "peak": (64, 64, 4, 2),
        "modulate": (64, 64, 8, 2),
        "attention": (64, 64, 8, 1),
        "motion": (32, 64, 8, 2),
        "content": (32, 64, 8, 1),
    },
    "ieee": {
        "peak": (64, 32, 4, 2),
        "modulate": (32, 32, 4, 2),
        "attention": (32, 32, 4, 2),
        "motion": (32, 32, 8, 1),
        "content": (32, 32, 8, 2),
    },
}
SCORE_TILE = 16, 64  # output channels, and frames × styles, of a tile of scores


class Shape(NamedTuple):
    """What the kernels know of a layer and a batch. Frame n is of row n // T of the weights, n //
    T_STYLE of s.
    """

    T: int
    T_STYLE: int
    O: int
    I: int
    K: int
    PEAKS: int  # blocks of output channels, each with a maximum of |P|
    K_P: tl.constexpr  # K and PEAKS, padded to powers of two
    PEAKS_P: tl.constexpr
    R: tl.constexpr
    SIDE: tl.constexpr
    TAPS: tl.constexpr
    INVERSE_ROOT: tl.constexpr  # 1 / √J
    HAS_STYLE: tl.constexpr
    CONTENT_FIRST: tl.constexpr
    PRECISION: tl.constexpr


@triton.jit
def motion(style_ptr, row, is_row, i, tap, S):
    """M_κ[i, tap] for style rows (frame · K + κ) → float32 [len(row), len(i)], 0 outside."""
    m = tl.zeros([row.shape[0], i.shape[0]], tl.float32)
    for r in range(S.R):
        factors = style_ptr + (row * S.R + r) * (S.I + 2 * S.SIDE)
        inside = is_row[:, None] & (i < S.I)[None, :]
        a = tl.load(factors[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(factors + S.I + tap // S.SIDE, mask=is_row, other=0.0).to(tl.float32)
        c = tl.load(factors + S.I + S.SIDE + tap % S.SIDE, mask=is_row, other=0.0).to(tl.float32)
        m += a * (b * c * S.R**-0.5)[:, None]
    return m


@triton.jit
def attention(score_ptr, n, o, kappa, S):
    """A = softmax over κ of frame n's scores → [len(o), len(kappa)], 0 outside."""
    inside = (o < S.O)[:, None] & (kappa < S.K)[None, :]
    address = score_ptr + (n * S.O + o)[:, None] * S.K + kappa[None, :]
    score = tl.load(address, mask=inside, other=0.0)
    score = tl.where((kappa < S.K)[None, :], score, float("-inf"))
    e = tl.exp(score - tl.max(score, axis=1)[:, None])
    return tl.where(inside, e / tl.sum(e, axis=1)[:, None], 0.0)


@triton.jit
def inverse_peak(peak_ptr, n, S):
    """1 / p of frame n from the maxima of its blocks of o; 0 where P is nothing, for there P̂ must
    be 0.
    """
    block = tl.arange(0, S.PEAKS_P)
    peak = tl.max(tl.load(peak_ptr + n * S.PEAKS + block, mask=block < S.PEAKS, other=0.0), axis=0)
    return tl.where(peak > 2e-38, 1.0 / tl.maximum(peak, 2e-38), 0.0)


@triton.jit
def content_tile(content_ptr, content_style_ptr, n, o, i, tap, S):
    """For frame n: weight [len(o), len(i)] at a tap, where it is, and the content style s [len(i)],
    1 without one.
    """
    inside = (o < S.O)[:, None] & (i < S.I)[None, :]
    address = (o[:, None] * S.TAPS + tap) * S.I + i[None, :]
    row = n // S.T * S.O * S.TAPS * S.I
    w = tl.load(content_ptr + row + address, mask=inside, other=0.0).to(tl.float32)
    s = tl.full([i.shape[0]], 1.0, tl.float32)
    if S.HAS_STYLE:
        style = content_style_ptr + n // S.T_STYLE * S.I
        s = tl.load(style + i, mask=i < S.I, other=0.0).to(tl.float32)
    return w, address, inside, s


@triton.jit
def _scores_kernel(
    product_ptr, style_ptr, score_ptr, S, BLOCK_O: tl.constexpr, COLUMNS: tl.constexpr
):
    """Σ over taps and ranks of product [B, O, k·k, T, K, R] times b · c → score [B·T, O, K].

    A column is (frame of the row of the weights, κ). Grid: blocks of o, of columns, rows of the
    weights.
    """
    row = tl.program_id(2).to(tl.int64)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = S.T * S.K
    inside = (o < S.O)[:, None] & (column < columns)[None, :]
    score = tl.zeros([BLOCK_O, COLUMNS], tl.float32)
    for step in range(S.TAPS * S.R):
        tap, r = step // S.R, step % S.R
        factors = style_ptr + ((row * columns + column) * S.R + r) * (S.I + 2 * S.SIDE) + S.I
        b = tl.load(factors + tap // S.SIDE, mask=column < columns, other=0.0).to(tl.float32)
        c = tl.load(factors + S.SIDE + tap % S.SIDE, mask=column < columns, other=0.0)
        address = ((row * S.O + o)[:, None] * S.TAPS + tap) * columns + column[None, :]
        product = tl.load(product_ptr + address * S.R + r, mask=inside, other=0.0)
        score += product * (b * c.to(tl.float32))[None, :]
    frame = row * S.T + column // S.K
    address = (frame * S.O)[None, :] * S.K + o[:, None] * S.K + (column % S.K)[None, :]
    tl.store(score_ptr + address, score * (S.INVERSE_ROOT * S.R**-0.5), mask=inside)


@triton.jit
def _peak_kernel(score_ptr, style_ptr, peak_ptr, S, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """max |P| of a block of o → peak [N, blocks]. Grid: blocks of o, frames."""
    n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    kappa = tl.arange(0, S.K_P)
    A = attention(score_ptr, n, o, kappa, S)
    peak = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for step in range(tl.cdiv(S.I, BLOCK_I) * S.TAPS):
        i = step // S.TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
        m = motion(style_ptr, n * S.K + kappa, kappa < S.K, i, step % S.TAPS, S)
        peak = tl.maximum(peak, tl.abs(tl.dot(A, m, input_precision=S.PRECISION)))
    largest = tl.max(tl.max(peak, axis=1), axis=0)
    tl.store(peak_ptr + n * tl.num_programs(0) + tl.program_id(0), largest)


@triton.jit
def _modulate_kernel(
    content,
    score_ptr,
    peak_ptr,
    weight_ptr,
    demod_ptr,
    S,
    WANT_WEIGHT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """W' = weight · s · F, once to memory, and demod beside it. Grid: blocks of o, frames."""
    content_ptr, style_ptr, content_style_ptr = content
    n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    kappa = tl.arange(0, S.K_P)
    A = attention(score_ptr, n, o, kappa, S) * inverse_peak(peak_ptr, n, S)
    squares = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for step in range(tl.cdiv(S.I, BLOCK_I) * S.TAPS):
        tap = step % S.TAPS
        i = step // S.TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
        w, address, inside, s = content_tile(content_ptr, content_style_ptr, n, o, i, tap, S)
        m = motion(style_ptr, n * S.K + kappa, kappa < S.K, i, tap, S)
        P = tl.dot(A, m, input_precision=S.PRECISION)  # P / p
        w *= s[None, :]
        w += w * tl.maximum(P, 0.2 * P)
        squares += w * w
        if WANT_WEIGHT:
            target = weight_ptr + n * S.O * S.TAPS * S.I + address
            tl.store(target, w.to(weight_ptr.dtype.element_ty), mask=inside)
    demod = 1.0 / tl.sqrt(tl.sum(squares, axis=1) + 1e-8)
    tl.store(demod_ptr + n * S.O + o, demod, mask=o < S.O)


def block_size(size, most, least=16):
    """Tile edge: the power of two that holds `size`, within what the tensor cores want and the
    configuration allows.
    """
    return max(least, min(most, triton.next_power_of_2(size)))


def tap_major(weight):
    """[.., O, I, k, k] → [.., O, k, k, I], contiguous: nothing to do for channels-last weights."""
    return weight.movedim(-3, -1).contiguous()


def precision_of(dtype):
    return "ieee" if dtype == torch.float32 else "tf32"


def peak_rows(O, precision):
    """Output channels of a block, of which `peak` holds one maximum."""
    return block_size(O, CONFIGS[precision]["peak"][0])


def peak_blocks(O, precision):
    return triton.cdiv(O, peak_rows(O, precision))


def tile(name, shape):
    """Configuration of a kernel as launch arguments: tile, warps, stages."""
    rows, columns, warps, stages = CONFIGS[shape.PRECISION.value][name]
    edges = {"BLOCK_O": block_size(shape.O, rows), "BLOCK_I": block_size(shape.I, columns)}
    return edges | {"num_warps": warps, "num_stages": stages}


def check(weight, motion_style, content_style):
    """Raises ValueError on shapes that do not go together."""
    B, O, I, side, _ = weight.shape
    N, K, R, factors = motion_style.shape
    if N % B or factors != I + 2 * side or not 1 <= K <= 16 or weight.shape[4] != side:
        raise ValueError(
            f"weight {list(weight.shape)}, motion style {list(motion_style.shape)}: want "
            "[B, O, I, k, k] and [N, K, R, I + 2k], N a multiple of B and K at most 16"
        )
    if content_style is not None:
        clips, channels = content_style.shape
        if N % clips or clips % B or channels != I:
            raise ValueError(
                f"content style {list(content_style.shape)}: want [clips, {I}], clips a divisor of "
                f"{N} "
                f"and a multiple of {B}"
            )


def shape_of(weight, motion_style, content_style, dtype, content_first):
    """The Shape of a call, whose arguments are checked."""
    check(weight, motion_style, content_style)
    (B, O, I, side, _), (N, K, R, _) = weight.shape, motion_style.shape
    clips = N if content_style is None else len(content_style)
    has_style, precision = content_style is not None, precision_of(dtype)
    peaks = peak_blocks(O, precision)
    sizes = N // B, N // clips, O, I, K, peaks
    constants = block_size(K, 16), triton.next_power_of_2(peaks), R, side, side * side
    flags = (I * side * side) ** -0.5, has_style, has_style and content_first, precision
    return Shape(*sizes, *map(tl.constexpr, constants + flags))


def scores(content, motion_style, content_style, shape, dtype):
    """score [N, O, K] of Eq. 2. content: [B, O, k, k, I]; the product is in dtype, its sums are
    float32.
    """
    B, (N, K), I = len(content), motion_style.shape[:2], shape.I
    a = motion_style[..., :I]
    if shape.CONTENT_FIRST.value:
        of_clips = a.unflatten(0, (len(content_style), -1))
        a = (of_clips * content_style[:, None, None, None]).flatten(0, 1)
    a = a.reshape(B, -1, I).transpose(1, 2)  # [B, I, T·K·R]
    rows = content.view(B, -1, I)
    if dtype != torch.float32 and content.is_cuda:
        product = torch.bmm(rows.to(dtype), a.to(dtype), out_dtype=torch.float32)
    else:
        product = rows.float() @ a.float()
    score = torch.empty([N, shape.O, K], device=content.device, dtype=torch.float32)
    block_o, columns = block_size(shape.O, SCORE_TILE[0]), block_size(N // B * K, SCORE_TILE[1])
    grid = triton.cdiv(shape.O, block_o), triton.cdiv(N // B * K, columns), B
    _scores_kernel[grid](
        product, motion_style, score, shape, BLOCK_O=block_o, COLUMNS=columns, num_warps=4
    )
    return score


def forward(weight, motion_style, content_style, dtype, want_weight, content_first):
    """Launches the forward kernels; see `mostatt`. Returns W', score, demod, and peak [N, blocks of
    o].
    """
    shape = shape_of(weight, motion_style, content_style, dtype, content_first)
    content, style, (N, O) = (
        tap_major(weight),
        motion_style.contiguous(),
        (len(motion_style), shape.O),
    )
    s = content if content_style is None else content_style.contiguous()
    score = scores(content, style, content_style, shape, dtype)
    demod = torch.empty([N, O], device=weight.device, dtype=torch.float32)
    peak = torch.empty([N, shape.PEAKS], device=weight.device, dtype=torch.float32)
    size = [N, *content.shape[1:]] if want_weight else [0]
    modulated = torch.empty(size, device=weight.device, dtype=dtype)
    _peak_kernel[shape.PEAKS, N](score, style, peak, shape, **tile("peak", shape))
    launch = tile("modulate", shape)
    _modulate_kernel[triton.cdiv(O, launch["BLOCK_O"]), N](
        (content, style, s), score, peak, modulated, demod, shape, WANT_WEIGHT=want_weight, **launch
    )
    return modulated.movedim(-1, -3) if want_weight else modulated, score, demod, peak


def twin(weight, motion_style, content_style, dtype, want_weight, content_first):
    """`forward` in plain PyTorch and float32."""
    style = motion_style.float()
    s = None if content_style is None else content_style.float()
    modulated, score, demod = reference.mostatt_demod(
        weight.float(), style, s, dtype, want_weight, content_first=content_first
    )
    if want_weight:
        modulated = tap_major(modulated).movedim(-1, -3)
    O, I, side, _ = weight.shape[1:]
    P = score.softmax(dim=2) @ reference.motion_modulation(style, I, side)
    rows = peak_rows(O, precision_of(dtype))
    peak = torch.stack([block.abs().amax(dim=(1, 2)) for block in P.split(rows, dim=1)], dim=1)
    return modulated, score.contiguous(), demod, peak


MOSTATT = Op("mostatt", twin, {"Triton": forward})


@torch.library.custom_op("mostgan::mostatt", mutates_args=())
def mostatt_op(
    weight: Tensor,
    motion_style: Tensor,
    content_style: Tensor | None,
    dtype: torch.dtype,
    want_weight: bool,
    content_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward` as an op of PyTorch's, opaque to the compiler."""
    return MOSTATT(weight, motion_style, content_style, dtype, want_weight, content_first)


@mostatt_op.register_fake
def _(weight, motion_style, content_style, dtype, want_weight, content_first):
    (O, I, side, _), (N, K) = weight.shape[1:], motion_style.shape[:2]
    modulated = weight.new_empty([N, O, side, side, I] if want_weight else [0], dtype=dtype)
    score, demod, peak = (
        weight.new_empty(shape, dtype=torch.float32)
        for shape in ([N, O, K], [N, O], [N, peak_blocks(O, precision_of(dtype))])
    )
    return modulated.movedim(-1, -3) if want_weight else modulated, score, demod, peak


def mostatt(
    weight, motion_style, content_style=None, dtype=None, want_weight=True, content_first=False
):
    """Motion style attention and the demodulation factors of what it gives (spec §5, §6).

    weight: [B', O, I, k, k], row n // (N / B') for frame n: one row, if all clips share the layer's
    weight.
    motion_style: [N, K, R, I + 2k], K ≤ 16. content_style: [B, I] or None, row n // (N / B) for
    frame n, multiplies the weight before the score (content_first, strategy i) or after everything
    (strategy ii). Each of them may be float32, bfloat16 or float16, in any memory layout. dtype: of
    W', default weight's; float32 computes without tf32.
    want_weight False: W' is not stored. Returns W' [N, O, I, k, k] in channels-last memory (or
    empty), score [N, O, K] and demod [N, O], both float32. Raises ValueError on shapes that do not
    go together.
    """
    dtype = weight.dtype if dtype is None else dtype
    check(weight, motion_style, content_style)
    return mostatt_op(weight, motion_style, content_style, dtype, want_weight, content_first)[:3]
