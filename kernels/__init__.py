"""The ops of MoStGAN-V's hot path, as plain functions of tensors. `reference.py` explains each."""

from kernels.reference import (
    bias_act,
    conv2d_per_frame,
    conv2d_shared,
    demodulation,
    downsample2d,
    filter2d,
    fir,
    mostatt,
    motion_modulation,
    normalize,
    upsample2d,
)

__all__ = [
    "bias_act", "conv2d_per_frame", "conv2d_shared", "demodulation", "downsample2d", "filter2d", "fir", "mostatt",
    "motion_modulation", "normalize", "upsample2d",
]
