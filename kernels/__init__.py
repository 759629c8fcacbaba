"""The ops of MoStGAN-V's hot path, as plain functions of tensors. `reference.py` explains each.

CPU tensors, and float64 anywhere, take the plain PyTorch of `reference.py`; so do CUDA tensors, unless `use("triton")`
gives them the Triton kernels. Ops that are not defined below have no kernel.
"""

import torch
import torch.nn.functional as F

from kernels import reference
from kernels.reference import LRELU_GAIN, conv2d_shared, demodulation, lrelu, motion_modulation, normalize

try:  # ahead of the ops of the same names: `kernels.mostatt` and `kernels.fir` are to be functions, not modules
    from kernels import fir as _fir
    from kernels import modconv as _modconv
    from kernels import mostatt as _mostatt
    from kernels import mostatt_backward as _mostatt_backward  # noqa: F401  registers the gradient

except ModuleNotFoundError as error:
    if error.name.split(".")[0] != "triton":
        raise

_choice = "reference"  # until the kernels have run on a GPU: so far in Triton's interpreter, and compiled, only

__all__ = [
    "LRELU_GAIN", "chosen", "conv2d_per_frame", "conv2d_shared", "demod_bias_lrelu", "demodulation", "downsample2d",
    "epilogue", "filter2d", "fir", "lrelu", "mostatt", "mostatt_demod", "motion_modulation", "normalize", "upsample2d",
    "use",
]


def use(choice):
    """Which kernels CUDA tensors take: "triton" or "reference". Returns the choice before.

    Raises ValueError for another word, ImportError for triton where it is not installed.
    """
    global _choice
    if choice not in ("triton", "reference"):
        raise ValueError(f"kernels: {choice!r} is neither triton nor reference")
    if choice == "triton" and "_mostatt" not in globals():
        raise ImportError("kernels: Triton is not installed")
    before, _choice = _choice, choice
    return before


def chosen(device):
    """What the ops run as on a device: "triton" or "reference"."""
    return _choice if device.type == "cuda" else "reference"


def _by_triton(x):
    return x.is_cuda and _choice == "triton" and x.dtype != torch.float64


def _fir_by_triton(x):
    """A filter by itself: in a compiled function Inductor's own kernel does it, together with its neighbors."""
    return _by_triton(x) and not torch.compiler.is_compiling()


def _working_dtype(x):
    """The dtype in which convolutions of x run: autocast's where it is on, as PyTorch's own would."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def mostatt(content_weight, motion_style, style_gain=None):
    if _by_triton(content_weight) and style_gain is None:  # gains are for looking at styles, and have no kernel
        return mostatt_demod(content_weight, motion_style)[:2]
    return reference.mostatt(content_weight, motion_style, style_gain)


def mostatt_demod(content_weight, motion_style, clip_style=None, dtype=None, want_weight=True, style_gain=None):
    if _by_triton(content_weight) and style_gain is None:
        dtype = dtype or _working_dtype(content_weight)
        return _mostatt.mostatt(content_weight, motion_style, clip_style, dtype, want_weight)
    return reference.mostatt_demod(content_weight, motion_style, clip_style, dtype, want_weight, style_gain)


def conv2d_per_frame(x, weight, up=1):
    if _by_triton(x):
        dtype = _working_dtype(x)
        return _modconv.conv2d_per_frame(x.to(dtype), weight.to(dtype), up)
    return reference.conv2d_per_frame(x, weight, up)


def demod_bias_lrelu(x, demod, bias):
    if _by_triton(x):
        return _fir.epilogue(x, demod, bias)
    return reference.demod_bias_lrelu(x, demod, bias)


def epilogue(x, demod, bias, up=1, clamp=None):
    if _by_triton(x):
        return _fir.epilogue(x, demod, bias, up, clamp)
    return reference.epilogue(x, demod, bias, up, clamp)


def fir(x, padding, gain=1.0):
    if _fir_by_triton(x):
        return _fir.fir_op(x, gain, 1, padding, False)
    return reference.fir(x, padding, gain)


def filter2d(x):
    if _fir_by_triton(x):
        return _fir.fir_op(F.pad(x, (2, 1, 2, 1)), 1.0, 1, 0, False)
    return reference.filter2d(x)


def downsample2d(x):
    if _fir_by_triton(x):
        return _fir.fir_op(x, 1.0, 2, 1, False)
    return reference.downsample2d(x)


def upsample2d(x):
    if _fir_by_triton(x):
        return _fir.fir_op(x, 4.0, 2, 1, True)
    return reference.upsample2d(x)


for _op in (mostatt, mostatt_demod, conv2d_per_frame, demod_bias_lrelu, epilogue, fir, filter2d, downsample2d,
            upsample2d):  # fmt: skip
    _op.__doc__ = getattr(reference, _op.__name__).__doc__
