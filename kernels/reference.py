"""Every op in plain PyTorch: what to read to understand an op, and what its kernel is tested
against.

Shapes: B clips, T frames per clip, N = B·T frames (clip by clip), K motion styles, R rank, O/I
output/input channels, k kernel size. Everything here is differentiable as often as wanted and works
in any float dtype.
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
    """Leaky ReLU, in place, without its gain of √2 (spec §1): that is in the weights before it."""
    return F.leaky_relu_(x, LEAKY_SLOPE)


def demod_bias_lrelu(x, demod, bias):
    """√2 · leaky_relu(x · demod + bias) (spec §1, §6). x: [N, O, H, W], demod: [N, O], bias: [O]"""
    dtype = demod.dtype if x.is_cpu else x.dtype  # a CPU takes three times as long in bf16
    demod, bias = (demod * LRELU_GAIN).to(dtype), (bias * LRELU_GAIN).to(dtype)
    return lrelu(torch.addcmul(bias[:, None, None], x, demod[:, :, None, None]).to(x.dtype))


def working_dtype(x):
    """The dtype in which convolutions of x run: autocast's where it is on, as PyTorch's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def fir_filter(x, gain, stride, padding, transposed, bias=None):
    """Filters every channel and keeps every stride-th pixel; or the transpose of that linear map.
    x: [N, C, H, W]; padding: zeros on every side; bias: [C], is added.
    """
    f = [[a * b * gain / 64 for a in FIR_TAPS] for b in FIR_TAPS]  # symmetric: no flip
    f = torch.tensor(f, device=x.device, dtype=x.dtype).expand(x.shape[1], 1, 4, 4)
    if transposed and stride == 2:
        if x.is_cpu and working_dtype(x) == torch.bfloat16:  # fifty times as slow as float32
            bias = None if bias is None else bias.float()
            with torch.autocast("cpu", enabled=False):
                return fir_filter(x.float(), gain, stride, padding, transposed, bias).to(x.dtype)
        return F.conv_transpose2d(x, f, bias, stride=2, padding=padding, groups=x.shape[1])
    if transposed:
        padding = 3 - padding
    return F.conv2d(x, f, bias, stride=stride, padding=padding, groups=x.shape[1])


class _Fir(torch.autograd.Function):
    """`fir_filter` with its derivatives, to any order: it is linear, its transpose of its kind.
    Autograd's own double backward also convolves for the gradient of the filter.
    """

    @staticmethod
    def forward(x, gain, stride, padding, transposed):
        return fir_filter(x, gain, stride, padding, transposed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.settings = inputs[1:]

    @staticmethod
    def backward(ctx, grad):
        gain, stride, padding, transposed = ctx.settings
        return _Fir.apply(grad, gain, stride, padding, not transposed), None, None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Fir.apply(tangent, *ctx.settings)


def _taps_of(x, axis, stride):
    """x0 + 3 x1 + 3 x2 + x3 along an axis, at every stride-th place: adds that fuse."""
    count = (x.shape[axis] - 4) // stride + 1
    of_tap = [x.narrow(axis, d, (count - 1) * stride + 1) for d in range(4)]
    x0, x1, x2, x3 = (v[..., ::stride] if axis == 3 else v[:, :, ::stride] for v in of_tap)
    return x0 + x3 + 3 * (x1 + x2)


def _doubled(x, axis):
    """_taps_of transposed, stride 2, padding 1: 3 x_j + x_{j-1} and 3 x_j + x_{j+1} in turn."""
    n = x.shape[axis]
    padded = F.pad(x, (1, 1) if axis == 3 else (0, 0, 1, 1))
    even, odd = (3 * x + padded.narrow(axis, first, n) for first in (0, 2))
    return torch.stack([even, odd], dim=axis + 1).flatten(axis, axis + 1)


def _fir(x, gain, stride, padding, transposed):
    """_Fir, or compiled the same by adds and products: Inductor makes one pass of them, and under
    torch.func.grad they have a second derivative, which a compiled autograd.Function has not.
    """
    if not torch.compiler.is_compiling():
        filtered = _Fir.apply if torch.is_grad_enabled() else fir_filter
        return filtered(x, gain, stride, padding, transposed)
    if transposed and stride == 2:  # padding is 1
        return _doubled(_doubled(x, 2), 3) * (gain / 64)
    padding = 3 - padding if transposed else padding
    x = F.pad(x, (padding,) * 4)
    return _taps_of(_taps_of(x, 2, stride), 3, stride) * (gain / 64)


def fir(x, padding, gain=1.0):
    """Low-pass filter every channel (spec §1). x: [N, C, H, W]; padding: zeros on every side."""
    return _fir(x, gain, 1, padding, False)


def filter2d(x):
    """H×W → H×W low-pass (spec §1): pad (2, 1)."""
    return fir(F.pad(x, (2, 1, 2, 1)), 0)


def downsample2d(x):
    """H×W → H/2×W/2 (spec §1): pad (1, 1), filter, keep every second pixel; H and W even."""
    return _fir(x, 1.0, 2, 1, False)


def upsample2d(x):
    """H×W → 2H×2W (spec §1): zeros between the pixels, pad (2, 1), filter with gain 4. That is the
    transpose of downsampling, which never touches the zeros.
    """
    return _fir(x, 4.0, 2, 1, True)


def motion_modulation(motion_style, in_channels, kernel_size):
    """Full-rank modulation M_κ[i,y,x] = Σ_r a_r[i] b_r[y] c_r[x] / √R (Eq. 1).

    motion_style: [N, K, R, I + k + k], the factors a, b, c side by side → M: [N, K, I·k·k].
    """
    a, b, c = motion_style.split([in_channels, kernel_size, kernel_size], dim=3)
    bc = (b.unsqueeze(-1) * c.unsqueeze(-2)).flatten(3)  # [N, K, R, k·k]
    return (a.transpose(2, 3) @ bc).flatten(2) / math.sqrt(motion_style.shape[2])


def motion_modulation_backward(grad, motion_style, in_channels, kernel_size):
    """The gradient of `motion_modulation`'s factors from that of M, [N, K, I·k·k]."""
    a, b, c = motion_style.split([in_channels, kernel_size, kernel_size], dim=3)
    bc = (b.unsqueeze(-1) * c.unsqueeze(-2)).flatten(3)  # [N, K, R, k·k]
    grad = grad.unflatten(2, (in_channels, -1)) / math.sqrt(motion_style.shape[2])
    grad_bc = (a @ grad).unflatten(3, (kernel_size, kernel_size))
    grad_b = (grad_bc * c.unsqueeze(-2)).sum(dim=4)
    grad_c = (grad_bc * b.unsqueeze(-1)).sum(dim=3)
    return torch.cat([bc @ grad.transpose(2, 3), grad_b, grad_c], dim=3)


def mostatt(content_weight, motion_style, style_gain=None):
    """Motion style attention (MoStAtt, spec §5, Eq. 2): one modulated weight per frame.

    content_weight: [B, O, I, k, k], W of Eq. 2; frame n uses row n // (N / B), so frames of a clip
    share theirs.
    motion_style: [N, K, R, I + k + k]. style_gain: [K], scales each style's share of P by hand
    (paper B.1); the maximum that P is divided by stays that of the whole P, so that what other
    styles do stays as it was. Returns weight W' [N, O, I, k, k] and the scores [N, O, K].
    """
    clips, _, in_channels, kernel_size, _ = content_weight.shape
    W = content_weight.flatten(2)  # [B, O, I·k·k]
    M = motion_modulation(motion_style, in_channels, kernel_size)  # [N, K, I·k·k]
    of_clip = M.reshape(clips, -1, M.shape[2])  # one product for the styles of all its frames
    score = W @ of_clip.transpose(1, 2) / math.sqrt(M.shape[2])  # [B, O, T·K]
    score = score.unflatten(2, (-1, M.shape[1])).transpose(1, 2).flatten(0, 1)  # [N, O, K]
    A = score.softmax(dim=2)
    P = A @ M  # [N, O, I·k·k]
    # leaky_relu(P / max) = leaky_relu(P) / max: one pass less over the weights. Where P is all zero
    # so is leaky_relu(P), and any divisor gives the 0 wanted.
    peak = torch.maximum(P.amax(dim=(1, 2), keepdim=True), -P.amin(dim=(1, 2), keepdim=True))
    peak = torch.where(peak > 0, peak, 1)
    if style_gain is not None:
        P = (A * style_gain) @ M
    if torch.is_grad_enabled():
        P_hat = F.leaky_relu(P, LEAKY_SLOPE) / peak
    else:
        P_hat = F.leaky_relu_(P, LEAKY_SLOPE).div_(peak)
    P_hat, W = P_hat.unflatten(0, (clips, -1)), W.unsqueeze(1)
    weight = torch.addcmul(W, W, P_hat)  # W · (1 + P_hat)
    return weight.reshape(-1, *content_weight.shape[1:]), score


def demodulation(weight):
    """rsqrt(Σ W'² + 1e-8) per output channel. weight: [..., O, I, k, k] → [..., O] (spec §6)."""
    return (torch.linalg.vector_norm(weight.flatten(-3), dim=-1).square() + 1e-8).rsqrt()


def conv2d_shared(x, weight, up=1):
    """Convolution with one kernel for all frames; 'same' padding, or up=2 (without its FIR).

    x: [N, I, H, W], weight: [O, I, k, k] → [N, O, H, W], or [N, O, 2H+1, 2W+1] with up=2.
    """
    if up == 2:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def conv2d_per_frame(x, weight, up=1):
    """Convolution with one kernel per frame. x: [N, I, H, W], weight: [N, O, I, k, k]; result as
    conv2d_shared.

    On a CPU one call per frame is two to four times faster than one grouped convolution. But
    PyTorch gives a single small frame (up to 20,480 numbers) to a slower library than oneDNN: those
    go in groups of a few. A loop would fix an exported program's number of frames.
    """
    if not x.is_cpu or torch.compiler.is_exporting():
        return conv2d_grouped(x, weight, up).contiguous(memory_format=torch.channels_last)
    group = 1 if x[0].numel() > 20480 else 8
    groups = zip(x.split(group), weight.split(group))
    if group == 1:
        convolved = [conv2d_shared(frame, w[0], up) for frame, w in groups]
    else:
        convolved = [conv2d_grouped(frames, w, up) for frames, w in groups]
    y = convolved[0] if len(convolved) == 1 else torch.cat(convolved)
    return y.contiguous(memory_format=torch.channels_last)


def conv2d_grouped(x, weight, up):
    """conv2d_per_frame as one call, frames side by side on channels."""
    # weight.shape[0] rather than len(weight): torch.export keeps a shape open.
    frames, x = weight.shape[0], x.reshape(1, -1, *x.shape[2:])
    if up == 2:
        y = F.conv_transpose2d(x, weight.transpose(1, 2).flatten(0, 1), stride=2, groups=frames)
    else:
        y = F.conv2d(x, weight.flatten(0, 1), padding=weight.shape[-1] // 2, groups=frames)
    return y.unflatten(1, (frames, -1))[0]


def mostatt_demod(
    weight,
    motion_style,
    content_style=None,
    dtype=None,
    want_weight=True,
    style_gain=None,
    content_first=False,
):
    """What MoStAtt's kernel gives in one go: the clip's content style, `mostatt`, `demodulation`.

    weight: [B', O, I, k, k], frame n uses row n // (N / B'). content_style: [B, I], frame n uses
    row n // (N / B); it multiplies the weight before the score (content_first: strategy i of paper
    4.3), or the result (strategy ii).
    style_gain: as `mostatt` takes it. Returns weight W' [N, O, I, k, k] in dtype (or empty), score
    [N, O, K], demod [N, O].

    On a CPU autocast does not reach in here: it would round every weight before MoStAtt, too.
    """
    if weight.is_cpu and torch.is_autocast_enabled("cpu"):
        dtype = dtype or torch.get_autocast_dtype("cpu")
        args = weight, motion_style.to(weight.dtype), content_style, dtype, want_weight
        with torch.autocast("cpu", enabled=False):
            return mostatt_demod(*args, style_gain, content_first)
    if content_style is not None and content_first:
        weight = _of_rows(weight, len(content_style)) * content_style[:, None, :, None, None]
        content_style = None
    weight, score = mostatt(weight, motion_style, style_gain)
    if content_style is not None:
        weight = weight * _of_rows(content_style, weight.shape[0])[:, None, :, None, None]
    demod = demodulation(weight)
    return weight.to(dtype or weight.dtype) if want_weight else weight.new_empty(0), score, demod


def _of_rows(x, count):
    """Every row of x as often as makes `count` rows; one row is left to broadcast."""
    return x if len(x) == 1 else x.repeat_interleave(count // len(x), dim=0)


def _slope(x):
    """The derivative of leaky ReLU, in x's dtype."""
    return torch.full_like(x, LEAKY_SLOPE).masked_fill_(x > 0, 1)


def mostatt_backward(grads, inputs, score, demod, content_first):
    """The gradient of `mostatt_demod`, written out (mostatt_backward.py has the formulas and the
    letters).

    grads: of W' (may be empty), score and demod. inputs: weight, motion_style, content_style or
    None; their gradients are returned. score and demod are the forward results.
    """
    (grad_weight, grad_score, grad_demod), (weight, motion_style, content_style) = grads, inputs
    rows, _, I, side, _ = weight.shape
    frames = len(motion_style)
    w = _of_rows(weight.flatten(2), frames)  # [N, O, J]
    s = torch.ones_like(w[:1, :1])
    if content_style is not None:
        s = _of_rows(content_style, frames).repeat_interleave(side * side, dim=1).unsqueeze(1)
    first = s if content_first else torch.ones_like(s)
    root = math.sqrt(w.shape[2])
    M = motion_modulation(motion_style, I, side)
    A = score.softmax(dim=2)
    P = A @ M
    size, at = P.abs().flatten(1).max(dim=1)
    scale = torch.where(size > 0, 1 / size, 0)[:, None, None]
    F_ = 1 + F.leaky_relu(P * scale, LEAKY_SLOPE)
    U = -(grad_demod * demod**3).unsqueeze(2) * (w * s * F_)
    if grad_weight.numel():
        U = U + grad_weight.flatten(2)
    grad_P = U * w * s * _slope(P) * scale
    grad_peak = -(grad_P * P).sum(dim=(1, 2), keepdim=True) * scale  # goes to where |P| is largest
    sign = P.flatten(1).gather(1, at[:, None]).sign()
    grad_P = grad_P.flatten(1).scatter_add(1, at[:, None], grad_peak[:, :, 0] * sign).view_as(P)
    grad_A = grad_P @ M.transpose(1, 2)
    grad_score = grad_score + A * (grad_A - (A * grad_A).sum(dim=2, keepdim=True))
    grad_M = A.transpose(1, 2) @ grad_P + grad_score.transpose(1, 2) @ (w * first) / root
    by_score = grad_score @ M / root
    grad_w = (U * F_ * s + by_score * first).unflatten(0, (rows, -1)).sum(dim=1).view_as(weight)
    grad_s = None
    if content_style is not None:
        grad_s = (w * (U * F_ + by_score if content_first else U * F_)).unflatten(2, (I, -1))
        grad_s = grad_s.sum(dim=(1, 3)).unflatten(0, (len(content_style), -1)).sum(dim=1)
    return grad_w, motion_modulation_backward(grad_M, motion_style, I, side), grad_s


def epilogue(x, demod, bias, up=1, clamp=None):
    """What follows a synthesis convolution: with up=2 the transposed one's FIR, then
    `demod_bias_lrelu`. clamp: bound of the result's magnitude (spec §1), or None.
    """
    x = demod_bias_lrelu(fir(x, 1, gain=4.0) if up == 2 else x, demod, bias)
    return x if clamp is None else x.clamp(-clamp, clamp)


def epilogue_backward(grad, y, demod, bias, up=1, clamp=None):
    """The gradient of `epilogue` to x, demod and bias from its result y and that of y."""
    if clamp is not None:
        grad = torch.where(y.abs() < clamp, grad, 0)
    grad_z = grad * _slope(y) * LRELU_GAIN
    # u · demod, pixel by pixel: bias times a sum, taken off another, would take digits with it.
    scaled = y / (_slope(y) * LRELU_GAIN) - bias[:, None, None]
    grad_demod = (grad_z * scaled).sum(dim=(2, 3)) / demod
    grad_x = grad_z * demod[:, :, None, None]
    if up == 2:
        grad_x = fir_filter(grad_x, 4.0, 1, 1, True)
    return grad_x, grad_demod, grad_z.sum(dim=(0, 2, 3))


def conv2d_per_frame_grad_x(grad, weight, up=1):
    """The gradient of `conv2d_per_frame` to x: a convolution of stride 2, or a transposed one."""
    frames, grad = len(weight), grad.reshape(1, -1, *grad.shape[2:])
    if up == 2:
        y = F.conv2d(grad, weight.transpose(1, 2).flatten(0, 1), stride=2, groups=frames)
    else:
        padding = weight.shape[-1] // 2
        y = F.conv_transpose2d(grad, weight.flatten(0, 1), padding=padding, groups=frames)
    return y.unflatten(1, (frames, -1))[0]


def conv2d_per_frame_grad_weight(grad, x, side, up=1):
    """The gradient of `conv2d_per_frame` to its kernels [N, O, I, side, side]."""
    (frames, out_channels), channels = grad.shape[:2], x.shape[1]
    grad, x = (v.reshape(1, -1, *v.shape[2:]) for v in (grad, x))
    if up == 2:  # the transposed convolution of x is the gradient of a convolution of y
        shape = [frames * channels, out_channels, side, side]
        of_frames = torch.nn.grad.conv2d_weight(grad, shape, x, stride=2, groups=frames)
        return of_frames.unflatten(0, (frames, channels)).transpose(1, 2)
    shape = [frames * out_channels, channels, side, side]
    of_frames = torch.nn.grad.conv2d_weight(x, shape, grad, padding=side // 2, groups=frames)
    return of_frames.unflatten(0, (frames, out_channels))


def conv2d_epilogue(x, weight, demod, bias, up=1, clamp=None):
    """A synthesis layer: `conv2d_per_frame`, then `epilogue`. Arguments as they take them."""
    return epilogue(conv2d_per_frame(x, weight, up), demod, bias, up, clamp)
