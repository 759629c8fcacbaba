"""MoStGAN-V: video generation with temporal motion styles.

generator = mostgan.load("runs/00000-sky-paper256")
for window in generator.render(seed=0, frames=1024):  # uint8 [1, n, 3, H, W]
    ...
"""

from importlib import import_module

from mostgan.config import ModelConfig, TrainConfig, UserError

__all__ = [
    "Discriminator",
    "Generator",
    "ModelConfig",
    "TrainConfig",
    "UserError",
    "checkpoint",
    "load",
]


def load(path=None, device="cpu"):
    """The generator of a checkpoint, ready to sample. path: a checkpoint or run folder; None: the
    newest of runs/.

    Raises UserError on a missing, damaged or wrong checkpoint.
    """
    return import_module("mostgan.checkpoint").load(path, device)


def __getattr__(name):
    """What needs PyTorch is imported when it is asked for: commands without networks start fast."""
    if name == "checkpoint":
        return import_module("mostgan.checkpoint")
    modules = {"Discriminator": "mostgan.discriminator", "Generator": "mostgan.model"}
    if name not in modules:
        raise AttributeError(f"module 'mostgan' has no attribute {name!r}")
    return getattr(import_module(modules[name]), name)
