"""Configurations: the model, a training run, dataset presets and size presets (spec §6–8)."""

import math
from dataclasses import dataclass


class UserError(Exception):
    """Something the user can mend. Scripts print its text as one line and exit with status 2."""


def check_one_of(config, name, *choices):
    """UserError where a field of a configuration has none of the values that it can have."""
    value = getattr(config, name)
    if value not in choices:
        raise UserError(f"{name} is {value!r}: {', '.join(choices[:-1])} or {choices[-1]}")


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
    shortest_period: int | None = None
    """shortest period of the waves; default motion_distance"""
    motion_distance: int = 256
    """distance between two anchor motion codes (D of spec §2)"""
    motion_styles: int = 8
    """K, the number of motion styles; 0 is StyleGAN-V, 1 is 'without MoStAtt'"""
    motion_vector_dim: int = 128
    rank: int = 1
    """R, rank of a motion style's modulation"""
    hypernetwork: str = "lrelu"
    """what makes a layer's motion style of a motion vector: lrelu (spec §4), or affine, as files of
    late 2022 have it: with a bias that starts at 1 and without activation
    """
    motion_resolutions: tuple[int, ...] = (16, 32, 64, 128)
    """resolutions whose convolutions MoStAtt modulates"""
    modulation_order: str = "content_first"
    """content_first (strategy i of paper 4.3) or motion_first (strategy ii)"""
    prenorm_resolutions: tuple[int, ...] = ()
    """pre-normalized resolutions; released checkpoints need their four highest (spec §6)"""
    motion_demod_only_resolutions: tuple[int, ...] = ()
    """resolutions where MoStAtt gives only the demodulation factor (spec §6)"""
    activation_clamp: float | None = None
    """bound of the activations of generator and discriminator (spec §1), times a layer's own gain;
    in releases 256
    """
    frames_per_clip: int = 3
    """T, the frames of a clip that the discriminator sees"""
    max_num_frames: int = 1024
    """longest time difference that the discriminator tells apart, plus one"""
    num_labels: int = 0
    """size of a clip's condition: C numbers, or C classes as one-hot vectors; 0 is none"""
    frame_condition_dim: int = 0
    """size of a frame's condition (spec §13): E numbers at every moment of a clip; 0 is none"""
    concat_resolution: int = 16
    """the discriminator's block that sees all images of a clip at once"""
    motion_difference: bool = True
    """the discriminator also sees frame differences (paper 3.5)"""
    discriminator_hidden_dim: int = 128
    mbstd_group: int = 4
    """clips that share a minibatch standard deviation"""
    time_condition: bool = True
    """the discriminator is told times and label; False, an ablation of the release, hides them"""
    fps: float | None = None
    """frames per second that samples play at; default: those of the data that it is trained on"""

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
        for name in (
            "channel_base",
            "channel_max",
            "z_dim",
            "w_dim",
            "motion_noise_dim",
            "num_frequencies",
            "max_period",
            "motion_distance",
            "motion_vector_dim",
            "rank",
            "frames_per_clip",
            "max_num_frames",
            "discriminator_hidden_dim",
            "mbstd_group",
            "mapping_layers",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("shortest_period", "activation_clamp", "fps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}, but must be more than 0, or none")
        check_one_of(self, "hypernetwork", "lrelu", "affine")
        if min(self.motion_styles, self.num_labels, self.frame_condition_dim) < 0:
            raise UserError("motion_styles, num_labels and frame_condition_dim must be 0 or more")
        if self.frame_condition_dim and not self.motion_styles:
            raise UserError(
                "motion_styles is 0, but frame conditions act through motion styles: at least 1"
            )
        if self.channel_base < r or self.channels(self.concat_resolution) < 2:
            raise UserError(
                f"channel_base is {self.channel_base}, too few channels for resolution {r}"
            )
        if self.motion_code_dim != 2 * self.num_frequencies:
            raise UserError(
                f"motion_code_dim is {self.motion_code_dim}, but must be 2 · num_frequencies = "
                f"{2 * self.num_frequencies} (a sine and a cosine each)"
            )
        check_one_of(self, "modulation_order", "content_first", "motion_first")
        if not 8 <= self.concat_resolution < r:
            raise UserError(
                f"concat_resolution is {self.concat_resolution}, but must be from 8 to {r // 2}"
            )

    def channels(self, resolution: int) -> int:
        """Feature channels at a resolution (spec §6)."""
        return min(self.channel_base // resolution, self.channel_max)

    @property
    def resolutions(self) -> list[int]:
        """The synthesis blocks' resolutions: 4, 8, …, resolution."""
        return [4 << i for i in range((self.resolution // 4).bit_length())]

    @property
    def num_ws(self) -> int:
        """Synthesis convolutions + 1: 14 at 256². Divides the diversity loss (spec §5)."""
        return 2 * len(self.resolutions)


@dataclass(frozen=True)
class DatasetPreset:
    """What spec §8 fixes for a dataset. How to get one is in mostgan/prepare/README.md."""

    motion_distance: int
    augment: str


DATASETS = {
    "sky": DatasetPreset(256, "bgc"),  # SkyTimelapse
    "ffs": DatasetPreset(16, "bgc_noro"),  # FaceForensics
    "jelly": DatasetPreset(64, "easy"),  # RainbowJelly
    "celebv": DatasetPreset(32, "bgc_noro"),  # CelebV-HQ
    "ucf101": DatasetPreset(16, "easy"),  # UCF-101
    "horse": DatasetPreset(16, "bgc_noro"),  # Horseback
}


def check_dataset(name):
    """UserError where there is no dataset preset of this name."""
    if name not in DATASETS:
        raise UserError(
            f"dataset {name!r} is not known: choose from {', '.join(DATASETS)}; "
            "your own clips go with any of them by --data"
        )


@dataclass(frozen=True)
class TrainConfig:
    """A training run: everything that decides what is learned. Clips and frames are those of §8."""

    model: ModelConfig = ModelConfig()
    preset: str = "paper256"
    """size preset: paper256 or tiny"""
    dataset: str = "sky"
    """dataset preset: sky, ffs, jelly, celebv, ucf101 or horse; sets motion_distance and augment"""
    data: str | None = None
    """videos or frames: a folder, a zip, or a packed folder; default data/<dataset>"""
    cache: str | None = None
    """where to pack the data; default beside it"""
    start_from: str | None = None
    """fine-tune: a checkpoint, or a run, whose model and weights a new run starts with"""
    conditional: bool = False
    """train on the data's labels, or its conditions"""
    shared_fakes: bool = False
    """the D step judges the G step's clips, not fresh ones: a sixth less work"""
    mirror: bool = True
    """show clips mirrored left-right half of the time"""
    sampling: str = "spans"
    """frames of a clip that D sees: spans (all within 32 frames, spec §8) or uniform (any)"""
    seed: int = 0
    total_kframes: float = 25_000
    """length of the training, in thousands of real frames"""
    batch_clips: int = 64
    batch_split: int = 4
    """pieces a batch is computed in, to fit memory; several processes share them, and on a CPU,
    eagerly, as many run at once as cores
    """
    generator_lr: float = 0.0025
    discriminator_lr: float = 0.0025
    r1_gamma: float = 10.0
    r1_interval: int = 16
    """steps between two R1 penalties, each taken r1_interval times as strong"""
    diversity_weight: float = 0.1
    """λ of the motion diversity loss (paper 3.4)"""
    ema_half_life_kclips: float = 20.0
    """half-life of the averaged generator's weights, in thousands of clips"""
    ema_rampup: float = 0.0
    """if not 0, the half-life is at most this fraction of the clips so far"""
    augment: str = "bgc"
    """ADA pipeline: bgc, bgc_noro, easy or none"""
    ada_target: float = 0.6
    ada_interval: int = 4
    """steps between two adjustments of ADA's p"""
    ada_kclips: float = 100.0
    """clips, in thousands, over which p can go from 0 to 1"""
    log_kframes: float = 2.0
    """frames, in thousands, between two lines of stats.jsonl"""
    snapshot_kframes: float = 200.0
    """frames, in thousands, between two sample grids and checkpoints"""
    save_minutes: float = 10.0
    """save a checkpoint after so many minutes without one, too"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep, besides the best one if a metric was computed"""
    skip_limit: int = 20
    """stop when more than so many steps in a row had a loss or gradient that was not finite"""
    deterministic: bool = False
    """on a GPU: only algorithms that give the same bits every time; slower"""
    eval_every: float = 0.0
    """frames, in thousands, between two evaluations, the best of which is kept; 0 is never"""
    eval_clips: int = 256
    """clips that an evaluation compares; FVD is of 2,048"""
    eval_frames: int = 16
    """longest clips that it compares: 16, or 128 for FVD128 too"""
    eval_detector: str | None = None
    """TorchScript file for FVD; default a random network, whose scores are called proxy"""
    precision: str = "bf16"
    """bf16 (autocast with float32 master weights; on a CPU only quick where it has bf16
    instructions) or float32 (a GPU's convolutions in tf32)
    """
    compile: bool = True
    """torch.compile the G step, the D step and R1; the first step then takes minutes"""
    kernels: str = "auto"
    """what runs the ops on a GPU: auto (the fastest that is right), triton, reference (PyTorch)"""
    tensorboard: bool = False
    """write statistics and grids for TensorBoard, too: into tensorboard/ of the run"""
    workers: int = 4
    """processes that decode clips; 0 decodes in a thread"""

    def __post_init__(self):
        check_dataset(self.dataset)
        if self.model.frames_per_clip < 2:
            raise UserError(
                "frames_per_clip is 1, but the discriminator needs at least 2 frames of a clip"
            )
        for name in (
            "total_kframes",
            "batch_clips",
            "batch_split",
            "generator_lr",
            "discriminator_lr",
            "r1_interval",
            "ema_half_life_kclips",
            "ada_interval",
            "ada_kclips",
            "log_kframes",
            "snapshot_kframes",
            "save_minutes",
            "keep_checkpoints",
            "skip_limit",
        ):
            never = name in ("ada_kclips", "log_kframes", "snapshot_kframes", "save_minutes")
            value, told = getattr(self, name), "more than 0" if never else "finite and more than 0"
            if not 0 < value or (value == math.inf and not never):
                raise UserError(f"{name} is {value}, but must be {told}")
        for name, least in (
            ("seed", 0),
            ("total_kframes", 0.001),
            ("r1_gamma", 0),
            ("diversity_weight", 0),
            ("ema_rampup", 0),
            ("ada_target", -1),
            ("eval_every", 0),
            ("eval_clips", 2),
            ("eval_frames", 2),
            ("workers", 0),
        ):
            if not least <= getattr(self, name) < 2**63:
                told = f"must be at least {least}, and less than 2⁶³"
                raise UserError(f"{name} is {getattr(self, name)}, but {told}")
        if self.batch_clips % self.batch_split:
            raise UserError(
                f"batch_clips is {self.batch_clips}, not a multiple of batch_split "
                f"{self.batch_split}"
            )
        piece, group = self.batch_clips // self.batch_split, self.model.mbstd_group
        if piece % min(group, piece):
            raise UserError(
                f"a piece of the batch has {piece} clips (batch_clips / batch_split), but must "
                f"have a multiple of mbstd_group {group}: choose another batch_clips or batch_split"
            )
        check_one_of(self, "augment", "bgc", "bgc_noro", "easy", "none")
        check_one_of(self, "precision", "bf16", "float32")
        check_one_of(self, "sampling", "spans", "uniform")
        check_one_of(self, "kernels", "auto", "triton", "reference")

    @property
    def frames_per_step(self) -> int:
        return self.batch_clips * self.model.frames_per_clip


def train_preset(preset: str, dataset: str) -> TrainConfig:
    """The configuration of a size preset on a dataset preset. UserError on an unknown name."""
    check_dataset(dataset)
    chosen = DATASETS[dataset]
    if preset == "paper256":
        model = ModelConfig(motion_distance=chosen.motion_distance)
        return TrainConfig(model, preset, dataset, augment=chosen.augment)
    if preset == "tiny":
        model = ModelConfig(
            resolution=64,
            channel_base=1024,
            channel_max=64,
            z_dim=128,
            w_dim=128,
            motion_noise_dim=128,
            motion_code_dim=128,
            num_frequencies=64,
            motion_vector_dim=128,
            motion_resolutions=(16, 32),
            motion_distance=chosen.motion_distance,
        )
        # What serves a few minutes and an hour alike (seen on the built-in sky): networks that
        # learn equally fast, R1 more often than the paper's, so that its share of Adam's steps is
        # even, and no ADA, which would cost a quarter of the time before D has seen a clip ten
        # times.
        return TrainConfig(
            model,
            preset,
            dataset,
            augment="none",
            batch_clips=8,
            batch_split=2,  # a piece for each of two cores
            shared_fakes=True,
            generator_lr=0.003,
            discriminator_lr=0.003,
            r1_gamma=4.0,
            r1_interval=8,
            ema_half_life_kclips=2.0,
            ema_rampup=0.1,
            total_kframes=30,
            log_kframes=0.48,
            snapshot_kframes=6,
            # Not every CPU is quick in bf16.
            precision="float32",
            compile=False,
            workers=0,
        )
    raise UserError(f"preset {preset!r} is not known: paper256 or tiny")
