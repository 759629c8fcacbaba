"""Checkpoints: safetensors and JSON, complete or absent. Released state names → ours (spec §10)."""

import re

import torch

_COMPUTED = re.compile(r"(resample_filter|\.freqs|\.phase_scales|\.fourier_coefs)$")  # follow from the config
_RENAMED = [  # released name → ours
    (r"^mapping\.(fc\d+)", r"mapping.layers.\1"),
    (r"^synthesis\.motion_encoder\.conv\.(\d)\.weight", r"motion_codes.conv\1"),
    (r"^synthesis\.motion_encoder\.conv\.(\d)\.bias", r"motion_codes.conv\1_bias"),
    (r"^synthesis\.motion_encoder\.time_encoder\.periods_predictor", "motion_codes.period"),
    (r"^synthesis\.motion_encoder\.time_encoder\.phase_predictor", "motion_codes.phase"),
    (r"^synthesis\.motion_encoder\.time_encoder\.aligners_predictor", "motion_codes.aligner"),
    (r"^synthesis\.multimotionmap\.(\d)", r"motion_network.fc\1"),
    (r"^(synthesis\.b\d+\.conv\d)\.hypernet\.conv0", r"\1.hypernetwork"),
    (r"^synthesis\.b4\.input\.input\.const", "synthesis.b4.const"),
]
_RENAMED_DISCRIMINATOR = [
    (r"^mapping\.embed", "time_condition.embed"),
    (r"^mapping\.(fc\d+)", r"time_condition.layers.\1"),
    (r"^time_encoder\.const_embed", "time_condition.table"),
]


def from_released_names(state: dict[str, torch.Tensor], discriminator=False) -> dict[str, torch.Tensor]:
    """A released generator's (or discriminator's) state dict under our names; load it with strict=True."""
    renamed = {}
    for name, tensor in state.items():
        if _COMPUTED.search(name):
            continue
        for pattern, ours in _RENAMED_DISCRIMINATOR if discriminator else _RENAMED:
            name = re.sub(pattern, ours, name)
        if name.endswith("hypernetwork.weight"):
            tensor = tensor[:, :, 0, 0]  # stored as a convolution of kernel size 1
        if name == "synthesis.b4.const":
            tensor = tensor[0]
        renamed[name] = tensor
    return renamed
