"""Every op in plain PyTorch: what to read to understand an op, and what its kernel is tested against.

Shapes: B clips, T frames per clip, N = B·T frames (clip by clip), K motion styles, R rank, O/I output/input
channels, k kernel size. Everything here is differentiable as often as wanted and works in any float dtype.
"""

import math

import torch
import torch.nn.functional as F

FIR_TAPS = (1.0, 3.0, 3.0, 1.0)  # f = outer(taps, taps) / 64, spec §1
LEAKY_SLOPE = 0.2
LRELU_GAIN = math.sqrt(2)


def normalize(x):
    """x · rsqrt(mean(x², dim=1) + 1e-8): unit second moment over channels (spec §1). x: [B, C]."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def lrelu(x):
    """Leaky ReLU without its gain of √2 (spec §1): the gain goes into the weights and bias before it, as it may with a
    positively homogeneous function. In place: x must be fresh.
    """
    return F.leaky_relu_(x, LEAKY_SLOPE)


def demod_bias_lrelu(x, demod, bias):
    """Epilogue of a synthesis layer: √2 · leaky_relu(x · demod + bias) (spec §1, §6).

    x: [N, O, H, W]; demod: [N, O], the demodulation factor per frame and channel; bias: [O].
    """
    demod, bias = (demod * LRELU_GAIN).to(x.dtype), (bias * LRELU_GAIN).to(x.dtype)
    return lrelu(torch.addcmul(bias[:, None, None], x, demod[:, :, None, None]))


class _Fir(torch.autograd.Function):
    """Depthwise low-pass filter, or its transpose. Each is the other's gradient, to any order.

    Autograd's own double backward of a convolution also convolves for the filter's gradient, which nobody wants: for
    R1 that costs more than the filter itself. In channels-last memory, the fastest plain form on a CPU.
    """

    @staticmethod
    def forward(x, gain, stride, padding, transposed):
        taps = torch.tensor(FIR_TAPS, device=x.device, dtype=x.dtype)
        f = (torch.outer(taps, taps) * (gain / 64)).expand(x.shape[1], 1, 4, 4)  # symmetric: no flip to think of
        if transposed and stride == 2:
            return F.conv_transpose2d(x, f, stride=2, padding=padding, groups=x.shape[1])
        if transposed:
            padding = 3 - padding
        return F.conv2d(x, f, stride=stride, padding=padding, groups=x.shape[1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.settings = inputs[1:]

    @staticmethod
    def backward(ctx, grad):
        gain, stride, padding, transposed = ctx.settings
        return _Fir.apply(grad, gain, stride, padding, not transposed), None, None, None, None


def _taps_of(x, axis, stride):
    """(x0, 3 x1, 3 x2, x3) summed along an axis, at every stride-th place: plain adds that a compiler fuses."""
    count = (x.shape[axis] - 4) // stride + 1
    of_tap = [x.narrow(axis, d, (count - 1) * stride + 1) for d in range(4)]
    x0, x1, x2, x3 = (v[..., ::stride] if axis == 3 else v[:, :, ::stride] for v in of_tap)
    return x0 + x3 + 3 * (x1 + x2)


def _doubled(x, axis):
    """The transpose of _taps_of with stride 2 and a pixel of padding: 3 x_j + x_{j-1} and 3 x_j + x_{j+1} in turn."""
    n = x.shape[axis]
    padded = F.pad(x, (1, 1) if axis == 3 else (0, 0, 1, 1))
    even, odd = (3 * x + padded.narrow(axis, first, n) for first in (0, 2))
    return torch.stack([even, odd], dim=axis + 1).flatten(axis, axis + 1)


def _fir(x, gain, stride, padding, transposed):
    """_Fir, or in a compiled function the same by adds and products: Inductor makes one pass of them and of what is
    around, and they have a second derivative under torch.func.grad, which a compiled autograd.Function has not.
    """
    if not torch.compiler.is_compiling():
        return _Fir.apply(x, gain, stride, padding, transposed)
    if transposed and stride == 2:  # padding is 1
        return _doubled(_doubled(x, 2), 3) * (gain / 64)
    padding = 3 - padding if transposed else padding
    x = F.pad(x, (padding,) * 4)
    return _taps_of(_taps_of(x, 2, stride), 3, stride) * (gain / 64)


def fir(x, padding, gain=1.0):
    """Low-pass filter every channel (spec §1). x: [N, C, H, W]; padding: zeros before and after on both axes."""
    return _fir(x, gain, 1, padding, False)


def filter2d(x):
    """H×W → H×W low-pass (spec §1): pad (2, 1)."""
    return fir(F.pad(x, (2, 1, 2, 1)), 0)


def downsample2d(x):
    """H×W → H/2×W/2 (spec §1): pad (1, 1), filter, keep every second pixel; H and W even."""
    return _fir(x, 1.0, 2, 1, False)


def upsample2d(x):
    """H×W → 2H×2W (spec §1): zeros between the pixels, pad (2, 1), filter with gain 4.

    That is the transpose of downsampling, as a stride-2 transposed convolution that never touches the zeros.
    """
    return _fir(x, 4.0, 2, 1, True)


def motion_modulation(motion_style, in_channels, kernel_size):
    """Full-rank modulation M_κ[i,y,x] = Σ_r a_r[i] b_r[y] c_r[x] / √R (Eq. 1).

    motion_style: [N, K, R, I + k + k], the factors a, b, c side by side → M: [N, K, I·k·k].
    """
    rank = motion_style.shape[2]
    a, b, c = motion_style.split([in_channels, kernel_size, kernel_size], dim=3)
    bc = (b.unsqueeze(-1) * c.unsqueeze(-2)).flatten(3)  # [N, K, R, k·k]
    return (a.transpose(2, 3) @ bc).flatten(2) / math.sqrt(rank)


def mostatt(content_weight, motion_style, style_gain=None):
    """Motion style attention (MoStAtt, spec §5, Eq. 2): one modulated weight per frame.

    content_weight: [B, O, I, k, k], W of Eq. 2; frame n uses row n // (N / B), so frames of a clip share theirs.
    motion_style: [N, K, R, I + k + k]. style_gain: [K], scales each style's share of P by hand (paper B.1); the maximum
    that P is divided by stays that of the whole P, so that what other styles do stays as it was.
    Returns weight W' [N, O, I, k, k] and the pre-softmax score [N, O, K].
    """
    clips, _, in_channels, kernel_size, _ = content_weight.shape
    W = content_weight.flatten(2)  # [B, O, I·k·k]
    M = motion_modulation(motion_style, in_channels, kernel_size)  # [N, K, I·k·k]
    of_clip = M.reshape(clips, -1, M.shape[2])  # the styles of all frames of a clip meet its weight in one product
    score = W @ of_clip.transpose(1, 2) / math.sqrt(M.shape[2])  # [B, O, T·K]
    score = score.unflatten(2, (-1, M.shape[1])).transpose(1, 2).flatten(0, 1)  # [N, O, K]
    A = score.softmax(dim=2)
    P = A @ M  # [N, O, I·k·k]
    # leaky_relu(P / max) = leaky_relu(P) / max: one pass less over the weights. Where P is all zero so is
    # leaky_relu(P), and any divisor gives the 0 wanted.
    peak = torch.maximum(P.amax(dim=(1, 2), keepdim=True), -P.amin(dim=(1, 2), keepdim=True))
    peak = torch.where(peak > 0, peak, 1)
    if style_gain is not None:
        P = (A * style_gain) @ M
    P_hat = (F.leaky_relu(P, LEAKY_SLOPE) / peak).unflatten(0, (clips, -1))
    W = W.unsqueeze(1)
    weight = torch.addcmul(W, W, P_hat)  # W · (1 + P_hat)
    return weight.reshape(-1, *content_weight.shape[1:]), score


def demodulation(weight):
    """rsqrt(Σ W'² + 1e-8) per output channel. weight: [..., O, I, k, k] → [..., O] (spec §6)."""
    return (torch.linalg.vector_norm(weight.flatten(-3), dim=-1).square() + 1e-8).rsqrt()


def conv2d_shared(x, weight, up=1):
    """Convolution with one kernel for all frames; 'same' padding, or up=2 (spec §1, without its FIR).

    x: [N, I, H, W], weight: [O, I, k, k] → [N, O, H, W], or [N, O, 2H+1, 2W+1] with up=2.
    """
    if up == 2:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def conv2d_per_frame(x, weight, up=1):
    """Convolution with one kernel per frame. x: [N, I, H, W], weight: [N, O, I, k, k]; result as conv2d_shared.

    On a CPU one call per frame is two to four times faster than one grouped convolution. But PyTorch gives a single
    small frame (up to 20,480 numbers) to a slower library than oneDNN: those go in groups of a few.
    """
    if not x.is_cpu or torch.compiler.is_exporting():  # a loop would fix an exported program's number of frames
        return _conv2d_grouped(x, weight, up).contiguous(memory_format=torch.channels_last)
    group = 1 if x[0].numel() > 20480 else 8
    if group == 1:
        convolved = [conv2d_shared(frame, w, up) for frame, w in zip(x.split(1), weight.unbind(0))]
    else:
        convolved = [_conv2d_grouped(frames, w, up) for frames, w in zip(x.split(group), weight.split(group))]
    y = convolved[0] if len(convolved) == 1 else torch.cat(convolved)
    return y.contiguous(memory_format=torch.channels_last)


def _conv2d_grouped(x, weight, up):
    """conv2d_per_frame as one call, frames side by side on channels."""
    frames, out_channels = weight.shape[:2]
    side_by_side = x.reshape(1, -1, *x.shape[2:])
    if up == 2:
        y = F.conv_transpose2d(side_by_side, weight.transpose(1, 2).flatten(0, 1), stride=2, groups=frames)
    else:
        y = F.conv2d(side_by_side, weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=frames)
    return y.view(frames, out_channels, *y.shape[2:])



def mostatt_demod(content_weight, motion_style, clip_style=None, dtype=None, want_weight=True, style_gain=None):
    """MoStAtt with all that its kernel gives in one go: `mostatt`, then the clip's style, then `demodulation`.

    clip_style: [B', I] multiplies the modulated weight of frame n by row n // (N / B') (strategy ii of paper 4.3).
    style_gain: as `mostatt` takes it.
    Returns weight W' [N, O, I, k, k] in dtype (empty if not want_weight), score [N, O, K], demod [N, O].
    """
    weight, score = mostatt(content_weight, motion_style, style_gain)
    if clip_style is not None:
        clip_style = clip_style.repeat_interleave(weight.shape[0] // len(clip_style), dim=0)
        weight = weight * clip_style[:, None, :, None, None]
    demod = demodulation(weight)
    return weight.to(dtype or weight.dtype) if want_weight else weight.new_empty(0), score, demod


def epilogue(x, demod, bias, up=1, clamp=None):
    """What follows a synthesis convolution: with up=2 the transposed convolution's FIR, then `demod_bias_lrelu`.

    clamp: bound of the result's magnitude (spec §1), or None. Shapes as in `fir` and `demod_bias_lrelu`.
    """
    x = demod_bias_lrelu(fir(x, 1, gain=4.0) if up == 2 else x, demod, bias)
    return x if clamp is None else x.clamp(-clamp, clamp)
