"""Equalized-rate layers that generator and discriminator share (spec §1, §3)."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

import kernels


def full_precision(forward):
    """Decorator: run a module's method outside autocast. For what is small and sets the rest:
    mapping, styles, time.
    """

    @functools.wraps(forward)
    def wrapped(self, x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return forward(self, x, *args)

    return wrapped


class Linear(nn.Module):
    """Equalized fully connected layer: weight stored as N(0,1)/m, used as w · m / √fan_in; bias
    used as b · m.
    """

    def __init__(self, in_dim, out_dim, bias=True, bias_init=0.0, lr_mult=1.0, lrelu=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mult)
        self.bias = nn.Parameter(torch.full([out_dim], bias_init / lr_mult)) if bias else None
        self.lrelu = lrelu
        gain = kernels.LRELU_GAIN if lrelu else 1.0
        self.weight_gain, self.bias_gain = gain * lr_mult / math.sqrt(in_dim), gain * lr_mult

    def forward(self, x):
        """x: [N, in_dim] → [N, out_dim]."""
        bias = None if self.bias is None else self.bias * self.bias_gain
        x = F.linear(x * self.weight_gain, self.weight, bias)  # x is mostly smaller than the weight
        return kernels.lrelu(x) if self.lrelu else x

    def double_forward(self, x):
        """The same without bias and activation, in float64 whatever the weight's dtype."""
        return F.linear(x, self.weight.double() * self.weight_gain)


class Conv2d(nn.Module):
    """Equalized convolution with the discriminator's down=2 (spec §1): FIR first, then stride 2."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        bias=True,
        lrelu=False,
        down=1,
        gain=1.0,
        clamp=None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.lrelu, self.down = lrelu, down
        # Spec §1: the bound has the layer's extra gain in it.
        self.clamp = None if clamp is None else clamp * gain
        self.bias_gain = gain * (kernels.LRELU_GAIN if lrelu else 1.0)
        self.weight_gain = self.bias_gain / math.sqrt(in_channels * kernel_size**2)

    def forward(self, x):
        """x: [N, I, H, W] → [N, O, H / down, W / down]."""
        kernel_size = self.weight.shape[-1]
        padding, stride = kernel_size // 2, 1
        if self.down == 2 and kernel_size == 1:
            x = kernels.downsample2d(x)
        elif self.down == 2:
            x, padding, stride = kernels.fir(x, 2), 0, 2
        bias = None if self.bias is None else self.bias * self.bias_gain
        x = F.conv2d(x, self.weight * self.weight_gain, bias, stride, padding)
        x = kernels.lrelu(x) if self.lrelu else x
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class Mapping(nn.Module):
    """Fully connected lrelu layers with m = 0.01 (spec §3, and the discriminator's of §7)."""

    def __init__(self, in_dim, out_dim, num_layers):
        super().__init__()
        self.num_layers = num_layers
        for i in range(num_layers):
            layer = Linear(in_dim if i == 0 else out_dim, out_dim, lr_mult=0.01, lrelu=True)
            setattr(self, f"fc{i}", layer)

    def forward(self, x):
        """x: [B, in_dim] → [B, out_dim]."""
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        return x
