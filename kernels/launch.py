"""What the launchers of all kernels share."""

import torch
import triton
import triton.language as tl


def channels_last(x):
    """[.., C, H, W] → contiguous [.., H, W, C]: nothing to do in channels-last memory."""
    return x.movedim(-3, -1).contiguous()


def channels_first(x):
    """The view [.., C, H, W] of [.., H, W, C]."""
    return x.movedim(-1, -3)


def edge(size, most, least=1):
    """A tile's edge: the power of two that holds `size`, from `least` to `most`."""
    return max(least, min(most, triton.next_power_of_2(size)))


def constants(**values):
    """Values that are compiled in."""
    return {name: tl.constexpr(value) for name, value in values.items()}


def clamps(clamp):
    return constants(CLAMPS=clamp is not None, CLAMP=float(clamp or 0))


def float32_twin(function):
    """A plain function as the twin of an op: in float32, the result in x's dtype, channels last."""

    def twin(x, *others):
        args = (x, *others)
        if x.dtype != torch.float64:
            args = (a.float() if torch.is_tensor(a) else a for a in args)
        return channels_first(channels_last(function(*args).to(x.dtype)))

    return twin
