"""The Fréchet distance between two sets of clips or frames, its statistics, networks that describe
clips (spec §9).

Whatever is collected about a set is a sum over its clips, or the mean and scatter of their
features, in float64, under a name: a dict of tensors. So memory does not grow with the set, what
several processes collected can be merged into what one would have, and it can be stored and read
again.
"""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mostgan.config import UserError
from mostgan.files import sha256_of
from mostgan.motion import content_latent

Sums = dict[str, torch.Tensor]  # name → float64 sum, mean or scatter


def add(sums: Sums, name: str, value):
    """sums[name] += value, in float64."""
    value = torch.as_tensor(value, dtype=torch.float64)
    sums[name] = sums[name] + value if name in sums else value


def add_features(sums: Sums, name: str, features):
    """Take in the features [B, F] of B more samples: their number, mean, and scatter Σ (x − mean)(x
    − mean)ᵀ.
    """
    features = features.double()
    mean = features.mean(0)
    centered = features - mean
    count = torch.tensor(len(features), dtype=torch.float64)
    parts = {"count": count, "mean": mean, "scatter": centered.T @ centered}
    merge(sums, {f"{name}.{part}": value for part, value in parts.items()})


def merge(sums: Sums, more: Sums):
    """Take in what was collected about other samples. Sums add up; means and scatters become those
    of all samples.

    That is Chan, Golub and LeVeque's formula. Sums of x and x xᵀ would be simpler, but where a mean
    is much larger than the spread their difference, the covariance, has few correct digits.
    """
    for name in [name.removesuffix(".mean") for name in more if name.endswith(".mean")]:
        count, mean, scatter = (f"{name}.{part}" for part in ("count", "mean", "scatter"))
        if count not in sums:
            sums[mean], sums[scatter] = more[mean], more[scatter]
            continue
        step, share = more[mean] - sums[mean], more[count] / (sums[count] + more[count])
        between = sums[count] * share * torch.outer(step, step)
        sums[mean] = sums[mean] + share * step
        sums[scatter] = sums[scatter] + more[scatter] + between
    for name, value in more.items():
        if not name.endswith((".mean", ".scatter")):
            add(sums, name, value)


def mean_and_covariance(sums: Sums, name: str):
    """Of the features added under name: μ [F], population covariance Σ [F, F] (divided by the
    count), float64.
    """
    return sums[f"{name}.mean"], sums[f"{name}.scatter"] / sums[f"{name}.count"]


def square_root(covariance):
    """The symmetric square root of a covariance [F, F], float64.

    Eigenvalues below F · ε · the largest are rounding errors of zero and count as zero: their roots
    would not be small.
    """
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    cutoff = len(values) * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    values = torch.where(values > cutoff, values, 0)
    return (vectors * values.sqrt()) @ vectors.T


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2) -> float:
    """‖μ₁−μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two Gaussians: means [F], covariances [F, F], float64;
    of any rank.

    The eigenvalues of Σ₁Σ₂ are the squared singular values of Σ₁^½ Σ₂^½, which are found to
    rounding precision even where Σ₁Σ₂ is singular; a general matrix square root is not.
    """
    root_trace = torch.linalg.svdvals(square_root(covariance_1) @ square_root(covariance_2)).sum()
    distance = (mean_1 - mean_2).square().sum() + (covariance_1 + covariance_2).trace()
    distance = distance - 2 * root_trace
    return max(float(distance), 0.0)  # of equal sets, rounding may leave less than nothing


def distance(real: Sums, generated: Sums, name: str) -> float:
    """The Fréchet distance between what two sets hold under name."""
    return frechet_distance(*mean_and_covariance(real, name), *mean_and_covariance(generated, name))


# ---------------------------------------------------------------------------------------- detectors


class Detector(NamedTuple):
    """A network that describes clips, uint8 [B, 3, n, H, W] → features [B, F], or frames, [B, 3, H,
    W] → [B, F].
    """

    name: str  # of its file; or PROXY_NAME
    sha256: str  # of the file; or of the proxy's weights
    proxy: bool
    features: Callable


def video_detector(path, device) -> Detector:
    """A TorchScript file that is called as I3D is (spec §9). None: the proxy. Raises UserError if
    it is none.
    """
    if path is None:
        return proxy(device)
    return _from_file(path, device, [1, 3, 16, 64, 64], rescale=True, resize=True)


def frame_detector(path, device) -> Detector:
    """A TorchScript file that takes frames uint8 [B, 3, H, W], as Inception's for FID does. None:
    the proxy, on clips of one frame. Raises UserError if it is none.
    """
    if path is not None:
        return _from_file(path, device, [1, 3, 64, 64])
    of_clips = proxy(device)
    return of_clips._replace(features=lambda frames: of_clips.features(frames.unsqueeze(2)))


def _from_file(path, device, trial, **arguments):
    """The detector in a TorchScript file, after a first call with samples of shape `trial`: now,
    not hours later.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} is not there: the detector is a TorchScript file, such as i3d_torchscript.pt"
        )
    sha256 = sha256_of(path)
    try:
        with warnings.catch_warnings():
            # Published detectors are TorchScript, deprecated or not.
            warnings.simplefilter("ignore")
            module = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is no TorchScript file: {_first_line(error)}") from None

    @torch.inference_mode()
    def features(x):
        try:
            found = module(x, return_features=True, **arguments)
        except RuntimeError as error:
            shape = "[B, 3, n, H, W]" if x.ndim == 5 else "[B, 3, H, W]"
            options = ", ".join(f"{name}=True" for name in [*arguments, "return_features"])
            call = f"detector(uint8 {shape}, {options})"
            raise UserError(f"{path} cannot be called as {call}: {_last_line(error)}") from None
        rows = torch.is_tensor(found) and found.ndim == 2 and len(found) == len(x)
        if not rows or not found.is_floating_point():
            shape = list(found.shape) if torch.is_tensor(found) else type(found).__name__
            raise UserError(
                f"{path} gave {shape} for {len(x)} samples, not a row of features for each"
            )
        if not found.isfinite().all():
            raise UserError(f"{path} gave features that are not finite numbers")
        return found

    features(torch.arange(torch.Size(trial).numel(), device=device).view(trial).to(torch.uint8))
    return Detector(path.name, sha256, False, features)


def _first_line(error):
    return str(error).strip().splitlines()[0]


def _last_line(error):
    return str(error).strip().splitlines()[-1]


PROXY_NAME = "proxy 1: a random 3-D network"
PROXY_LAYERS = (  # channels in, out; stride in time, y, x
    (3, 32, (1, 1, 1)),
    (32, 32, (2, 2, 2)),
    (32, 64, (2, 2, 2)),
)
PROXY_SIDE = 64  # pixels that frames are resized to
PROXY_SEED = 2048  # of the first layer's weights
PROXY_FRAMES = 128  # at a time: its first layer's features are 16 times the size of the frames


def proxy(device) -> Detector:
    """What stands in for a detector where none is given: three 3×3×3 convolutions with fixed random
    weights.

    Its 64 features are log mean squares, over time and space, of the last layer's channels. The
    first layer's filters sum to 0, so that contrast and change count, not brightness, which differs
    most between real clips and says least. It knows nothing of the world: distances by it compare
    runs with one another and are no FVD. The weights are the same on every machine.
    """
    weights = []
    for number, (inputs, outputs, _) in enumerate(PROXY_LAYERS):
        # Numbers that no version of a library changes.
        normal = content_latent([PROXY_SEED + number], outputs * inputs * 27)
        weight = (normal * (2 / (inputs * 27)) ** 0.5).view(outputs, inputs, 3, 3, 3)
        weights.append(weight)
    first = weights[0].double()
    weights[0] = (first - first.mean((1, 2, 3, 4), keepdim=True)).float()
    sha256 = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest()
    weights = [weight.to(device) for weight in weights]

    def of_few(clips):
        frames = clips.transpose(1, 2).flatten(0, 1).float() / 127.5 - 1
        side = (PROXY_SIDE, PROXY_SIDE)
        if frames.shape[-2:] != side:
            frames = F.interpolate(frames, side, mode="bilinear", antialias=True)
        x = frames.unflatten(0, (len(clips), -1)).transpose(1, 2)
        for weight, (_, _, stride) in zip(weights, PROXY_LAYERS):
            x = F.leaky_relu(F.conv3d(x, weight, stride=stride, padding=1), 0.2)
        return torch.log(x.square().mean((2, 3, 4)) + 1e-6)

    @torch.inference_mode()
    def features(clips):
        parts = clips.split(max(1, PROXY_FRAMES // clips.shape[2]))
        return torch.cat([of_few(part) for part in parts])

    return Detector(PROXY_NAME, sha256, True, features)
