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

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels import reference
from kernels.choose import Op
from kernels.launch import channels_first, channels_last, constants, edge

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
        "attention": (32, 32, 8, 2),
        "motion": (16, 32, 4, 1),
        "content": (32, 32, 8, 2),
    },
}
SCORE_TILE = 16, 64  # output channels, and frames × styles, of a tile of scores


class Tensors(NamedTuple):
    """What several kernels read."""

    weight: Any  # [B, O, k·k, I]
    style: Any  # [N, K, R, I + 2k]
    content_style: Any  # [clips, I]
    score: Any  # [N, O, K]
    peak: Any  # [N, PEAKS]


class Shape(NamedTuple):
    """A layer and a batch. Frame n is of row n // T of the weights, n // T_STYLE of s."""

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
    HAS_WEIGHT: tl.constexpr  # whether W', or its gradient, is in memory
    PRECISION: tl.constexpr
    BLOCK_O: tl.constexpr = tl.constexpr(1)  # the tile
    BLOCK_I: tl.constexpr = tl.constexpr(1)


@triton.jit
def tap_and_channels(step, S):
    """The tap and the input channels i of a step through all of them."""
    return step % S.TAPS, tl.arange(0, S.BLOCK_I) + step // S.TAPS * S.BLOCK_I


@triton.jit
def motion(t, n, i, tap, S):
    """M_κ[i, tap] of frame n → float32 [K_P, len(i)], 0 outside."""
    kappa = tl.arange(0, S.K_P)
    m = tl.zeros([S.K_P, i.shape[0]], tl.float32)
    for r in range(S.R):
        factors = t.style + ((n * S.K + kappa) * S.R + r) * (S.I + 2 * S.SIDE)
        inside = (kappa < S.K)[:, None] & (i < S.I)[None, :]
        a = tl.load(factors[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(factors + S.I + tap // S.SIDE, mask=kappa < S.K, other=0.0).to(tl.float32)
        c = tl.load(factors + S.I + S.SIDE + tap % S.SIDE, mask=kappa < S.K, other=0.0)
        m += a * (b * c.to(tl.float32) * S.R**-0.5)[:, None]
    return m


@triton.jit
def of_styles(n, o, S):
    """Addresses in [N, O, K] for frame n, and which exist → [len(o), K_P] each."""
    kappa = tl.arange(0, S.K_P)
    inside = (o < S.O)[:, None] & (kappa < S.K)[None, :]
    return (n * S.O + o)[:, None] * S.K + kappa[None, :], inside


@triton.jit
def load_styles(ptr, n, o, S):
    address, inside = of_styles(n, o, S)
    return tl.load(ptr + address, mask=inside, other=0.0)


@triton.jit
def attention(t, n, o, S):
    """A = softmax over κ of frame n's scores → [len(o), K_P], 0 outside."""
    score = load_styles(t.score, n, o, S)
    score = tl.where((tl.arange(0, S.K_P) < S.K)[None, :], score, float("-inf"))
    e = tl.exp(score - tl.max(score, axis=1)[:, None])
    return tl.where((o < S.O)[:, None], e / tl.sum(e, axis=1)[:, None], 0.0)


@triton.jit
def inverse_peak(t, n, S):
    """1 / p of frame n; 0 where P is nothing, for there P̂ must be 0."""
    block = tl.arange(0, S.PEAKS_P)
    peak = tl.max(tl.load(t.peak + n * S.PEAKS + block, mask=block < S.PEAKS, other=0.0), axis=0)
    return tl.where(peak > 2e-38, 1.0 / tl.maximum(peak, 2e-38), 0.0)


@triton.jit
def content_tile(t, n, o, i, tap, S):
    """weight [len(o), len(i)] of frame n at a tap, its address in a row, which exist, s [len(i)]"""
    inside = (o < S.O)[:, None] & (i < S.I)[None, :]
    address = (o[:, None] * S.TAPS + tap) * S.I + i[None, :]
    row = n // S.T * S.O * S.TAPS * S.I
    w = tl.load(t.weight + row + address, mask=inside, other=0.0).to(tl.float32)
    s = tl.full([i.shape[0]], 1.0, tl.float32)
    if S.HAS_STYLE:
        style = t.content_style + n // S.T_STYLE * S.I
        s = tl.load(style + i, mask=i < S.I, other=0.0).to(tl.float32)
    return w, address, inside, s


@triton.jit
def _scores_kernel(product_ptr, style_ptr, score_ptr, S):
    """Σ over taps and ranks of product [B, O, k·k, T, K, R] times b · c → score [B·T, O, K]. Grid:
    blocks of o, of columns (frame of the row of the weights, κ), rows of the weights.
    """
    row = tl.program_id(2).to(tl.int64)
    o = tl.program_id(0) * S.BLOCK_O + tl.arange(0, S.BLOCK_O)
    column = tl.program_id(1) * S.BLOCK_I + tl.arange(0, S.BLOCK_I)
    columns = S.T * S.K
    inside = (o < S.O)[:, None] & (column < columns)[None, :]
    score = tl.zeros([S.BLOCK_O, S.BLOCK_I], tl.float32)
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
def _peak_kernel(t, S):
    """max |P| of a block of o → peak [N, blocks]. Grid: blocks of o, frames."""
    n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * S.BLOCK_O + tl.arange(0, S.BLOCK_O)
    A = attention(t, n, o, S)
    peak = tl.zeros([S.BLOCK_O, S.BLOCK_I], tl.float32)
    for step in range(tl.cdiv(S.I, S.BLOCK_I) * S.TAPS):
        tap, i = tap_and_channels(step, S)
        P = tl.dot(A, motion(t, n, i, tap, S), input_precision=S.PRECISION)
        peak = tl.maximum(peak, tl.abs(P))
    largest = tl.max(tl.max(peak, axis=1), axis=0)
    tl.store(t.peak + n * S.PEAKS + tl.program_id(0), largest)


@triton.jit
def _modulate_kernel(t, weight_ptr, demod_ptr, S):
    """W' = weight · s · F, once to memory, and demod beside it. Grid: blocks of o, frames."""
    n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * S.BLOCK_O + tl.arange(0, S.BLOCK_O)
    A = attention(t, n, o, S) * inverse_peak(t, n, S)
    squares = tl.zeros([S.BLOCK_O, S.BLOCK_I], tl.float32)
    for step in range(tl.cdiv(S.I, S.BLOCK_I) * S.TAPS):
        tap, i = tap_and_channels(step, S)
        w, address, inside, s = content_tile(t, n, o, i, tap, S)
        P = tl.dot(A, motion(t, n, i, tap, S), input_precision=S.PRECISION)  # P / p
        w *= s[None, :]
        w += w * tl.maximum(P, 0.2 * P)
        squares += w * w
        if S.HAS_WEIGHT:
            target = weight_ptr + n * S.O * S.TAPS * S.I + address
            tl.store(target, w.to(weight_ptr.dtype.element_ty), mask=inside)
    demod = 1.0 / tl.sqrt(tl.sum(squares, axis=1) + 1e-8)
    tl.store(demod_ptr + n * S.O + o, demod, mask=o < S.O)


# ---------------------------------------------------------------------------------------- launchers


def precision_of(dtype):
    return "ieee" if dtype == torch.float32 else "tf32"


def peak_rows(O, dtype):
    """Output channels of a block, of which `peak` holds one maximum."""
    return edge(O, CONFIGS[precision_of(dtype)]["peak"][0], least=16)


def tiled(name, shape):
    """The shape with a kernel's tile, and its warps and stages."""
    o, i, warps, stages = CONFIGS[shape.PRECISION.value][name]
    tile = constants(BLOCK_O=edge(shape.O, o, least=16), BLOCK_I=edge(shape.I, i, least=16))
    return shape._replace(**tile), {"num_warps": warps, "num_stages": stages}


def check(weight, motion_style, content_style):
    """Raises ValueError on shapes that do not go together."""
    B, O, I, side, _ = weight.shape
    N, K, R, factors = motion_style.shape
    if N % B or factors != I + 2 * side or not 1 <= K <= 16 or weight.shape[4] != side:
        shapes = f"weight {list(weight.shape)}, motion style {list(motion_style.shape)}"
        want = "[B, O, I, k, k] and [N, K, R, I + 2k], N a multiple of B and K at most 16"
        raise ValueError(f"{shapes}: want {want}")
    if content_style is not None:
        clips, channels = content_style.shape
        if N % clips or clips % B or channels != I:
            want = f"[clips, {I}], clips a divisor of {N} and a multiple of {B}"
            raise ValueError(f"content style {list(content_style.shape)}: want {want}")


def shape_of(weight, motion_style, content_style, dtype, has_weight, content_first):
    """The Shape of a call, whose arguments are checked."""
    check(weight, motion_style, content_style)
    (B, O, I, side, _), (N, K, R, _) = weight.shape, motion_style.shape
    has_style = content_style is not None
    clips = len(content_style) if has_style else N
    peaks = triton.cdiv(O, peak_rows(O, dtype))
    sizes = N // B, N // clips, O, I, K, peaks
    padded = edge(K, 16, least=16), triton.next_power_of_2(peaks), R, side, side * side
    flags = has_style, has_style and content_first, has_weight, precision_of(dtype)
    return Shape(*sizes, *map(tl.constexpr, (*padded, (I * side * side) ** -0.5, *flags)))


def launch_scores(t, content_style, shape, dtype):
    """Scores of Eq. 2; the product is in dtype, its sums are float32."""
    B, (N, K), I = len(t.weight), t.style.shape[:2], shape.I
    a = t.style[..., :I]
    if shape.CONTENT_FIRST.value:
        of_clips = a.unflatten(0, (len(content_style), -1))
        a = (of_clips * content_style[:, None, None, None]).flatten(0, 1)
    a = a.reshape(B, -1, I).transpose(1, 2)  # [B, I, T·K·R]
    rows = t.weight.view(B, -1, I)
    if dtype != torch.float32 and rows.is_cuda:
        product = torch.bmm(rows.to(dtype), a.to(dtype), out_dtype=torch.float32)
    else:
        product = rows.float() @ a.float()
    o, columns = edge(shape.O, SCORE_TILE[0], least=16), edge(N // B * K, SCORE_TILE[1], least=16)
    S = shape._replace(**constants(BLOCK_O=o, BLOCK_I=columns))
    grid = triton.cdiv(shape.O, o), triton.cdiv(N // B * K, columns), B
    _scores_kernel[grid](product, t.style, t.score, S, num_warps=4)


def forward(weight, motion_style, content_style, dtype, want_weight, content_first):
    """W' (empty if not wanted), score, demod, and peak [N, blocks of o], see `mostatt`."""
    shape = shape_of(weight, motion_style, content_style, dtype, want_weight, content_first)
    weight, N = channels_last(weight), len(motion_style)

    empty = functools.partial(torch.empty, device=weight.device, dtype=torch.float32)
    s = weight if content_style is None else content_style.contiguous()
    score, peak = empty(N, shape.O, shape.K), empty(N, shape.PEAKS)
    t = Tensors(weight, motion_style.contiguous(), s, score, peak)
    launch_scores(t, content_style, shape, dtype)
    S, launch = tiled("peak", shape)
    _peak_kernel[shape.PEAKS, N](t, S, **launch)
    size = [N, *weight.shape[1:]] if want_weight else [0]
    modulated, demod = empty(*size, dtype=dtype), empty(N, shape.O)
    S, launch = tiled("modulate", shape)
    grid = triton.cdiv(shape.O, S.BLOCK_O.value), N
    _modulate_kernel[grid](t, modulated, demod, S, **launch)
    return channels_first(modulated) if want_weight else modulated, score, demod, peak


# ------------------------------------------------------------------------------------- registration


def twin(weight, motion_style, content_style, dtype, want_weight, content_first):
    """`forward` in plain PyTorch and float32."""
    style = motion_style.float()
    s = None if content_style is None else content_style.float()
    modulated, score, demod = reference.mostatt_demod(
        weight.float(), style, s, dtype, want_weight, content_first=content_first
    )
    if want_weight:
        modulated = channels_first(channels_last(modulated))
    P = score.softmax(dim=2) @ reference.motion_modulation(style, *weight.shape[2:4])
    blocks = P.abs().amax(dim=2).split(peak_rows(weight.shape[1], dtype), dim=1)
    peak = torch.stack([block.amax(dim=1) for block in blocks], dim=1)
    return modulated, score.contiguous(), demod, peak


MOSTATT = Op("mostatt", twin, {"Triton": forward})


def mostatt(
    weight, motion_style, content_style=None, dtype=None, want_weight=True, content_first=False
):
    """Motion style attention and the demodulation factors of what it gives (spec §5, §6).

    weight: [B', O, I, k, k], row n // (N / B') for frame n: one row, if all clips share a weight.
    motion_style: [N, K, R, I + 2k], K ≤ 16. content_style: [B, I] or None, row n // (N / B) for
    frame n, multiplies the weight before the score (content_first, strategy i) or after everything
    (strategy ii). Each of them may be float32, bfloat16 or float16, in any memory layout. dtype: of
    W', default weight's; float32 computes without tf32. Returns W' [N, O, I, k, k] in channels-last
    memory (or empty), score [N, O, K] and demod [N, O] in float32. Raises ValueError on shapes that
    do not go together.
    """
    dtype = weight.dtype if dtype is None else dtype
    check(weight, motion_style, content_style)
    args = (weight, motion_style, content_style, dtype, want_weight, content_first)
    return torch.ops.mostgan.mostatt(*args)[:3]  # which mostatt_backward.py registers
