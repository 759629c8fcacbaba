"""MoStGAN-V: video generation with temporal motion styles.

    generator = mostgan.load("runs/00000-sky-paper256")
    for window in generator.render(seed=0, frames=1024):  # uint8 [1, n, 3, H, W]
        ...
"""

from mostgan.checkpoint import load
from mostgan.config import ModelConfig, TrainConfig, UserError
from mostgan.discriminator import Discriminator
from mostgan.model import Generator

__all__ = ["Discriminator", "Generator", "ModelConfig", "TrainConfig", "UserError", "load"]
