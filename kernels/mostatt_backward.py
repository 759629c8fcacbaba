"""The gradient of MoStAtt (mostatt.py has the notation). With U = ∂W' + ∂demod · ∂demod/∂W' = ∂W' −
∂demod demod³ W', w the weight without the content style s, and s₁ = s if it comes first (strategy
i), else 1:

    h = U w s · leaky_relu'(P)            p times the gradient of P, by way of F
    ∂A[o,κ] = Σ_j h M_κ / p
    ∂p = −Σ P ∂P / p = −Σ_o,κ A ∂A / p    goes to the first place where |P| = p; plain PyTorch
                                          shares it among all of them
    ∂score = A (∂A − Σ_κ A ∂A) + what comes from outside (the diversity loss)
    ∂M_κ[j] = Σ_o (A h / p + ∂score w s₁ / √J)
    ∂s[i] = Σ_o,y,x w (U F + Σ_κ ∂score M_κ / √J)       the second term only if s comes first
    ∂w = Σ over frames of (s U F + s₁ Σ_κ ∂score M_κ / √J)

P is computed again in each of three passes over ∂W', which have different sums to make: over j,
over o, over frames. Nothing is added atomically, so runs repeat exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.choose import Op
from kernels.mostatt import (
    attention,
    block_size,
    content_tile,
    inverse_peak,
    mostatt_op,
    motion,
    shape_of,
    tap_major,
    tile,
)


@triton.jit
def _gradient_of_factor(inputs, P, n, o, i, tap, S, HAS_GRAD: tl.constexpr):
    """For a tile of P / p: w, s, F, U (see the top) and h = U w s leaky_relu'(P), the gradient of P
    times p.
    """
    grad_ptr, content_ptr, content_style_ptr = inputs[0], inputs[1], inputs[3]
    demod_ptr, grad_demod_ptr = inputs[6], inputs[7]
    w, address, inside, s = content_tile(content_ptr, content_style_ptr, n, o, i, tap, S)
    F = 1.0 + tl.maximum(P, 0.2 * P)
    demod = tl.load(demod_ptr + n * S.O + o, mask=o < S.O, other=0.0)
    grad_demod = tl.load(grad_demod_ptr + n * S.O + o, mask=o < S.O, other=0.0).to(tl.float32)
    ws = w * s[None, :]
    U = ws * F * (-demod * demod * demod * grad_demod)[:, None]  # ∂demod/∂W' = −demod³ W'
    if HAS_GRAD:
        grad_ptr += n * S.O * S.TAPS * S.I
        U += tl.load(grad_ptr + address, mask=inside, other=0.0).to(tl.float32)
    return w, s, F, U, U * ws * tl.where(P > 0, 1.0, 0.2)


@triton.jit
def _grad_attention_kernel(
    inputs,
    grad_attention_ptr,
    S,
    HAS_GRAD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """∂A = h Mᵀ / p → [N, O, K], still without the share of ∂p. Grid: blocks of o, frames."""
    style_ptr, score_ptr, peak_ptr = inputs[2], inputs[4], inputs[5]
    n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    kappa = tl.arange(0, S.K_P)
    scale = inverse_peak(peak_ptr, n, S)
    A = attention(score_ptr, n, o, kappa, S) * scale
    grad_A = tl.zeros([BLOCK_O, S.K_P], tl.float32)
    for step in range(tl.cdiv(S.I, BLOCK_I) * S.TAPS):
        tap = step % S.TAPS
        i = step // S.TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
        m = motion(style_ptr, n * S.K + kappa, kappa < S.K, i, tap, S)
        P = tl.dot(A, m, input_precision=S.PRECISION)
        w, s, F, U, h = _gradient_of_factor(inputs, P, n, o, i, tap, S, HAS_GRAD)
        grad_A = tl.dot(h, tl.trans(m), grad_A, input_precision=S.PRECISION)
    inside = (o < S.O)[:, None] & (kappa < S.K)[None, :]
    address = (n * S.O + o)[:, None] * S.K + kappa[None, :]
    tl.store(grad_attention_ptr + address, grad_A * scale, mask=inside)


@triton.jit
def _find_peak_kernel(
    score_ptr, style_ptr, peak_ptr, at_ptr, S, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr
):
    """Where |P| = p: at [N, 3] = (o, j, sign of P there). Only the block of o that has it works.
    Grid: frames.
    """
    n = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, S.PEAKS_P)
    peaks = tl.load(peak_ptr + n * S.PEAKS + block, mask=block < S.PEAKS, other=-1.0)
    first = tl.min(tl.where(peaks == tl.max(peaks, axis=0), block, S.PEAKS_P), axis=0)
    o = first * BLOCK_O + tl.arange(0, BLOCK_O)
    kappa = tl.arange(0, S.K_P)
    A = attention(score_ptr, n, o, kappa, S)
    best = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    best_step = tl.zeros([BLOCK_O, BLOCK_I], tl.int32)
    for step in range(tl.cdiv(S.I, BLOCK_I) * S.TAPS):
        i = step // S.TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
        m = motion(style_ptr, n * S.K + kappa, kappa < S.K, i, step % S.TAPS, S)
        P = tl.dot(A, m, input_precision=S.PRECISION)
        better = tl.abs(P) > tl.abs(best)
        best, best_step = tl.where(better, P, best), tl.where(better, step, best_step)
    i = best_step // S.TAPS * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    position = (o[:, None].to(tl.int32) * S.TAPS + best_step % S.TAPS) * S.I + i
    is_peak = tl.abs(best) == tl.max(tl.max(tl.abs(best), axis=1), axis=0)
    at = tl.min(tl.min(tl.where(is_peak, position, 2147483647), axis=1), axis=0)
    positive = tl.where((position == at) & (best > 0), 1, -1)
    tl.store(at_ptr + n * 3, at // (S.TAPS * S.I))
    tl.store(at_ptr + n * 3 + 1, at % (S.TAPS * S.I))
    tl.store(at_ptr + n * 3 + 2, tl.max(tl.max(positive, axis=1), axis=0))


@triton.jit
def _grad_score_kernel(
    grad_attention_ptr,
    score_ptr,
    style_ptr,
    peak_ptr,
    at_ptr,
    grad_score_ptr,
    grad_peak_ptr,
    S,
    BLOCK_O: tl.constexpr,
):
    """Softmax's backward: adds A (∂A − Σ A ∂A) to grad_score [N, O, K]; writes ±∂p [N], P's
    gradient at the peak.
    """
    n = tl.program_id(0).to(tl.int64)
    kappa = tl.arange(0, S.K_P)
    dots = tl.zeros([BLOCK_O, S.K_P], tl.float32)
    for block in range(tl.cdiv(S.O, BLOCK_O)):
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        address = (n * S.O + o)[:, None] * S.K + kappa[None, :]
        inside = (o < S.O)[:, None] & (kappa < S.K)[None, :]
        grad_A = tl.load(grad_attention_ptr + address, mask=inside, other=0.0)
        dots += attention(score_ptr, n, o, kappa, S) * grad_A
    peak_o, peak_j = tl.load(at_ptr + n * 3), tl.load(at_ptr + n * 3 + 1)
    grad_peak = -tl.sum(tl.sum(dots, axis=1), axis=0) * inverse_peak(peak_ptr, n, S)
    grad_peak *= tl.load(at_ptr + n * 3 + 2)
    tl.store(grad_peak_ptr + n, grad_peak)
    peak_i = peak_j % S.I + tl.zeros([1], tl.int32)
    m = motion(style_ptr, n * S.K + kappa, kappa < S.K, peak_i, peak_j // S.I, S)
    for block in range(tl.cdiv(S.O, BLOCK_O)):
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        address = (n * S.O + o)[:, None] * S.K + kappa[None, :]
        inside = (o < S.O)[:, None] & (kappa < S.K)[None, :]
        A = attention(score_ptr, n, o, kappa, S)
        grad_A = tl.load(grad_attention_ptr + address, mask=inside, other=0.0)
        grad_A += tl.where((o == peak_o)[:, None], grad_peak * tl.sum(m, axis=1)[None, :], 0.0)
        grad = A * (grad_A - tl.sum(A * grad_A, axis=1)[:, None])
        grad += tl.load(grad_score_ptr + address, mask=inside)
        tl.store(grad_score_ptr + address, grad, mask=inside)


@triton.jit
def _grad_motion_kernel(
    inputs,
    of_score,
    grad_motion_ptr,
    grad_style_ptr,
    S,
    HAS_GRAD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """∂M [N, K, k·k, I], of which the factors' gradients are small products, and ∂s [N, k·k, I].

    Grid: (tap, block of i), frames. A program goes through the output channels in order.
    """
    style_ptr, score_ptr, peak_ptr = inputs[2], inputs[4], inputs[5]
    grad_score_ptr, at_ptr, grad_peak_ptr = of_score
    n = tl.program_id(1).to(tl.int64)
    tap = tl.program_id(0) % S.TAPS
    i = tl.program_id(0) // S.TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
    kappa = tl.arange(0, S.K_P)
    scale = inverse_peak(peak_ptr, n, S)
    m = motion(style_ptr, n * S.K + kappa, kappa < S.K, i, tap, S)
    grad_m = tl.zeros([S.K_P, BLOCK_I], tl.float32)
    grad_s = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for block in range(tl.cdiv(S.O, BLOCK_O)):
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        A = attention(score_ptr, n, o, kappa, S) * scale
        P = tl.dot(A, m, input_precision=S.PRECISION)
        w, s, F, U, h = _gradient_of_factor(inputs, P, n, o, i, tap, S, HAS_GRAD)
        inside = (o < S.O)[:, None] & (kappa < S.K)[None, :]
        address = (n * S.O + o)[:, None] * S.K + kappa[None, :]
        grad_score = tl.load(grad_score_ptr + address, mask=inside, other=0.0) * S.INVERSE_ROOT
        grad_m = tl.dot(tl.trans(A), h, grad_m, input_precision=S.PRECISION)
        if S.CONTENT_FIRST:
            grad_s += w * tl.dot(grad_score, m, U * F, input_precision=S.PRECISION)
            w *= s[None, :]
        elif S.HAS_STYLE:
            grad_s += w * U * F
        grad_m = tl.dot(tl.trans(grad_score), w, grad_m, input_precision=S.PRECISION)
    peak_o = tl.load(at_ptr + n * 3) + tl.zeros([1], tl.int32)
    at_peak = tl.sum(attention(score_ptr, n, peak_o, kappa, S), axis=0) * tl.load(grad_peak_ptr + n)
    is_peak = tap * S.I + i == tl.load(at_ptr + n * 3 + 1)
    grad_m += tl.where(is_peak[None, :], at_peak[:, None], 0.0)
    inside = (kappa < S.K)[:, None] & (i < S.I)[None, :]
    address = ((n * S.K + kappa)[:, None] * S.TAPS + tap) * S.I + i[None, :]
    tl.store(grad_motion_ptr + address, grad_m, mask=inside)
    if S.HAS_STYLE:
        address = (n * S.TAPS + tap) * S.I + i
        tl.store(grad_style_ptr + address, tl.sum(grad_s, axis=0), mask=i < S.I)


@triton.jit
def _grad_content_kernel(
    inputs,
    grad_score_ptr,
    grad_content_ptr,
    S,
    FRAMES,
    HAS_GRAD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """∂w of FRAMES frames in order → grad_content [N / FRAMES, O, k·k, I].

    Grid: (tap, block of i), blocks of o, groups of frames, each of one row of the weights.
    """
    style_ptr, score_ptr, peak_ptr = inputs[2], inputs[4], inputs[5]
    group = tl.program_id(2).to(tl.int64)
    tap = tl.program_id(0) % S.TAPS
    i = tl.program_id(0) // S.TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    kappa = tl.arange(0, S.K_P)
    grad_w = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for n in range(group * FRAMES, group * FRAMES + FRAMES):
        A = attention(score_ptr, n, o, kappa, S) * inverse_peak(peak_ptr, n, S)
        m = motion(style_ptr, n * S.K + kappa, kappa < S.K, i, tap, S)
        P = tl.dot(A, m, input_precision=S.PRECISION)
        w, s, F, U, h = _gradient_of_factor(inputs, P, n, o, i, tap, S, HAS_GRAD)
        inside = (o < S.O)[:, None] & (kappa < S.K)[None, :]
        address = (n * S.O + o)[:, None] * S.K + kappa[None, :]
        grad_score = tl.load(grad_score_ptr + address, mask=inside, other=0.0) * S.INVERSE_ROOT
        if S.CONTENT_FIRST:
            m *= s[None, :]
        grad_w += U * F * s[None, :]
        grad_w = tl.dot(grad_score, m, grad_w, input_precision=S.PRECISION)
    address = ((group * S.O + o)[:, None] * S.TAPS + tap) * S.I + i[None, :]
    inside = (o < S.O)[:, None] & (i < S.I)[None, :]
    tl.store(grad_content_ptr + address, grad_w.to(grad_content_ptr.dtype.element_ty), mask=inside)


def frames_of_a_program(frames, programs):
    """Frames that a program of `_grad_content_kernel` adds up: as many as leave a GPU 512 programs,
    if there are.
    """
    return max(
        n
        for n in range(1, frames + 1)
        if frames % n == 0 and (n == 1 or programs * frames // n >= 512)
    )


def backward(
    grad_weight,
    grad_score,
    grad_demod,
    weight,
    motion_style,
    content_style,
    score,
    demod,
    peak,
    dtype,
    content_first,
):
    """Launches the backward kernels → gradients of weight, motion_style and content_style (else
    empty).
    """
    shape = shape_of(weight, motion_style, content_style, dtype, content_first)
    (B, O, I, side, _), N = weight.shape, len(motion_style)
    taps, has_grad = side * side, grad_weight.numel() > 0
    content, style = tap_major(weight), motion_style.contiguous()
    grad = tap_major(grad_weight) if has_grad else content
    s = content if content_style is None else content_style.contiguous()
    # What several kernels read, in this order.
    inputs = (grad, content, style, s, score, peak, demod, grad_demod.contiguous())
    flags = {"HAS_GRAD": has_grad}

    def empty(*size, dtype=torch.float32):
        return torch.empty(size, device=weight.device, dtype=dtype)

    grad_attention, launch = torch.empty_like(score), tile("attention", shape)
    _grad_attention_kernel[triton.cdiv(O, launch["BLOCK_O"]), N](
        inputs, grad_attention, shape, **flags, **launch
    )
    at, grad_peak = empty(N, 3, dtype=torch.int32), empty(N)
    _find_peak_kernel[(N,)](score, style, peak, at, shape, **tile("peak", shape))
    grad_score = grad_score.float().clone(memory_format=torch.contiguous_format)
    block = block_size(O, 64)
    _grad_score_kernel[(N,)](  # adds the softmax's share to grad_score
        grad_attention,
        score,
        style,
        peak,
        at,
        grad_score,
        grad_peak,
        shape,
        BLOCK_O=block,
        num_warps=4,
    )
    grad_motion = empty(N, shape.K, taps, I)
    grad_s = empty(0) if content_style is None else empty(N, taps, I)
    of_score, launch = (grad_score, at, grad_peak), tile("motion", shape)
    _grad_motion_kernel[triton.cdiv(I, launch["BLOCK_I"]) * taps, N](
        inputs, of_score, grad_motion, grad_s, shape, **flags, **launch
    )
    launch = tile("content", shape)
    columns, rows = triton.cdiv(I, launch["BLOCK_I"]) * taps, triton.cdiv(O, launch["BLOCK_O"])
    frames = frames_of_a_program(N // B, B * columns * rows)
    groups = N // frames
    partial = empty(
        groups, *content.shape[1:], dtype=weight.dtype if groups == B else torch.float32
    )
    _grad_content_kernel[columns, rows, groups](
        inputs, grad_score, partial, shape, FRAMES=frames, **flags, **launch
    )
    grad_content = partial
    if groups > B:
        grad_content = partial.unflatten(0, (B, -1)).sum(dim=1).to(weight.dtype)
    if content_style is not None:
        of_clips = grad_s.unflatten(0, (len(content_style), -1))
        grad_s = of_clips.sum(dim=(1, 2)).to(content_style.dtype)
    grad_style = reference.motion_modulation_backward(
        grad_motion.transpose(2, 3).flatten(2), motion_style.float(), I, side
    )
    return grad_content.movedim(-1, -3), grad_style.to(motion_style.dtype), grad_s


def twin(
    grad_weight,
    grad_score,
    grad_demod,
    weight,
    motion_style,
    content_style,
    score,
    demod,
    peak,
    dtype,
    content_first,
):
    """`backward` in plain PyTorch and float32."""
    s = None if content_style is None else content_style.float()
    grads = (grad_weight.float(), grad_score.float(), grad_demod.float())
    grad_content, grad_style, grad_s = reference.mostatt_backward(
        *grads, weight.float(), motion_style.float(), s, score, demod, content_first
    )
    grad_content = tap_major(grad_content.to(weight.dtype)).movedim(-1, -3)
    grad_s = score.new_empty([0]) if s is None else grad_s.to(content_style.dtype)
    return grad_content, grad_style.to(motion_style.dtype).contiguous(), grad_s


BACKWARD = Op("mostatt_backward", twin, {"Triton": backward})


@torch.library.custom_op("mostgan::mostatt_backward", mutates_args=())
def mostatt_backward_op(
    grad_weight: Tensor,
    grad_score: Tensor,
    grad_demod: Tensor,
    weight: Tensor,
    motion_style: Tensor,
    content_style: Tensor | None,
    score: Tensor,
    demod: Tensor,
    peak: Tensor,
    dtype: torch.dtype,
    content_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` as an op of PyTorch's, opaque to the compiler."""
    grads = (grad_weight, grad_score, grad_demod)
    inputs = (weight, motion_style, content_style, score, demod, peak)
    return BACKWARD(*grads, *inputs, dtype, content_first)


@mostatt_backward_op.register_fake
def _(grad_weight, grad_score, grad_demod, weight, motion_style, content_style, score, *settings):
    last = weight.movedim(-3, -1)
    grad_content = torch.empty_like(last, memory_format=torch.contiguous_format)
    grad_style = torch.empty_like(motion_style, memory_format=torch.contiguous_format)
    grad_s = score.new_empty([0])
    if content_style is not None:
        grad_s = torch.empty_like(content_style, memory_format=torch.contiguous_format)
    return grad_content.movedim(-1, -3), grad_style, grad_s


def _save(ctx, inputs, output):
    weight, motion_style, content_style, ctx.dtype, _, ctx.content_first = inputs
    ctx.save_for_backward(weight, motion_style, content_style, *output[1:])


def _backward(ctx, grad_weight, grad_score, grad_demod, _):
    grads, settings = (grad_weight, grad_score, grad_demod), (ctx.dtype, ctx.content_first)
    *grads, grad_s = mostatt_backward_op(*grads, *ctx.saved_tensors, *settings)
    return *grads, None if ctx.saved_tensors[2] is None else grad_s, None, None, None


mostatt_op.register_autograd(_backward, setup_context=_save)
