"""MoStGAN-V: video generation with temporal motion styles.

    generator = mostgan.load("runs/00000-sky-paper256")
    for window in generator.render(seed=0, frames=1024):  # uint8 [1, n, 3, H, W]
        ...
"""

from mostgan import checkpoint
from mostgan.config import ModelConfig, TrainConfig, UserError
from mostgan.discriminator import Discriminator
from mostgan.model import Generator

__all__ = ["Discriminator", "Generator", "ModelConfig", "TrainConfig", "UserError", "checkpoint", "load"]


def load(path=None, device="cpu"):
    """The generator of a checkpoint, ready to sample. path: a checkpoint or run folder; None: the newest of runs/.

    Raises UserError on a missing, damaged or wrong checkpoint.
    """
    return checkpoint.load(path, device)
