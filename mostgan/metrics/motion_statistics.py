"""How clips move, measured without a network: power over time lags, static clips, repetition.

Grey values are taken as 0 … 255 levels. ⟨·⟩ is a mean over pixels and their three colours.
"""

import math

import torch
import torch.nn.functional as F

from mostgan.metrics.frechet import Sums, add

LAGS = 64  # the longest time lag of the spectrum, in frames
# What rounding to whole levels alone puts into the difference of two frames, in levels².
ROUNDING_POWER = 1 / 6
STATIC_LEVELS = 1.0  # a clip whose pixels deviate less than this from their own means is static
THUMBNAIL = 32  # pixels a side, for comparing the frames of long videos
# frames that a video must have for its repetition to be measured: it tells periods up to half
SHORTEST_LONG = 128
LONG = 1024  # frames, at most
REPEATS = 0.5  # a video whose recurrence is more repeats itself


def _inner_products(x):
    """x: [T, P] → (⟨x_s − m, x_t − m⟩) float64 [T, T], m being the mean over time."""
    x = x.float()
    x = x - x.mean(0)
    return (x @ x.T).double() / x.shape[1]


def lag_power(clip):
    """The temporal spectrum of one clip, uint8 [T, 3, H, W]: power of pixel differences, in
    levels², by time lag.

        P(τ) = mean over t of ⟨(x_{t+τ} − x_t)²⟩,   τ = 1 … 64

    Returns float64 [64], 0 for τ ≥ T; and the clip's deviation in levels, sqrt(mean over t of ⟨(x_t
    − mean x)²⟩).
    """
    products = _inner_products(clip.flatten(1))
    squares = products.diagonal()
    differences = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0)
    power = torch.zeros(LAGS, dtype=torch.float64, device=clip.device)
    for lag in range(1, min(LAGS, len(clip) - 1) + 1):
        power[lag - 1] = differences.diagonal(lag).mean()
    return power, squares.mean().clamp(min=0).sqrt()


def add_motion(sums: Sums, clips):
    """Take in clips, uint8 [B, T, 3, H, W]: their number, spectra, and how many are static."""
    for clip in clips:
        power, deviation = lag_power(clip)
        add(sums, "clips", 1)
        add(sums, "power", power)
        add(sums, "static", deviation < STATIC_LEVELS)


def spectrum(sums: Sums, lags):
    """P(τ) of a set, τ = 1 … lags: the mean over its clips, float64 [lags], in levels²."""
    return (sums["power"] / sums["clips"])[:lags].cpu()


def spectrum_distance(real: Sums, generated: Sums, lags) -> float:
    """How far two sets' temporal spectra P and Q lie apart, in decibels:

        sqrt(mean over τ = 1 … lags of (10 log₁₀ (P(τ) + ε) / (Q(τ) + ε))²),   ε = 1/6 level²

    0 for sets that move alike; 6.02 where one's differences are twice the other's at every lag. ε,
    the power of rounding, keeps it finite for static clips. It is blind to what moves, and to
    where.
    """
    power_1, power_2 = spectrum(real, lags), spectrum(generated, lags)
    decibels = 10 * torch.log10((power_1 + ROUNDING_POWER) / (power_2 + ROUNDING_POWER))
    return math.sqrt(float(decibels.square().mean()))


def static_rate(sums: Sums) -> float:
    """The share of static clips: those whose pixels deviate from their mean over time by less than
    1 level (RMS).
    """
    return float(sums["static"] / sums["clips"])


def thumbnails(frames):
    """Frames uint8 [T, 3, H, W] averaged down to 32², as float rows [T, 3 · 32²]."""
    side = min(THUMBNAIL, frames.shape[-1])
    return F.interpolate(frames.float(), (side, side), mode="area").flatten(1)


def periodicity(rows):
    """Whether a long video repeats itself. rows: its thumbnails [T, P] → (period in frames,
    recurrence in [0, 1]).

    By the autocorrelation of frames about their mean over time, each lag normalized by what it
    compares (as McLeod and Wyvill's pitch method does), so that a perfect loop reaches 1 at its
    period wherever the video begins and ends:

        r(τ) = Σ_t ⟨x_t, x_{t+τ}⟩ / ½ Σ_t (⟨x_t²⟩ + ⟨x_{t+τ}²⟩),   τ = 1 … T/2

    Recurrence is how much of the likeness that was lost comes back, (r(τ) − m) / (1 − m) with m the
    least r before τ: 0 for a video that drifts away, 1 for a loop. The video's is that of its best
    peak; its period is the first peak that is at least 0.9 as high, so that a period is not taken
    for its multiple. Static or ever-drifting videos give (0, 0).
    """
    products = _inner_products(rows).cpu()
    squares = products.diagonal()
    if squares.mean() < STATIC_LEVELS**2:
        return 0, 0.0
    until = squares.cumsum(0)
    r = torch.ones(len(rows) // 2 + 1, dtype=torch.float64)
    for lag in range(1, len(r)):
        energy = (until[-1 - lag] + until[-1] - until[lag - 1]) / 2
        r[lag] = products.diagonal(lag).sum() / energy.clamp(min=1e-9)
    least = r.cummin(0).values[:-1]
    recurrence = ((r[1:] - least) / (1 - least).clamp(min=1e-9)).clamp(0, 1)
    recurrence = F.pad(recurrence, (1, 0))
    before, at, after = recurrence[:-2], recurrence[1:-1], recurrence[2:]
    peaks = torch.where((at >= before) & (at >= after), at, 0)
    best = float(peaks.max()) if len(peaks) else 0.0
    if best == 0:
        return 0, 0.0
    return int((peaks >= 0.9 * best).nonzero()[0]) + 1, best


def add_long(sums: Sums, index, count, rows):
    """Take in the thumbnails of long video number index of count."""
    found = torch.zeros(count, 2, dtype=torch.float64)
    found[index] = torch.tensor(periodicity(rows))
    add(sums, "periodicity", found)


def repetition(sums: Sums):
    """Of a set's long videos: the share that repeats itself (recurrence above ½), mean recurrence,
    and the median period of those that do (or None). A slow swing may come back by chance: compare
    rates, do not expect 0.
    """
    period, recurrence = sums["periodicity"].T
    repeating = recurrence > REPEATS
    median = float(period[repeating].median()) if repeating.any() else None
    return float(repeating.double().mean()), float(recurrence.mean()), median
