"""The ops of MoStGAN-V's hot path, as plain functions of tensors. `reference.py` explains each."""

from kernels.reference import (
    LRELU_GAIN,
    conv2d_per_frame,
    conv2d_shared,
    demod_bias_lrelu,
    demodulation,
    downsample2d,
    filter2d,
    fir,
    lrelu,
    mostatt,
    motion_modulation,
    normalize,
    upsample2d,
)

__all__ = [
    "LRELU_GAIN", "conv2d_per_frame", "conv2d_shared", "demod_bias_lrelu", "demodulation", "downsample2d",
    "filter2d", "fir", "lrelu", "mostatt", "motion_modulation", "normalize", "upsample2d",
]
