"""The gradient of MoStAtt (mostatt.py has the notation). With U = ∂W' + ∂demod · ∂demod/∂W' = ∂W' − ∂demod demod³ W':

    h = U W s · leaky_relu'(P)            p times the gradient of P, by way of F
    ∂A[o,κ] = Σ_j h M_κ / p
    ∂p = −Σ P ∂P / p = −Σ_o,κ A ∂A / p   goes to the one place where |P| = p: the first, where plain PyTorch shares it
    ∂score = A (∂A − Σ_κ A ∂A) + what comes from outside (the diversity loss)
    ∂M_κ[j] = Σ_o (A h / p + ∂score W / √J),   ∂s[i] = Σ_o,y,x U W F
    ∂W = Σ over the clip's frames of (U s F + Σ_κ ∂score M_κ / √J)

P is computed again in each of three passes over ∂W', which have different sums to make: over j, over o, over frames.
Nothing is added atomically, so runs repeat exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.mostatt import (
    attention,
    block_size,
    check,
    inverse_peak,
    mostatt_op,
    motion,
    precision_of,
    tap_major,
    tile,
)


@triton.jit
def _gradient_of_factor(grad_ptr, content_ptr, clip_style_ptr, demod_ptr, grad_demod_ptr, P, n, o, i, tap, T, T_STYLE,
                        O, I, TAPS: tl.constexpr, HAS_CLIP_STYLE: tl.constexpr, HAS_GRAD: tl.constexpr):  # fmt: skip
    """For a tile of P / p: W, s, F, U (see the top) and h = U W s leaky_relu'(P), the gradient of P times p."""
    inside = (o < O)[:, None] & (i < I)[None, :]
    address = (o[:, None] * TAPS + tap) * I + i[None, :]
    w = tl.load(content_ptr + n // T * O * TAPS * I + address, mask=inside, other=0.0).to(tl.float32)
    s = tl.full([i.shape[0]], 1.0, tl.float32)
    if HAS_CLIP_STYLE:
        s = tl.load(clip_style_ptr + n // T_STYLE * I + i, mask=i < I, other=0.0).to(tl.float32)
    F = 1.0 + tl.maximum(P, 0.2 * P)
    demod = tl.load(demod_ptr + n * O + o, mask=o < O, other=0.0)
    grad_demod = tl.load(grad_demod_ptr + n * O + o, mask=o < O, other=0.0).to(tl.float32)
    ws = w * s[None, :]
    U = ws * F * (-demod * demod * demod * grad_demod)[:, None]  # ∂demod/∂W' = −demod³ W'
    if HAS_GRAD:
        U += tl.load(grad_ptr + n * O * TAPS * I + address, mask=inside, other=0.0).to(tl.float32)
    return w, s, F, U, U * ws * tl.where(P > 0, 1.0, 0.2)


@triton.jit
def _grad_attention_kernel(grad_ptr, content_ptr, style_ptr, clip_style_ptr, score_ptr, peak_ptr, demod_ptr,
                           grad_demod_ptr, grad_attention_ptr, T, T_STYLE, O, I, K, PEAKS, R: tl.constexpr,
                           SIDE: tl.constexpr, K_P: tl.constexpr, PEAKS_P: tl.constexpr, HAS_CLIP_STYLE: tl.constexpr,
                           HAS_GRAD: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
                           PRECISION: tl.constexpr):  # fmt: skip
    """∂A = h Mᵀ / p → [N, O, K], still without the share of ∂p. Grid: blocks of o, frames."""
    n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    kappa = tl.arange(0, K_P)
    scale = inverse_peak(peak_ptr, n, PEAKS, PEAKS_P)
    A = attention(score_ptr, n, o, kappa, O, K) * scale
    TAPS: tl.constexpr = SIDE * SIDE
    grad_A = tl.zeros([BLOCK_O, K_P], tl.float32)
    for step in range(tl.cdiv(I, BLOCK_I) * TAPS):
        tap = step % TAPS
        i = step // TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
        m = motion(style_ptr, n * K + kappa, kappa < K, i, tap, I, R, SIDE)
        P = tl.dot(A, m, input_precision=PRECISION)
        _, _, _, _, h = _gradient_of_factor(grad_ptr, content_ptr, clip_style_ptr, demod_ptr, grad_demod_ptr, P, n, o,
                                            i, tap, T, T_STYLE, O, I, TAPS, HAS_CLIP_STYLE, HAS_GRAD)  # fmt: skip
        grad_A = tl.dot(h, tl.trans(m), grad_A, input_precision=PRECISION)
    inside = (o < O)[:, None] & (kappa < K)[None, :]
    tl.store(grad_attention_ptr + (n * O + o)[:, None] * K + kappa[None, :], grad_A * scale, mask=inside)


@triton.jit
def _find_peak_kernel(score_ptr, style_ptr, peak_ptr, at_ptr, O, I, K, PEAKS, R: tl.constexpr, SIDE: tl.constexpr,
                      K_P: tl.constexpr, PEAKS_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """Where |P| = p: at [N, 3] = (o, j, sign of P there). Only the block of o that has it works. Grid: frames."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PEAKS_P)
    peaks = tl.load(peak_ptr + n * PEAKS + block, mask=block < PEAKS, other=-1.0)
    first = tl.min(tl.where(peaks == tl.max(peaks, axis=0), block, PEAKS_P), axis=0)
    o = first * BLOCK_O + tl.arange(0, BLOCK_O)
    kappa = tl.arange(0, K_P)
    A = attention(score_ptr, n, o, kappa, O, K)
    TAPS: tl.constexpr = SIDE * SIDE
    best = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    best_step = tl.zeros([BLOCK_O, BLOCK_I], tl.int32)
    for step in range(tl.cdiv(I, BLOCK_I) * TAPS):
        i = step // TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
        m = motion(style_ptr, n * K + kappa, kappa < K, i, step % TAPS, I, R, SIDE)
        P = tl.dot(A, m, input_precision=PRECISION)
        better = tl.abs(P) > tl.abs(best)
        best, best_step = tl.where(better, P, best), tl.where(better, step, best_step)
    j = best_step % TAPS * I + best_step // TAPS * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    position = o[:, None].to(tl.int32) * TAPS * I + j
    is_peak = tl.abs(best) == tl.max(tl.max(tl.abs(best), axis=1), axis=0)
    at = tl.min(tl.min(tl.where(is_peak, position, 2147483647), axis=1), axis=0)
    sign = tl.max(tl.max(tl.where((position == at) & (best > 0), 1, -1), axis=1), axis=0)
    tl.store(at_ptr + n * 3, at // (TAPS * I))
    tl.store(at_ptr + n * 3 + 1, at % (TAPS * I))
    tl.store(at_ptr + n * 3 + 2, sign)


@triton.jit
def _grad_score_kernel(grad_attention_ptr, score_ptr, style_ptr, peak_ptr, at_ptr, grad_score_ptr, grad_peak_ptr, O, I,
                       K, PEAKS, R: tl.constexpr, SIDE: tl.constexpr, K_P: tl.constexpr, PEAKS_P: tl.constexpr,
                       BLOCK_O: tl.constexpr):  # fmt: skip
    """Softmax's backward: adds A (∂A − Σ A ∂A) to grad_score [N, O, K]; writes ±∂p [N], P's gradient at the peak."""
    n = tl.program_id(0).to(tl.int64)
    kappa = tl.arange(0, K_P)
    dots = tl.zeros([BLOCK_O, K_P], tl.float32)
    for block in range(tl.cdiv(O, BLOCK_O)):
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        address = (n * O + o)[:, None] * K + kappa[None, :]
        inside = (o < O)[:, None] & (kappa < K)[None, :]
        dots += attention(score_ptr, n, o, kappa, O, K) * tl.load(grad_attention_ptr + address, mask=inside, other=0.0)
    peak_o, peak_j = tl.load(at_ptr + n * 3), tl.load(at_ptr + n * 3 + 1)
    grad_peak = -tl.sum(tl.sum(dots, axis=1), axis=0) * inverse_peak(peak_ptr, n, PEAKS, PEAKS_P)
    grad_peak *= tl.load(at_ptr + n * 3 + 2)
    tl.store(grad_peak_ptr + n, grad_peak)
    m = motion(style_ptr, n * K + kappa, kappa < K, peak_j % I + tl.zeros([1], tl.int32), peak_j // I, I, R, SIDE)
    for block in range(tl.cdiv(O, BLOCK_O)):
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        address = (n * O + o)[:, None] * K + kappa[None, :]
        inside = (o < O)[:, None] & (kappa < K)[None, :]
        A = attention(score_ptr, n, o, kappa, O, K)
        grad_A = tl.load(grad_attention_ptr + address, mask=inside, other=0.0)
        grad_A += tl.where((o == peak_o)[:, None], grad_peak * tl.sum(m, axis=1)[None, :], 0.0)
        grad = A * (grad_A - tl.sum(A * grad_A, axis=1)[:, None])
        tl.store(grad_score_ptr + address, tl.load(grad_score_ptr + address, mask=inside) + grad, mask=inside)


@triton.jit
def _grad_motion_kernel(grad_ptr, content_ptr, style_ptr, clip_style_ptr, score_ptr, peak_ptr, demod_ptr,
                        grad_demod_ptr, grad_score_ptr, at_ptr, grad_peak_ptr, grad_motion_ptr, grad_clip_style_ptr, T,
                        T_STYLE, O, I, K, PEAKS, INVERSE_ROOT: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr,
                        K_P: tl.constexpr, PEAKS_P: tl.constexpr, HAS_CLIP_STYLE: tl.constexpr, HAS_GRAD: tl.constexpr,
                        BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """∂M [N, K, k·k, I], of which the factors' gradients are small products, and ∂s [N, k·k, I].

    Grid: (tap, block of i), frames. A program goes through the output channels in order.
    """
    n = tl.program_id(1).to(tl.int64)
    TAPS: tl.constexpr = SIDE * SIDE
    tap = tl.program_id(0) % TAPS
    i = tl.program_id(0) // TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
    kappa = tl.arange(0, K_P)
    scale = inverse_peak(peak_ptr, n, PEAKS, PEAKS_P)
    m = motion(style_ptr, n * K + kappa, kappa < K, i, tap, I, R, SIDE)
    grad_m = tl.zeros([K_P, BLOCK_I], tl.float32)
    grad_s = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for block in range(tl.cdiv(O, BLOCK_O)):
        o = block * BLOCK_O + tl.arange(0, BLOCK_O)
        A = attention(score_ptr, n, o, kappa, O, K) * scale
        P = tl.dot(A, m, input_precision=PRECISION)
        w, s, F, U, h = _gradient_of_factor(grad_ptr, content_ptr, clip_style_ptr, demod_ptr, grad_demod_ptr, P, n, o,
                                            i, tap, T, T_STYLE, O, I, TAPS, HAS_CLIP_STYLE, HAS_GRAD)  # fmt: skip
        inside = (o < O)[:, None] & (kappa < K)[None, :]
        grad_score = tl.load(grad_score_ptr + (n * O + o)[:, None] * K + kappa[None, :], mask=inside, other=0.0)
        grad_score *= INVERSE_ROOT
        grad_m = tl.dot(tl.trans(A), h, grad_m, input_precision=PRECISION)
        grad_m = tl.dot(tl.trans(grad_score), w, grad_m, input_precision=PRECISION)
        if HAS_CLIP_STYLE:
            grad_s += U * w * F
    peak_o = tl.load(at_ptr + n * 3) + tl.zeros([1], tl.int32)
    at_peak = tl.sum(attention(score_ptr, n, peak_o, kappa, O, K), axis=0) * tl.load(grad_peak_ptr + n)
    grad_m += tl.where((tap * I + i == tl.load(at_ptr + n * 3 + 1))[None, :], at_peak[:, None], 0.0)
    inside = (kappa < K)[:, None] & (i < I)[None, :]
    tl.store(grad_motion_ptr + ((n * K + kappa)[:, None] * TAPS + tap) * I + i[None, :], grad_m, mask=inside)
    if HAS_CLIP_STYLE:
        tl.store(grad_clip_style_ptr + (n * TAPS + tap) * I + i, tl.sum(grad_s, axis=0), mask=i < I)


@triton.jit
def _grad_content_kernel(grad_ptr, content_ptr, style_ptr, clip_style_ptr, score_ptr, peak_ptr, demod_ptr,
                         grad_demod_ptr, grad_score_ptr, grad_content_ptr, T, T_STYLE, O, I, K, PEAKS,
                         INVERSE_ROOT: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr, K_P: tl.constexpr,
                         PEAKS_P: tl.constexpr, HAS_CLIP_STYLE: tl.constexpr, HAS_GRAD: tl.constexpr,
                         BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """∂W of a clip, summed over its frames in order. Grid: (tap, block of i), blocks of o, clips."""
    b = tl.program_id(2).to(tl.int64)
    TAPS: tl.constexpr = SIDE * SIDE
    tap = tl.program_id(0) % TAPS
    i = tl.program_id(0) // TAPS * BLOCK_I + tl.arange(0, BLOCK_I)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    kappa = tl.arange(0, K_P)
    grad_w = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for n in range(b * T, b * T + T):
        A = attention(score_ptr, n, o, kappa, O, K) * inverse_peak(peak_ptr, n, PEAKS, PEAKS_P)
        m = motion(style_ptr, n * K + kappa, kappa < K, i, tap, I, R, SIDE)
        P = tl.dot(A, m, input_precision=PRECISION)
        w, s, F, U, h = _gradient_of_factor(grad_ptr, content_ptr, clip_style_ptr, demod_ptr, grad_demod_ptr, P, n, o,
                                            i, tap, T, T_STYLE, O, I, TAPS, HAS_CLIP_STYLE, HAS_GRAD)  # fmt: skip
        inside = (o < O)[:, None] & (kappa < K)[None, :]
        grad_score = tl.load(grad_score_ptr + (n * O + o)[:, None] * K + kappa[None, :], mask=inside, other=0.0)
        grad_score *= INVERSE_ROOT
        grad_w = tl.dot(grad_score, m, grad_w + U * F * s[None, :], input_precision=PRECISION)
    address = ((b * O + o)[:, None] * TAPS + tap) * I + i[None, :]
    inside = (o < O)[:, None] & (i < I)[None, :]
    tl.store(grad_content_ptr + address, grad_w.to(grad_content_ptr.dtype.element_ty), mask=inside)


def backward(grad_weight, grad_score, grad_demod, content_weight, motion_style, clip_style, score, demod, peak, dtype):
    """Launches the backward kernels → gradients of content_weight, motion_style and clip_style (else empty)."""
    B, N, O, I, K, R, side = check(content_weight, motion_style, clip_style)
    device, precision = content_weight.device, precision_of(dtype)
    content, style, grad_demod = tap_major(content_weight), motion_style.contiguous(), grad_demod.contiguous()
    has_grad, has_style = grad_weight.numel() > 0, clip_style is not None
    grad, s = tap_major(grad_weight) if has_grad else content, clip_style.contiguous() if has_style else content
    grad_score = grad_score.float().clone(memory_format=torch.contiguous_format)  # softmax's share is added in place
    grad_attention, at = torch.empty_like(score), torch.empty([N, 3], device=device, dtype=torch.int32)
    grad_peak = torch.empty([N], device=device, dtype=torch.float32)
    grad_motion = torch.empty([N, K, side * side, I], device=device, dtype=torch.float32)
    grad_s = torch.empty([N, side * side, I] if has_style else [0], device=device, dtype=torch.float32)
    grad_content = torch.empty_like(content)

    frames = dict(T=N // B, T_STYLE=N // (len(clip_style) if has_style else N), O=O, I=I, K=K, PEAKS=peak.shape[1])
    constants = dict(R=R, SIDE=side, K_P=block_size(K, 16), PEAKS_P=triton.next_power_of_2(peak.shape[1]))
    flags = dict(HAS_CLIP_STYLE=has_style, HAS_GRAD=has_grad)
    inverse_root = (I * side * side) ** -0.5
    saved = (content, style, s, score, peak, demod, grad_demod)

    launch = tile("attention", precision, O, I)
    _grad_attention_kernel[triton.cdiv(O, launch["BLOCK_O"]), N](
        grad, *saved, grad_attention, **frames, **constants, **flags, **launch)  # fmt: skip
    _find_peak_kernel[N,](score, style, peak, at, O, I, K, peak.shape[1], **constants, **tile("peak", precision, O, I))
    _grad_score_kernel[N,](grad_attention, score, style, peak, at, grad_score, grad_peak, O, I, K, peak.shape[1],
                           **constants, BLOCK_O=block_size(O, 128), num_warps=4)  # fmt: skip
    launch = tile("motion", precision, O, I)
    _grad_motion_kernel[triton.cdiv(I, launch["BLOCK_I"]) * side * side, N](
        grad, *saved, grad_score, at, grad_peak, grad_motion, grad_s, INVERSE_ROOT=inverse_root, **frames, **constants,
        **flags, **launch)  # fmt: skip
    launch = tile("content", precision, O, I)
    _grad_content_kernel[triton.cdiv(I, launch["BLOCK_I"]) * side * side, triton.cdiv(O, launch["BLOCK_O"]), B](
        grad, *saved, grad_score, grad_content, INVERSE_ROOT=inverse_root, **frames, **constants, **flags,
        **launch)  # fmt: skip
    if has_style:
        grad_s = grad_s.unflatten(0, (len(clip_style), -1)).sum(dim=(1, 2)).to(clip_style.dtype)
    return grad_content.movedim(-1, -3), _grad_factors(grad_motion, motion_style, side), grad_s


def _grad_factors(grad_motion, motion_style, side):
    """∂M [N, K, k·k, I] → gradient of the factors [N, K, R, I + k + k]: three products, small beside the weights."""
    a, b, c = motion_style.float().split([motion_style.shape[3] - 2 * side, side, side], dim=3)
    scale = motion_style.shape[2] ** -0.5
    bc = (b.unsqueeze(4) * c.unsqueeze(3)).flatten(3)  # [N, K, R, k·k]
    grad_bc = (a @ grad_motion.transpose(2, 3)).unflatten(3, (side, side))
    grad_b, grad_c = (grad_bc * c.unsqueeze(3)).sum(dim=4), (grad_bc * b.unsqueeze(4)).sum(dim=3)
    return (torch.cat([bc @ grad_motion, grad_b, grad_c], dim=3) * scale).to(motion_style.dtype)


@torch.library.custom_op("mostgan::mostatt_backward", mutates_args=())
def mostatt_backward_op(
    grad_weight: Tensor, grad_score: Tensor, grad_demod: Tensor, content_weight: Tensor, motion_style: Tensor,
    clip_style: Tensor | None, score: Tensor, demod: Tensor, peak: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward` as an op of PyTorch's, opaque to the compiler."""
    return backward(grad_weight, grad_score, grad_demod, content_weight, motion_style, clip_style, score, demod, peak,
                    dtype)  # fmt: skip


@mostatt_backward_op.register_fake
def _(grad_weight, grad_score, grad_demod, content_weight, motion_style, clip_style, score, demod, peak, dtype):
    grad_content = torch.empty_like(content_weight.movedim(-3, -1), memory_format=torch.contiguous_format)
    grad_style = torch.empty_like(motion_style, memory_format=torch.contiguous_format)
    grad_s = score.new_empty([0]) if clip_style is None else torch.empty_like(clip_style.contiguous())
    return grad_content.movedim(-1, -3), grad_style, grad_s


def _save(ctx, inputs, output):
    content_weight, motion_style, clip_style, ctx.dtype, _ = inputs
    ctx.save_for_backward(content_weight, motion_style, clip_style, *output[1:])


def _backward(ctx, grad_weight, grad_score, grad_demod, _):
    *grads, grad_s = mostatt_backward_op(grad_weight, grad_score, grad_demod, *ctx.saved_tensors, ctx.dtype)
    return *grads, None if ctx.saved_tensors[2] is None else grad_s, None, None


mostatt_op.register_autograd(_backward, setup_context=_save)
