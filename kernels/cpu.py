"""The ops of `reference.py` as a CPU runs them faster: with gradients written out for training, and
for sampling with the demodulation in the kernel.

A CPU spends more of a training step on reading and writing memory than on arithmetic, and autograd
goes over the large tensors, a kernel for each frame and features of all frames, once for every
operation of a formula. Here they are gone over as seldom as PyTorch's operations allow. Letters and
shapes are those of `reference.py`; mostatt_backward.py derives MoStAtt's gradient.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import reference
from kernels.reference import LEAKY_SLOPE, LRELU_GAIN

# ---------------------------------------------------------------------------------------- training


def trains(x):
    """Whether an op of x runs as written here: on a CPU, eagerly, and with a gradient to come that
    autograd takes, not torch.func.
    """
    if not x.is_cpu or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return torch._C._functorch.maybe_current_level() is None


def _pixels(x):
    """Features [N, C, H, W] → [N, H·W, C]: a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _lrelu_backward(grad, y):
    """The gradient before a leaky ReLU, from its result y. In y's layout: mixed ones are slow."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    return torch.ops.aten.leaky_relu_backward(grad, y, LEAKY_SLOPE, True)


class _MoStAtt(torch.autograd.Function):
    """`mostatt` and `demodulation` of what it gives."""

    @staticmethod
    def forward(ctx, content_weight, motion_style):
        (rows, _, I, side, _), W = content_weight.shape, content_weight.flatten(2)
        M = reference.motion_modulation(motion_style, I, side)
        score = W @ M.view(rows, -1, M.shape[2]).transpose(1, 2) / math.sqrt(M.shape[2])
        score = score.unflatten(2, (-1, M.shape[1])).transpose(1, 2).flatten(0, 1)
        A = score.softmax(dim=2)
        P = A @ M
        peak, at_output = torch.maximum(P.amax(dim=2), -P.amin(dim=2)).max(dim=1)
        peak = torch.where(peak > 0, peak, 1)[:, None, None]
        P_hat = reference.lrelu(P).div_(peak)
        W = W.unsqueeze(1)
        weight = torch.addcmul(W, W, P_hat.unflatten(0, (rows, -1))).flatten(0, 1)
        weight = weight.unflatten(2, (I, side, side))
        demod = reference.demodulation(weight)
        ctx.save_for_backward(
            content_weight, motion_style, M, A, P_hat, peak, at_output, weight, demod
        )
        return weight, score, demod

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weight, grad_score, grad_demod):
        content_weight, style, M, A, P_hat, peak, at_output, weight, demod = ctx.saved_tensors
        rows, _, I, side, _ = content_weight.shape
        W, frames = content_weight.flatten(2), torch.arange(len(M))
        by_demod = (-grad_demod * demod**3).unsqueeze(2)
        U = torch.addcmul(grad_weight.flatten(2), weight.flatten(2), by_demod)
        grad_P = (U.unflatten(0, (rows, -1)) * W.unsqueeze(1)).flatten(0, 1)
        # Times the peak, by which smaller tensors are divided.
        torch.ops.aten.leaky_relu_backward(grad_P, P_hat, LEAKY_SLOPE, True, grad_input=grad_P)
        grad_A = grad_P @ M.transpose(1, 2) / peak
        grad_M = (A / peak).transpose(1, 2) @ grad_P
        # What the peak gets, Σ grad_P · P = Σ grad_A · A, goes to where |P| is largest.
        A_there = A[frames, at_output]
        P_there = (A_there.unsqueeze(1) @ M).squeeze(1)
        at_input = P_there.abs().argmax(dim=1)
        M_there = M[frames, :, at_input]
        grad_peak = -(grad_A * A).sum(dim=(1, 2)) / peak.flatten()
        grad_there = (grad_peak * P_there[frames, at_input].sign()).unsqueeze(1)
        grad_A[frames, at_output] += grad_there * M_there
        grad_M[frames, :, at_input] += grad_there * A_there
        grad_score = grad_score + A * (grad_A - (A * grad_A).sum(dim=2, keepdim=True))
        grad_score = grad_score.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2)
        grad_score = grad_score / math.sqrt(M.shape[2])  # [B, O, T·K]
        grad_M += (grad_score.transpose(1, 2) @ W).view_as(M)
        of_clips = U.addcmul_(U, P_hat).unflatten(0, (rows, -1)).sum(dim=1)
        grad_W = torch.baddbmm(of_clips, grad_score, M.view(rows, -1, M.shape[2]))
        grad_style = reference.motion_modulation_backward(grad_M, style, I, side)
        return grad_W.view_as(content_weight), grad_style


def mostatt_demod(
    weight,
    motion_style,
    content_style=None,
    dtype=None,
    want_weight=True,
    style_gain=None,
    content_first=False,
):
    styled_last = content_style is not None and not content_first
    if style_gain is not None or styled_last:
        args = weight, motion_style, content_style, dtype, want_weight, style_gain, content_first
        return reference.mostatt_demod(*args)
    if content_style is not None:
        weight = weight * content_style[:, None, :, None, None]
    with torch.autocast("cpu", enabled=False):
        modulated, score, demod = _MoStAtt.apply(weight, motion_style.to(weight.dtype))
    modulated = modulated.to(dtype or weight.dtype) if want_weight else weight.new_empty(0)
    return modulated, score, demod


class _ConvUp(torch.autograd.Function):
    """`conv2d_per_frame` with up=2. Its gradient is two matrix products per frame with the windows
    of the gradient: the one of PyTorch's grouped convolution takes twice as long, and needs
    channels-first copies of everything.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return reference.conv2d_per_frame(x, weight, 2)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        (N, I, H, W), (_, O, _, k, _) = x.shape, weight.shape
        grad = grad.contiguous(memory_format=torch.channels_last)
        n, o, h, w = grad.stride()
        windows = grad.as_strided((N, H, W, k, k, O), (n, 2 * h, 2 * w, h, w, o))
        windows = windows.reshape(N, H * W, -1)
        kernels = weight.permute(0, 3, 4, 1, 2).flatten(1, 3)  # [N, k·k·O, I]
        grad_x = (windows @ kernels).view(N, H, W, I).permute(0, 3, 1, 2)
        grad_weight = (_pixels(x).transpose(1, 2) @ windows).view(N, I, k, k, O)
        return grad_x, grad_weight.permute(0, 4, 1, 2, 3)


def conv2d_per_frame(x, weight, up=1):
    if up == 1:
        return reference.conv2d_per_frame(x, weight, up)
    dtype = reference.working_dtype(x)
    return _ConvUp.apply(x.to(dtype), weight.to(dtype))


class _Fir(torch.autograd.Function):
    """`reference._Fir` in the older form, which torch.func does not take: the newer one looks up
    its signature at every call, which takes longer than to filter a small image.
    """

    @staticmethod
    def forward(ctx, x, *settings):
        ctx.settings = settings
        return reference.fir_filter(x, *settings)

    @staticmethod
    def backward(ctx, grad):
        gain, stride, padding, transposed = ctx.settings
        return _Fir.apply(grad, gain, stride, padding, not transposed), None, None, None, None


def fir(x, padding, gain=1.0):
    return _Fir.apply(x, gain, 1, padding, False)


def downsample2d(x):
    return _Fir.apply(x, 1.0, 2, 1, False)


def upsample2d(x):
    return _Fir.apply(x, 4.0, 2, 1, True)


class _DemodBiasLrelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, demod, bias):
        y = reference.demod_bias_lrelu(x, demod, bias)
        ctx.save_for_backward(x, y, demod)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y, demod = ctx.saved_tensors
        grad_z = _lrelu_backward(grad, y)
        # Σ grad_z · x over pixels is the diagonal of a small product: half the time of two passes.
        grad_demod = _pixels(grad_z).transpose(1, 2) @ _pixels(x)
        grad_demod = grad_demod.diagonal(dim1=1, dim2=2).to(demod.dtype) * LRELU_GAIN
        grad_bias = _pixels(grad_z).sum(dim=1).sum(dim=0).to(demod.dtype) * LRELU_GAIN
        grad_x = grad_z.mul_((demod * LRELU_GAIN).to(x.dtype)[:, :, None, None])
        return grad_x, grad_demod, grad_bias


def epilogue(x, demod, bias, up=1, clamp=None):
    x = _DemodBiasLrelu.apply(fir(x, 1, gain=4.0) if up == 2 else x, demod, bias)
    return x if clamp is None else x.clamp(-clamp, clamp)


def conv2d_epilogue(x, weight, demod, bias, up=1, clamp=None):
    return epilogue(conv2d_per_frame(x, weight, up), demod, bias, up, clamp)


# ---------------------------------------------------------------------------------------- sampling


def folds(x):
    """Whether demodulation may go into the kernel, which saves a pass over the features: where no
    gradient, compiler or registered op takes part.
    """
    return x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def folded_conv2d_epilogue(x, weight, demod, bias, up=1, clamp=None):
    """`conv2d_epilogue` where `folds`. Of one kernel and one frame's features, the smaller is
    demodulated.
    """
    if len(x) == 1 and weight[0, 0].numel() < up * up * x[0, 0].numel():
        return conv2d_bias_lrelu(x, demodulated(weight[0], demod[0], up), bias, up, clamp)
    return reference.conv2d_epilogue(x, weight, demod, bias, up, clamp)


def demodulated(weight, demod, up=1):
    """weight · demod · √2, as `conv2d_bias_lrelu` takes it, in the memory layout of the CPU's
    convolutions, which copy any other. weight: [O, I, k, k], demod: [O].
    """
    weight = weight * (demod * LRELU_GAIN)[:, None, None, None]
    # A transposed convolution's layout has input channels first.
    weight = weight.transpose(0, up - 1).contiguous(memory_format=torch.channels_last)
    return weight.transpose(0, up - 1)


def conv2d_bias_lrelu(x, weight, bias, up=1, clamp=None):
    """A synthesis layer with a kernel of `demodulated`: convolution, with up=2 its FIR, then bias
    and leaky ReLU. x: [N, I, H, W], weight: [O, I, k, k], bias: [O].
    """
    if up == 2:
        x = reference.conv2d_shared(x, weight, up)
        x = reference.fir_filter(x, 4.0, 1, 1, False, bias * LRELU_GAIN)
    else:
        x = F.conv2d(x, weight, bias * LRELU_GAIN, padding=weight.shape[-1] // 2)
    x = reference.lrelu(x)
    return x if clamp is None else x.clamp(-clamp, clamp)
