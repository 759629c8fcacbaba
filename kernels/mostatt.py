"""MoStAtt from its rank factors (spec §5, Eq. 2), forward and backward. For frame n of clip b, with j = (i, y, x):

    M_κ[j]     = Σ_r a_r[i] b_r[y] c_r[x] / √R                    never in memory: tile by tile in registers
    score[o,κ] = ⟨W[o], M_κ⟩ / √J,  A = softmax_κ score           J = I·k·k
    P[o,j]     = Σ_κ A[o,κ] M_κ[j],  p = max over (o,j) of |P|    a product with K ≤ 16: cheaper to redo than to store
    F[o,j]     = 1 + leaky_relu(P[o,j] / p)
    W'[o,j]    = W[o,j] · F[o,j] (· s[i] if the content style comes second),  demod[o] = rsqrt(Σ_j W'² + 1e-8)

Three kernels: scores, then p, then W'. A clip's W is one operand of one product for the scores of all its frames, and
stays in the second-level cache while their W' are written. Weights are read and written as [.., O, k·k, I], channels
last. Sums are float32 and have one order: runs repeat exactly. The gradient is in mostatt_backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A tile's output channels and input channels, warps, pipeline stages; by whether tensor cores may round to tf32.
# Chosen from the resource report of `bench/kernels.py --aot`; not yet timed.
CONFIGS = {
    "tf32": {"scores": (64, 64, 4, 3), "peak": (64, 64, 4, 2), "modulate": (64, 64, 4, 2),
             "attention": (64, 64, 8, 2), "motion": (64, 64, 8, 2), "content": (64, 64, 8, 2)},
    "ieee": {"scores": (32, 32, 4, 2), "peak": (64, 32, 4, 2), "modulate": (32, 32, 4, 2),
             "attention": (32, 32, 4, 2), "motion": (32, 32, 4, 2), "content": (32, 32, 4, 2)},
}  # fmt: skip
SCORE_COLUMNS = {"tf32": 64, "ieee": 32}  # frames × styles of a tile of scores


@triton.jit
def motion(style_ptr, row, is_row, i, tap, I, R: tl.constexpr, SIDE: tl.constexpr):
    """M_κ[i, tap] for style rows (frame · K + κ) → float32 [len(row), len(i)], 0 outside."""
    m = tl.zeros([row.shape[0], i.shape[0]], tl.float32)
    for r in range(R):
        factors = style_ptr + (row * R + r) * (I + 2 * SIDE)
        a = tl.load(factors[:, None] + i[None, :], mask=is_row[:, None] & (i < I)[None, :], other=0.0).to(tl.float32)
        b = tl.load(factors + I + tap // SIDE, mask=is_row, other=0.0).to(tl.float32)
        c = tl.load(factors + I + SIDE + tap % SIDE, mask=is_row, other=0.0).to(tl.float32)
        m += a * (b * c * R**-0.5)[:, None]
    return m


@triton.jit
def attention(score_ptr, n, o, kappa, O, K):
    """A = softmax over κ of frame n's scores → [len(o), len(kappa)], 0 outside."""
    inside = (o < O)[:, None] & (kappa < K)[None, :]
    score = tl.load(score_ptr + (n * O + o)[:, None] * K + kappa[None, :], mask=inside, other=0.0)
    score = tl.where((kappa < K)[None, :], score, float("-inf"))
    e = tl.exp(score - tl.max(score, axis=1)[:, None])
    return tl.where(inside, e / tl.sum(e, axis=1)[:, None], 0.0)


@triton.jit
def inverse_peak(peak_ptr, n, PEAKS, PEAKS_P: tl.constexpr):
    """1 / p of frame n from the maxima of its blocks of o; 0 where P is nothing, for there P̂ must be 0."""
    block = tl.arange(0, PEAKS_P)
    peak = tl.max(tl.load(peak_ptr + n * PEAKS + block, mask=block < PEAKS, other=0.0), axis=0)
    return tl.where(peak > 2e-38, 1.0 / tl.maximum(peak, 2e-38), 0.0)


@triton.jit
def _scores_kernel(content_ptr, style_ptr, score_ptr, T, O, I, K, INVERSE_ROOT: tl.constexpr, R: tl.constexpr,
                   SIDE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, COLUMNS: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """score = W Mᵀ / √J for the frames of a clip; a column is (frame, κ). Grid: blocks of o, of columns, clips."""
    b = tl.program_id(2).to(tl.int64)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    TAPS: tl.constexpr = SIDE * SIDE
    score = tl.zeros([BLOCK_O, COLUMNS], tl.float32)
    for step in range(tl.cdiv(I, BLOCK_I) * TAPS):
        tap = step % TAPS
        i = step // TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
        inside = (o < O)[:, None] & (i < I)[None, :]
        w = tl.load(content_ptr + ((b * O + o)[:, None] * TAPS + tap) * I + i[None, :], mask=inside, other=0.0)
        m = motion(style_ptr, b * T * K + column, column < T * K, i, tap, I, R, SIDE)
        score = tl.dot(w.to(tl.float32), tl.trans(m), score, input_precision=PRECISION)
    address = ((b * T + column // K) * O)[None, :] * K + o[:, None] * K + (column % K)[None, :]
    is_score = (o < O)[:, None] & (column < T * K)[None, :]
    tl.store(score_ptr + address, score * INVERSE_ROOT, mask=is_score)


@triton.jit
def _peak_kernel(score_ptr, style_ptr, peak_ptr, O, I, K, R: tl.constexpr, SIDE: tl.constexpr, K_P: tl.constexpr,
                 BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr):
    """max |P| of a block of o → peak [N, blocks]. Grid: blocks of o, frames."""
    n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    kappa = tl.arange(0, K_P)
    A = attention(score_ptr, n, o, kappa, O, K)
    TAPS: tl.constexpr = SIDE * SIDE
    peak = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for step in range(tl.cdiv(I, BLOCK_I) * TAPS):
        i = step // TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
        m = motion(style_ptr, n * K + kappa, kappa < K, i, step % TAPS, I, R, SIDE)
        peak = tl.maximum(peak, tl.abs(tl.dot(A, m, input_precision=PRECISION)))
    tl.store(peak_ptr + n * tl.num_programs(0) + tl.program_id(0), tl.max(tl.max(peak, axis=1), axis=0))


@triton.jit
def _modulate_kernel(content_ptr, style_ptr, clip_style_ptr, score_ptr, peak_ptr, weight_ptr, demod_ptr, T, T_STYLE,
                     O, I, K, PEAKS, R: tl.constexpr, SIDE: tl.constexpr, K_P: tl.constexpr, PEAKS_P: tl.constexpr,
                     HAS_CLIP_STYLE: tl.constexpr, WANT_WEIGHT: tl.constexpr, BLOCK_O: tl.constexpr,
                     BLOCK_I: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """W' = W · F (· s), once to memory, and demod beside it. Grid: blocks of o, frames; frame n is of clip n // T."""
    n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    kappa = tl.arange(0, K_P)
    A = attention(score_ptr, n, o, kappa, O, K) * inverse_peak(peak_ptr, n, PEAKS, PEAKS_P)
    TAPS: tl.constexpr = SIDE * SIDE
    squares = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for step in range(tl.cdiv(I, BLOCK_I) * TAPS):
        tap = step % TAPS
        i = step // TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
        inside = (o < O)[:, None] & (i < I)[None, :]
        address = (o[:, None] * TAPS + tap) * I + i[None, :]
        w = tl.load(content_ptr + n // T * O * TAPS * I + address, mask=inside, other=0.0).to(tl.float32)
        if HAS_CLIP_STYLE:
            w *= tl.load(clip_style_ptr + n // T_STYLE * I + i, mask=i < I, other=0.0).to(tl.float32)[None, :]
        m = motion(style_ptr, n * K + kappa, kappa < K, i, tap, I, R, SIDE)
        P = tl.dot(A, m, input_precision=PRECISION)  # P / p
        w += w * tl.maximum(P, 0.2 * P)
        squares += w * w
        if WANT_WEIGHT:
            tl.store(weight_ptr + n * O * TAPS * I + address, w.to(weight_ptr.dtype.element_ty), mask=inside)
    demod = 1.0 / tl.sqrt(tl.sum(squares, axis=1) + 1e-8)
    tl.store(demod_ptr + n * O + o, demod, mask=o < O)


def block_size(size, most, least=16):
    """Tile edge: the power of two that holds `size`, within what the tensor cores want and the configuration allows."""
    return max(least, min(most, triton.next_power_of_2(size)))


def check(content_weight, motion_style, clip_style):
    """Checks the shapes and returns what every kernel wants to know of them."""
    B, O, I, side, _ = content_weight.shape
    N, K, R, factors = motion_style.shape
    if N % B or factors != I + 2 * side or not 1 <= K <= 16 or content_weight.shape[4] != side:
        raise ValueError(f"content weight {list(content_weight.shape)}, motion style {list(motion_style.shape)}: want "
                         "[B, O, I, k, k] and [N, K, R, I + 2k], N a multiple of B and K at most 16")
    if clip_style is not None and (N % len(clip_style) or clip_style.shape[1] != I):
        raise ValueError(f"clip style {list(clip_style.shape)}: want [B, {I}], B a divisor of {N}")
    return B, N, O, I, K, R, side


def tap_major(weight):
    """[.., O, I, k, k] → [.., O, k, k, I], contiguous: nothing to do for channels-last weights."""
    return weight.movedim(-3, -1).contiguous()


def precision_of(dtype):
    return "ieee" if dtype == torch.float32 else "tf32"


def peak_blocks(O, precision):
    return triton.cdiv(O, block_size(O, CONFIGS[precision]["peak"][0]))


def tile(name, precision, O, I):
    """Configuration of a kernel as launch arguments: tile, precision, warps, stages."""
    rows, columns, warps, stages = CONFIGS[precision][name]
    return dict(BLOCK_O=block_size(O, rows), BLOCK_I=block_size(I, columns), PRECISION=precision, num_warps=warps,
                num_stages=stages)  # fmt: skip


def forward(content_weight, motion_style, clip_style, dtype, want_weight):
    """Launches the forward kernels; see `mostatt`. Returns weight, score, demod, and peak [N, blocks of o]."""
    B, N, O, I, K, R, side = check(content_weight, motion_style, clip_style)
    device, precision = content_weight.device, precision_of(dtype)
    content, style = tap_major(content_weight), motion_style.contiguous()
    s = content if clip_style is None else clip_style.contiguous()
    score = torch.empty([N, O, K], device=device, dtype=torch.float32)
    demod = torch.empty([N, O], device=device, dtype=torch.float32)
    peak = torch.empty([N, peak_blocks(O, precision)], device=device, dtype=torch.float32)
    weight = torch.empty([N, O, side, side, I] if want_weight else [0], device=device, dtype=dtype)
    shape, K_P = dict(R=R, SIDE=side), block_size(K, 16)

    launch, columns = tile("scores", precision, O, I), block_size(N // B * K, SCORE_COLUMNS[precision])
    grid = triton.cdiv(O, launch["BLOCK_O"]), triton.cdiv(N // B * K, columns), B
    inverse_root = (I * side * side) ** -0.5
    _scores_kernel[grid](content, style, score, N // B, O, I, K, inverse_root, COLUMNS=columns, **shape, **launch)
    launch = tile("peak", precision, O, I)
    _peak_kernel[peak.shape[1], N](score, style, peak, O, I, K, K_P=K_P, **shape, **launch)
    launch = tile("modulate", precision, O, I)
    style_frames = N // (N if clip_style is None else len(clip_style))
    _modulate_kernel[triton.cdiv(O, launch["BLOCK_O"]), N](
        content, style, s, score, peak, weight, demod, N // B, style_frames, O, I, K, peak.shape[1], K_P=K_P,
        PEAKS_P=triton.next_power_of_2(peak.shape[1]), WANT_WEIGHT=want_weight, HAS_CLIP_STYLE=clip_style is not None,
        **shape, **launch)  # fmt: skip
    return weight.movedim(-1, -3) if want_weight else weight, score, demod, peak


@torch.library.custom_op("mostgan::mostatt", mutates_args=())
def mostatt_op(content_weight: Tensor, motion_style: Tensor, clip_style: Tensor | None, dtype: torch.dtype,
               want_weight: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward` as an op of PyTorch's, opaque to the compiler."""
    return forward(content_weight, motion_style, clip_style, dtype, want_weight)


@mostatt_op.register_fake
def _(content_weight, motion_style, clip_style, dtype, want_weight):
    (O, I, side, _), (N, K) = content_weight.shape[1:], motion_style.shape[:2]
    weight = content_weight.new_empty([N, O, side, side, I] if want_weight else [0], dtype=dtype)
    score, demod, peak = (
        content_weight.new_empty(shape, dtype=torch.float32)
        for shape in ([N, O, K], [N, O], [N, peak_blocks(O, precision_of(dtype))])
    )
    return weight.movedim(-1, -3) if want_weight else weight, score, demod, peak


def mostatt(content_weight, motion_style, clip_style=None, dtype=None, want_weight=True):
    """Motion style attention and the demodulation factors of what it gives (spec §5, §6).

    content_weight: [B, O, I, k, k], row n // (N / B) for frame n; motion_style: [N, K, R, I + 2k], K ≤ 16. float32,
    bfloat16 or float16, in any memory layout. clip_style: [B', I] multiplies the result (strategy ii) or None.
    dtype: of W', default content_weight's; float32 computes without tf32. want_weight False: W' is not stored.
    Returns W' [N, O, I, k, k] in channels-last memory (or empty), score [N, O, K] and demod [N, O], both float32.
    Raises ValueError on shapes that do not go together.
    """
    dtype = content_weight.dtype if dtype is None else dtype
    return mostatt_op(content_weight, motion_style, clip_style, dtype, want_weight)[:3]
