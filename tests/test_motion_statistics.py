"""Motion statistics on made clips, where the answer is known."""

import math

import pytest
import torch

from mostgan.metrics.motion_statistics import (
    LAGS,
    add_long,
    add_motion,
    lag_power,
    periodicity,
    repetition,
    spectrum_distance,
    static_rate,
    thumbnails,
)


def noise(*shape, seed=0):
    return torch.randint(
        256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def sums_of(*clips):
    sums = {}
    for clip in clips:
        add_motion(sums, clip.unsqueeze(0))
    return sums


def video(signal):
    """A video whose frames all have one grey value each."""
    return signal.round().clamp(0, 255).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)


def test_the_spectrum_of_a_ramp():
    """x_t = 2t, so P(τ) = (2τ)²; and its deviation is that of the numbers 0, 2, …, 126."""
    clip = video(2 * torch.arange(64.0))
    power, deviation = lag_power(clip)
    # No lag of 64 in 64 frames.
    expected = torch.cat([(2 * torch.arange(1.0, 64)).square(), torch.zeros(1)])
    torch.testing.assert_close(power, expected.double(), rtol=1e-5, atol=1e-3)
    assert float(deviation) == pytest.approx(math.sqrt((64**2 - 1) / 12) * 2, rel=1e-6)


def test_the_spectrum_against_its_definition():
    clip = noise(80, 3, 8, 8)
    x = clip.double()
    expected = torch.stack([(x[lag:] - x[:-lag]).square().mean() for lag in range(1, LAGS + 1)])
    torch.testing.assert_close(lag_power(clip)[0], expected, rtol=1e-5, atol=0)


def test_spectrum_distance():
    clips = [noise(70, 3, 8, 8, seed=i) // 4 for i in range(3)]
    real = sums_of(*clips)
    assert spectrum_distance(real, sums_of(*clips), 64) == 0
    twice = spectrum_distance(real, sums_of(*(2 * clip for clip in clips)), 64)
    assert twice == pytest.approx(20 * math.log10(2), abs=0.01)
    frozen = spectrum_distance(
        real, sums_of(*(clip[:1].expand(70, -1, -1, -1) for clip in clips)), 64
    )
    assert 20 < frozen < 100  # large, but a number
    # half of the clips frozen: half of the power, at every lag
    halved = sums_of(clips[0], clips[0][:1].expand(70, -1, -1, -1))
    assert spectrum_distance(sums_of(clips[0]), halved, 64) == pytest.approx(
        10 * math.log10(2), abs=0.01
    )


def test_static_clips_are_flagged():
    still = noise(1, 3, 16, 16).expand(20, -1, -1, -1)
    flicker = still.clone()
    # Half a level about the mean.
    flicker[::2] = (flicker[::2].int() + 1).clamp(max=255).to(torch.uint8)
    moving = video(20 + 5 * torch.arange(20.0))
    assert static_rate(sums_of(still)) == 1 == static_rate(sums_of(flicker))
    assert static_rate(sums_of(moving)) == 0
    assert static_rate(sums_of(still, moving, noise(20, 3, 16, 16), flicker)) == 0.5


@pytest.mark.parametrize("frames", [1024, 1000, 131])
@pytest.mark.parametrize("period", [32, 5, 60])
def test_a_loop_is_found_with_its_period(period, frames):
    loop = noise(period, 3, 32, 32).repeat(-(-frames // period), 1, 1, 1)[:frames]
    found, recurrence = periodicity(thumbnails(loop))
    assert found == period and recurrence == pytest.approx(1, abs=1e-5)


def test_a_swing_is_found_with_its_period():
    found, recurrence = periodicity(
        thumbnails(video(128 + 100 * torch.sin(2 * torch.pi / 50 * torch.arange(1024))))
    )
    assert found == 50 and recurrence > 0.99


def test_a_loop_under_noise():
    base = noise(32, 3, 32, 32).repeat(16, 1, 1, 1).float()
    grain = torch.randn(base.shape, generator=torch.Generator().manual_seed(1)) * 40
    found, recurrence = periodicity((base + grain).flatten(1))
    assert found == 32 and 0.6 < recurrence < 0.95


def test_what_does_not_repeat():
    assert periodicity(thumbnails(noise(1, 3, 32, 32).expand(300, -1, -1, -1))) == (
        0,
        0.0,
    )  # static
    assert periodicity(thumbnails(video(torch.linspace(0, 255, 300)))) == (
        0,
        0.0,
    )  # drifts away for ever
    assert periodicity(thumbnails(noise(300, 3, 32, 32)))[1] < 0.1  # never twice alike
    generator = torch.Generator().manual_seed(0)
    walks = [torch.randn(1024, 64, generator=generator).cumsum(0) * 10 for _ in range(8)]
    assert sum(periodicity(walk)[1] > 0.5 for walk in walks) == 0


def test_repetition_of_a_set():
    sums = {}
    loops = [noise(p, 3, 8, 8).repeat(200 // p, 1, 1, 1) for p in (10, 20, 20)]
    for i, clip in enumerate([*loops, noise(200, 3, 8, 8)]):
        add_long(sums, i, 4, thumbnails(clip))
    rate, recurrence, period = repetition(sums)
    assert rate == 0.75 and period == 20 and 0.75 < recurrence < 0.8
    assert sums["periodicity"][:3, 0].tolist() == [10, 20, 20]
