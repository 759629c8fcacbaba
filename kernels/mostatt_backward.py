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

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kernels import reference
from kernels.choose import Op, registered
from kernels.launch import channels_first, channels_last, constants, edge
from kernels.mostatt import (
    MOSTATT,
    Tensors,
    attention,
    content_tile,
    inverse_peak,
    load_styles,
    motion,
    of_styles,
    shape_of,
    tap_and_channels,
    tiled,
)


class Gradients(NamedTuple):
    """∂W' and ∂demod, with demod itself."""

    weight: Any  # [N, O, k·k, I]
    demod: Any  # [N, O]
    demod_was: Any  # [N, O]


class AtScore(NamedTuple):
    """What comes of ∂A, for the passes after it."""

    grad_score: Any  # [N, O, K]
    grad_peak: Any  # [N]: P's gradient at its largest entry, ±∂p
    at: Any  # [N, 3]: where |P| = p, as o, j, and the sign of P there


@triton.jit
def _gradient_of_factor(t, grads, A, m, n, o, i, tap, S):
    """A tile of w, s, U F (see the top) and h = U w s leaky_relu'(P), from A / p and m."""
    P = tl.dot(A, m, input_precision=S.PRECISION)  # P / p
    w, address, inside, s = content_tile(t, n, o, i, tap, S)
    F = 1.0 + tl.maximum(P, 0.2 * P)
    demod = tl.load(grads.demod_was + n * S.O + o, mask=o < S.O, other=0.0)
    grad_demod = tl.load(grads.demod + n * S.O + o, mask=o < S.O, other=0.0).to(tl.float32)
    ws = w * s[None, :]
    U = ws * F * (-demod * demod * demod * grad_demod)[:, None]  # ∂demod/∂W' = −demod³ W'
    if S.HAS_WEIGHT:
        grad_ptr = grads.weight + n * S.O * S.TAPS * S.I
        U += tl.load(grad_ptr + address, mask=inside, other=0.0).to(tl.float32)
    return w, s, U * F, U * ws * tl.where(P > 0, 1.0, 0.2)


@triton.jit
def _grad_attention_kernel(t, grads, grad_attention_ptr, S):
    """∂A = h Mᵀ / p → [N, O, K], still without the share of ∂p. Grid: blocks of o, frames."""
    n = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * S.BLOCK_O + tl.arange(0, S.BLOCK_O)
    scale = inverse_peak(t, n, S)
    A = attention(t, n, o, S) * scale
    grad_A = tl.zeros([S.BLOCK_O, S.K_P], tl.float32)
    for step in range(tl.cdiv(S.I, S.BLOCK_I) * S.TAPS):
        tap, i = tap_and_channels(step, S)
        m = motion(t, n, i, tap, S)
        w, s, UF, h = _gradient_of_factor(t, grads, A, m, n, o, i, tap, S)
        grad_A = tl.dot(h, tl.trans(m), grad_A, input_precision=S.PRECISION)
    address, inside = of_styles(n, o, S)
    tl.store(grad_attention_ptr + address, grad_A * scale, mask=inside)


@triton.jit
def _find_peak_kernel(t, at_ptr, S):
    """Where |P| = p → at. Only the block of o that has it works. Grid: frames."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, S.PEAKS_P)
    peaks = tl.load(t.peak + n * S.PEAKS + block, mask=block < S.PEAKS, other=-1.0)
    first = tl.min(tl.where(peaks == tl.max(peaks, axis=0), block, S.PEAKS_P), axis=0)
    o = tl.arange(0, S.BLOCK_O) + first * S.BLOCK_O
    A = attention(t, n, o, S)
    best = tl.zeros([S.BLOCK_O, S.BLOCK_I], tl.float32)
    best_step = tl.zeros([S.BLOCK_O, S.BLOCK_I], tl.int32)
    for step in range(tl.cdiv(S.I, S.BLOCK_I) * S.TAPS):
        tap, i = tap_and_channels(step, S)
        P = tl.dot(A, motion(t, n, i, tap, S), input_precision=S.PRECISION)
        better = tl.abs(P) > tl.abs(best)
        best, best_step = tl.where(better, P, best), tl.where(better, step, best_step)
    i = tl.arange(0, S.BLOCK_I)[None, :] + best_step // S.TAPS * S.BLOCK_I
    position = (o[:, None].to(tl.int32) * S.TAPS + best_step % S.TAPS) * S.I + i
    is_peak = tl.abs(best) == tl.max(tl.max(tl.abs(best), axis=1), axis=0)
    at = tl.min(tl.min(tl.where(is_peak, position, 2147483647), axis=1), axis=0)
    positive = tl.where((position == at) & (best > 0), 1, -1)
    tl.store(at_ptr + n * 3, at // (S.TAPS * S.I))
    tl.store(at_ptr + n * 3 + 1, at % (S.TAPS * S.I))
    tl.store(at_ptr + n * 3 + 2, tl.max(tl.max(positive, axis=1), axis=0))


@triton.jit
def _grad_score_kernel(t, of, grad_attention_ptr, S):
    """Softmax's backward: adds A (∂A − Σ A ∂A) to grad_score; writes grad_peak. Grid: frames."""
    n = tl.program_id(0).to(tl.int64)
    dots = tl.zeros([S.BLOCK_O, S.K_P], tl.float32)
    for block in range(tl.cdiv(S.O, S.BLOCK_O)):
        o = tl.arange(0, S.BLOCK_O) + block * S.BLOCK_O
        dots += attention(t, n, o, S) * load_styles(grad_attention_ptr, n, o, S)
    peak_o, peak_j = tl.load(of.at + n * 3), tl.load(of.at + n * 3 + 1)
    grad_peak = -tl.sum(tl.sum(dots, axis=1), axis=0) * inverse_peak(t, n, S)
    grad_peak *= tl.load(of.at + n * 3 + 2)
    tl.store(of.grad_peak + n, grad_peak)
    m = motion(t, n, peak_j % S.I + tl.zeros([1], tl.int32), peak_j // S.I, S)
    for block in range(tl.cdiv(S.O, S.BLOCK_O)):
        o = tl.arange(0, S.BLOCK_O) + block * S.BLOCK_O
        address, inside = of_styles(n, o, S)
        A, grad_A = attention(t, n, o, S), load_styles(grad_attention_ptr, n, o, S)
        grad_A += tl.where((o == peak_o)[:, None], grad_peak * tl.sum(m, axis=1)[None, :], 0.0)
        grad = A * (grad_A - tl.sum(A * grad_A, axis=1)[:, None])
        grad += tl.load(of.grad_score + address, mask=inside)
        tl.store(of.grad_score + address, grad, mask=inside)


@triton.jit
def _grad_motion_kernel(t, grads, of, grad_motion_ptr, grad_style_ptr, S):
    """∂M [N, K, k·k, I] and ∂s [N, k·k, I], over o in order. Grid: (block of i, tap), frames."""
    n = tl.program_id(1).to(tl.int64)
    tap, i = tap_and_channels(tl.program_id(0), S)
    kappa = tl.arange(0, S.K_P)
    scale = inverse_peak(t, n, S)
    m = motion(t, n, i, tap, S)
    grad_m = tl.zeros([S.K_P, S.BLOCK_I], tl.float32)
    grad_s = tl.zeros([S.BLOCK_O, S.BLOCK_I], tl.float32)
    for block in range(tl.cdiv(S.O, S.BLOCK_O)):
        o = tl.arange(0, S.BLOCK_O) + block * S.BLOCK_O
        A = attention(t, n, o, S) * scale
        w, s, UF, h = _gradient_of_factor(t, grads, A, m, n, o, i, tap, S)
        grad_score = load_styles(of.grad_score, n, o, S) * S.INVERSE_ROOT
        grad_m = tl.dot(tl.trans(A), h, grad_m, input_precision=S.PRECISION)
        if S.CONTENT_FIRST:
            grad_s += w * tl.dot(grad_score, m, UF, input_precision=S.PRECISION)
            w *= s[None, :]
        elif S.HAS_STYLE:
            grad_s += w * UF
        grad_m = tl.dot(tl.trans(grad_score), w, grad_m, input_precision=S.PRECISION)
    peak_o = tl.load(of.at + n * 3) + tl.zeros([1], tl.int32)
    at_peak = tl.sum(attention(t, n, peak_o, S), axis=0) * tl.load(of.grad_peak + n)
    is_peak = tap * S.I + i == tl.load(of.at + n * 3 + 1)
    grad_m += tl.where(is_peak[None, :], at_peak[:, None], 0.0)
    inside = (kappa < S.K)[:, None] & (i < S.I)[None, :]
    address = ((n * S.K + kappa)[:, None] * S.TAPS + tap) * S.I + i[None, :]
    tl.store(grad_motion_ptr + address, grad_m, mask=inside)
    if S.HAS_STYLE:
        address = (n * S.TAPS + tap) * S.I + i
        tl.store(grad_style_ptr + address, tl.sum(grad_s, axis=0), mask=i < S.I)


@triton.jit
def _grad_content_kernel(t, grads, grad_score_ptr, grad_content_ptr, FRAMES, S):
    """∂w of FRAMES frames in order → [N / FRAMES, O, k·k, I]. Grid: (i, tap), o, frame groups."""
    group = tl.program_id(2).to(tl.int64)
    tap, i = tap_and_channels(tl.program_id(0), S)
    o = tl.program_id(1) * S.BLOCK_O + tl.arange(0, S.BLOCK_O)
    grad_w = tl.zeros([S.BLOCK_O, S.BLOCK_I], tl.float32)
    for n in range(group * FRAMES, group * FRAMES + FRAMES):
        A = attention(t, n, o, S) * inverse_peak(t, n, S)
        m = motion(t, n, i, tap, S)
        w, s, UF, h = _gradient_of_factor(t, grads, A, m, n, o, i, tap, S)
        grad_score = load_styles(grad_score_ptr, n, o, S) * S.INVERSE_ROOT
        if S.CONTENT_FIRST:
            m *= s[None, :]
        grad_w += UF * s[None, :]
        grad_w = tl.dot(grad_score, m, grad_w, input_precision=S.PRECISION)
    address = ((group * S.O + o)[:, None] * S.TAPS + tap) * S.I + i[None, :]
    inside = (o < S.O)[:, None] & (i < S.I)[None, :]
    tl.store(grad_content_ptr + address, grad_w.to(grad_content_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------- launchers


def frames_of_a_program(frames, programs):
    """Frames that a program of `_grad_content_kernel` adds up, if a GPU keeps 512 programs."""
    divisors = [n for n in range(1, frames + 1) if frames % n == 0]
    return max(n for n in divisors if n == 1 or programs * frames // n >= 512)


def backward(grad_weight, grad_score, grad_demod, *saved):
    """Gradients of weight, motion_style and content_style (else empty)."""
    weight, motion_style, content_style, score, demod, peak, dtype, content_first = saved
    has_weight = grad_weight.numel() > 0
    shape = shape_of(*saved[:3], dtype, has_weight, content_first)
    B, _, I, side, _ = weight.shape
    w, N = channels_last(weight), len(motion_style)

    empty = functools.partial(torch.empty, device=w.device, dtype=torch.float32)
    s = w if content_style is None else content_style.contiguous()
    t = Tensors(w, motion_style.contiguous(), s, score, peak)
    grad_weight = channels_last(grad_weight) if has_weight else w
    grads = Gradients(grad_weight, grad_demod.contiguous(), demod)
    grad_score = grad_score.float().clone(memory_format=torch.contiguous_format)
    of = AtScore(grad_score, empty(N), empty(N, 3, dtype=torch.int32))

    grad_attention, (S, launch) = torch.empty_like(score), tiled("attention", shape)
    grid = triton.cdiv(shape.O, S.BLOCK_O.value), N
    _grad_attention_kernel[grid](t, grads, grad_attention, S, **launch)
    S, launch = tiled("peak", shape)
    _find_peak_kernel[(N,)](t, of.at, S, **launch)
    S = shape._replace(**constants(BLOCK_O=edge(shape.O, 64, least=16)))
    _grad_score_kernel[(N,)](t, of, grad_attention, S, num_warps=4)

    grad_motion = empty(N, shape.K, side * side, I)
    grad_s = empty(0) if content_style is None else empty(N, side * side, I)
    S, launch = tiled("motion", shape)
    grid = triton.cdiv(I, S.BLOCK_I.value) * side * side, N
    _grad_motion_kernel[grid](t, grads, of, grad_motion, grad_s, S, **launch)

    S, launch = tiled("content", shape)
    columns = triton.cdiv(I, S.BLOCK_I.value) * side * side
    rows = triton.cdiv(shape.O, S.BLOCK_O.value)
    frames = frames_of_a_program(N // B, B * columns * rows)
    groups = N // frames
    kept = weight.dtype if groups == B else torch.float32
    grad_content, grid = empty(groups, *w.shape[1:], dtype=kept), (columns, rows, groups)
    _grad_content_kernel[grid](t, grads, of.grad_score, grad_content, frames, S, **launch)
    if groups > B:
        grad_content = grad_content.unflatten(0, (B, -1)).sum(dim=1).to(weight.dtype)
    if content_style is not None:
        of_clips = grad_s.unflatten(0, (len(content_style), -1))
        grad_s = of_clips.sum(dim=(1, 2)).to(content_style.dtype)
    grad_style = reference.motion_modulation_backward(  # sums with cancellation, and small ones
        grad_motion.transpose(2, 3).flatten(2).double(), motion_style.double(), I, side
    )
    return channels_first(grad_content), grad_style.to(motion_style.dtype), grad_s


# ------------------------------------------------------------------------------------- registration


def twin(grad_weight, grad_score, grad_demod, *saved):
    """`backward` in plain PyTorch and float32."""
    weight, motion_style, content_style, score, demod, _, _, content_first = saved
    s = None if content_style is None else content_style.float()
    grads = grad_weight.float(), grad_score.float(), grad_demod.float()
    grad_content, grad_style, grad_s = reference.mostatt_backward(
        grads, (weight.float(), motion_style.float(), s), score, demod, content_first
    )
    grad_content = channels_first(channels_last(grad_content.to(weight.dtype)))
    grad_s = score.new_empty([0]) if s is None else grad_s.to(content_style.dtype)
    return grad_content, grad_style.to(motion_style.dtype).contiguous(), grad_s


def _keep(inputs, output):
    *tensors, dtype, _, content_first = inputs
    return (*tensors, *output[1:]), (dtype, content_first)


def _gradient(ctx, *grads):
    *grads, grad_s = mostatt_backward_op(*grads[:3], *ctx.saved_tensors, *ctx.settings)
    return *grads, None if ctx.saved_tensors[2] is None else grad_s, None, None, None


BACKWARD = Op("mostatt_backward", twin, {"Triton": backward})
INPUTS = "Tensor weight, Tensor motion_style, Tensor? content_style"
mostatt_backward_op = registered(
    BACKWARD,
    f"(Tensor grad_weight, Tensor grad_score, Tensor grad_demod, {INPUTS}, Tensor score, "
    "Tensor demod, Tensor peak, ScalarType dtype, bool content_first) -> (Tensor, Tensor, Tensor)",
)
mostatt_op = registered(
    MOSTATT,
    f"({INPUTS}, ScalarType dtype, bool want_weight, bool content_first)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _keep,
    _gradient,
)
