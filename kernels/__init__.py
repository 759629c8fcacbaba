"""The ops of MoStGAN-V's hot path, as plain functions of tensors. `reference.py` explains each.

CPU tensors, and float64 anywhere, take the plain PyTorch of `reference.py`, or on a CPU what is
quicker in `cpu.py`. On a GPU, `use` says what runs:

    auto       the fastest implementation that agrees with the plain one there, as `choose.py`
               measures it (the default)
    triton     the Triton kernels, unmeasured
    reference  the plain PyTorch
"""

import functools

import torch
import torch.nn.functional as F

from kernels import choose, cpu, reference
from kernels.cpu import conv2d_bias_lrelu as conv2d_bias_lrelu
from kernels.cpu import demodulated as demodulated
from kernels.cpu import folds as folds
from kernels.reference import LRELU_GAIN as LRELU_GAIN
from kernels.reference import conv2d_shared as conv2d_shared
from kernels.reference import demodulation as demodulation
from kernels.reference import lrelu as lrelu
from kernels.reference import motion_modulation as motion_modulation
from kernels.reference import normalize as normalize
from kernels.reference import working_dtype as working_dtype

# Ahead of the ops of the same names: `kernels.mostatt` is to be a function, not a module.
try:
    from kernels import fir as _fir
    from kernels import modconv as _modconv
    from kernels import mostatt as _mostatt
    from kernels import mostatt_backward as _mostatt_backward  # noqa: F401  registers the gradient

    _HAS_TRITON = True
except ModuleNotFoundError as error:
    if error.name.split(".")[0] != "triton":
        raise
    _HAS_TRITON, choose.mode = False, "reference"


def use(choice):
    """Which implementations CUDA tensors take: "auto" (without Triton "reference"), "triton" or
    "reference". Returns the choice before. Raises ValueError for another word, ImportError for
    triton where it is not installed.
    """
    if choice not in ("auto", "triton", "reference"):
        raise ValueError(f"kernels: {choice!r} is none of auto, triton and reference")
    if choice == "triton" and not _HAS_TRITON:
        raise ImportError("kernels: Triton is not installed")
    before, choose.mode = choose.mode, choice if _HAS_TRITON else "reference"
    return before


def chosen(device):
    """What the ops run as on a device: "auto", "triton" or "reference"."""
    return choose.mode if device.type in choose.devices else "reference"


def summary(device):
    """What the ops have run as so far, such as '11 of 13 Triton, 2 cuDNN (measured now)'."""
    return choose.choices().summary() if chosen(device) == "auto" else chosen(device)


def _by_op(x):
    """Whether an op of x runs as a registered op, whose implementation choose.py picks."""
    on_device = x.device.type in choose.devices and choose.mode != "reference"
    return on_device and x.dtype != torch.float64


@torch.compiler.assume_constant_result
def _in_transform():
    """Whether torch.func differentiates what runs now: no registered op can be part of that."""
    return torch._C._functorch.maybe_current_level() is not None


def _fir_by_op(x):
    """Whether a filter runs as a registered op. So it does in compiled functions, on a CPU too:
    Inductor would split it into passes that keep what is between them. An exported program has
    PyTorch's own operations only.
    """
    if torch.compiler.is_exporting() or not _HAS_TRITON or _in_transform():
        return False
    return _by_op(x) or (x.is_cpu and torch.compiler.is_compiling())


def _op(registered):
    """A decorator: the function where registered(x), else cpu.py's or reference.py's of the same
    name.
    """

    def decorate(function):
        name = function.__name__
        plain = getattr(reference, name)
        trained, folded = getattr(cpu, name, plain), getattr(cpu, f"folded_{name}", plain)

        @functools.wraps(plain)
        def op(x, *args, **options):
            if registered(x):
                chosen = function
            elif cpu.trains(x):
                chosen = trained
            else:
                chosen = folded if cpu.folds(x) else plain
            return chosen(x, *args, **options)

        return op

    return decorate


@_op(_by_op)
def mostatt(content_weight, motion_style, style_gain=None):
    if style_gain is not None:  # for looking at styles, without a kernel
        return reference.mostatt(content_weight, motion_style, style_gain)
    return mostatt_demod(content_weight, motion_style)[:2]


@_op(_by_op)
def mostatt_demod(
    weight,
    motion_style,
    content_style=None,
    dtype=None,
    want_weight=True,
    style_gain=None,
    content_first=False,
):
    args = weight, motion_style, content_style, dtype
    if style_gain is not None:
        return reference.mostatt_demod(*args, want_weight, style_gain, content_first)
    dtype = dtype or working_dtype(weight)
    return _mostatt.mostatt(*args[:3], dtype, want_weight, content_first)


@_op(_by_op)
def conv2d_per_frame(x, weight, up=1):
    dtype = working_dtype(x)
    return _modconv.conv2d(x.to(dtype), weight.to(dtype), up)


@_op(_by_op)
def conv2d_epilogue(x, weight, demod, bias, up=1, clamp=None):
    if up == 2:  # with a FIR filter between them they are two passes
        return epilogue(conv2d_per_frame(x, weight, up), demod, bias, up, clamp)
    dtype = working_dtype(x)
    return _modconv.conv2d(x.to(dtype), weight.to(dtype), 1, demod, bias, clamp)


@_op(_by_op)
def epilogue(x, demod, bias, up=1, clamp=None):
    return _fir.epilogue_op(x, demod, bias, up, clamp)


@_op(_fir_by_op)
def fir(x, padding, gain=1.0):
    return _fir.fir_op(x, gain, 1, padding, False)


@_op(_fir_by_op)
def filter2d(x):
    return _fir.fir_op(F.pad(x, (2, 1, 2, 1)), 1.0, 1, 0, False)


@_op(_fir_by_op)
def downsample2d(x):
    return _fir.fir_op(x, 1.0, 2, 1, False)


@_op(_fir_by_op)
def upsample2d(x):
    return _fir.fir_op(x, 4.0, 2, 1, True)
