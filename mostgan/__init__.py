"""MoStGAN-V: video generation with temporal motion styles. README.md beside this file is the guide.

    generator = mostgan.load("runs/00000-sky-paper256")
    for window in mostgan.render(generator, seed=0, frames=1024):  # uint8 [1, n, 3, H, W]
        ...

load, render, Generator, Discriminator, ModelConfig, TrainConfig, UserError and mostgan.checkpoint
are the public interface; all else may change.
"""

import os
import sys
from importlib import import_module

if sys.platform == "win32":
    print("error: MoStGAN-V runs on Linux and macOS; on Windows, run it in WSL", file=sys.stderr)
    sys.exit(2)

# OpenMP reads these when PyTorch is loaded: what imports that before this package goes without. Its
# threads wait busily at a barrier for a moment, and then sleep. Without the sleep they take the
# cores from the one that all wait for, wherever other processes are busy; without that moment a
# training step whose every operation two threads share takes a third longer. Only GNU's library
# knows it, which PyTorch's packages bring.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from mostgan.config import ModelConfig, TrainConfig, UserError  # noqa: E402

__all__ = [
    "Discriminator",
    "Generator",
    "ModelConfig",
    "TrainConfig",
    "UserError",
    "checkpoint",
    "load",
    "render",
]

# What needs PyTorch is imported when it is asked for: commands without networks start fast.
LATER = {
    "Discriminator": "mostgan.discriminator",
    "Generator": "mostgan.model",
    "load": "mostgan.checkpoint",
    "render": "mostgan.rendering",
}


def __getattr__(name):
    if name == "checkpoint":
        return import_module("mostgan.checkpoint")
    if name not in LATER:
        raise AttributeError(f"module 'mostgan' has no attribute {name!r}")
    return getattr(import_module(LATER[name]), name)
