"""Configurations: the model, a training run, dataset presets and size presets (spec §6–8)."""

from dataclasses import dataclass


class UserError(Exception):
    """Something the user can mend. Scripts print its text as one line and exit with status 2."""


@dataclass(frozen=True)
class ModelConfig:
    """Generator and discriminator. The defaults are the paper's 256² model. Times are in frames.

    Raises UserError on values no model can have.
    """

    resolution: int = 256
    """height and width of a frame, a power of two from 32 to 1024"""
    channel_base: int = 16384
    """channels at resolution r are min(channel_base / r, channel_max)"""
    channel_max: int = 512
    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 2
    motion_noise_dim: int = 512
    motion_code_dim: int = 512
    num_frequencies: int = 256
    """waves of a motion code; sines and cosines make motion_code_dim = 2 · num_frequencies"""
    max_period: int = 1024
    """longest period of a motion code's waves"""
    motion_distance: int = 256
    """distance between two anchor motion codes (D of spec §2)"""
    motion_styles: int = 8
    """K, the number of motion styles; 0 is StyleGAN-V, 1 is 'without MoStAtt'"""
    motion_vector_dim: int = 128
    rank: int = 1
    """R, rank of a motion style's modulation"""
    motion_resolutions: tuple[int, ...] = (16, 32, 64, 128)
    """resolutions whose convolutions MoStAtt modulates"""
    modulation_order: str = "content_first"
    """content_first (strategy i of paper 4.3) or motion_first (strategy ii)"""
    prenorm_resolutions: tuple[int, ...] = ()
    """pre-normalized resolutions; released checkpoints need their four highest (spec §6)"""
    motion_demod_only_resolutions: tuple[int, ...] = ()
    """resolutions where MoStAtt gives only the demodulation factor (spec §6)"""
    frames_per_clip: int = 3
    """T, the frames of a clip that the discriminator sees"""
    max_num_frames: int = 1024
    """longest time difference that the discriminator tells apart, plus one"""
    num_labels: int = 0
    """number of classes; 0 is unconditional"""
    concat_resolution: int = 16
    """the discriminator's block that sees all images of a clip at once"""
    motion_difference: bool = True
    """the discriminator also sees frame differences (paper 3.5)"""
    discriminator_hidden_dim: int = 128
    mbstd_group: int = 4
    """clips that share a minibatch standard deviation"""

    def __post_init__(self):
        for name in ("motion_resolutions", "prenorm_resolutions", "motion_demod_only_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        r = self.resolution
        if not 32 <= r <= 1024 or r & (r - 1):
            raise UserError(f"resolution is {r}, but must be a power of two from 32 to 1024")
        for name in ("motion_resolutions", "prenorm_resolutions", "motion_demod_only_resolutions"):
            for m in getattr(self, name):
                if m < 4 or m > 1024 or m & (m - 1):
                    raise UserError(f"{name} holds {m}, but must hold powers of two from 4 to 1024")
        for name in ("channel_base", "channel_max", "z_dim", "w_dim", "motion_noise_dim", "num_frequencies",
                     "max_period", "motion_distance", "motion_vector_dim", "rank", "frames_per_clip",
                     "max_num_frames", "discriminator_hidden_dim", "mbstd_group", "mapping_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.motion_styles < 0 or self.num_labels < 0:
            raise UserError("motion_styles and num_labels must be 0 or more")
        if self.channel_base < r or self.channels(self.concat_resolution) < 2:
            raise UserError(f"channel_base is {self.channel_base}, too few channels for resolution {r}")
        if self.motion_code_dim != 2 * self.num_frequencies:
            raise UserError(f"motion_code_dim is {self.motion_code_dim}, but must be 2 · num_frequencies = "
                            f"{2 * self.num_frequencies} (a sine and a cosine each)")
        if self.modulation_order not in ("content_first", "motion_first"):
            raise UserError(f"modulation_order is {self.modulation_order!r}: content_first or motion_first")
        if not 8 <= self.concat_resolution < r:
            raise UserError(f"concat_resolution is {self.concat_resolution}, but must be from 8 to {r // 2}")

    def channels(self, resolution: int) -> int:
        """Feature channels at a resolution (spec §6)."""
        return min(self.channel_base // resolution, self.channel_max)

    @property
    def resolutions(self) -> list[int]:
        """The synthesis blocks' resolutions: 4, 8, …, resolution."""
        return [4 << i for i in range((self.resolution // 4).bit_length())]

    @property
    def num_ws(self) -> int:
        """Synthesis convolutions + 1; what the diversity loss is divided by (spec §5). 14 at 256²."""
        return 2 * len(self.resolutions)


@dataclass(frozen=True)
class DatasetPreset:
    """What spec §8 fixes for a dataset, and what a user who lacks it should get."""

    motion_distance: int
    augment: str
    fps: float
    source: str


DATASETS = {
    "sky": DatasetPreset(256, "bgc", 25, "SkyTimelapse (the mdgan release)"),
    "ffs": DatasetPreset(16, "bgc_noro", 25, "FaceForensics (original sequences)"),
    "jelly": DatasetPreset(64, "easy", 30, "RainbowJelly (the 8-hour jellyfish film, cut into clips of 512 frames)"),
    "celebv": DatasetPreset(32, "bgc_noro", 25, "CelebV-HQ"),
    "ucf101": DatasetPreset(16, "easy", 25, "UCF-101"),
    "horse": DatasetPreset(16, "bgc_noro", 30, "Horseback"),
}
