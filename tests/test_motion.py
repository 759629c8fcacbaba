"""Motion noise and motion codes: windows, far times, wide clips (spec §2)."""

import pytest
import torch

from mostgan.config import ModelConfig
from mostgan.model import Generator
from mostgan.motion import FRAME_ANCHORS, content_latent, motion_noise

CONFIG = ModelConfig(
    resolution=32,
    channel_base=512,
    channel_max=24,
    z_dim=32,
    w_dim=32,
    motion_noise_dim=30,
    motion_code_dim=32,
    num_frequencies=16,
    max_period=64,
    motion_distance=16,
    motion_vector_dim=16,
    motion_resolutions=(16, 32),
)


def codes(generator, seeds, t):
    noise, first_anchor = motion_noise(seeds, t, CONFIG)
    noise = noise.to(generator.mapping.w_avg.dtype)
    rows = t.double().reshape(len(noise), -1)
    return generator.motion_codes(rows, noise, first_anchor)


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(CONFIG).eval()


def test_noise_is_a_function_of_seed_and_anchor():
    """Row j is the same whatever window it is drawn in, and unlike other rows and seeds."""
    whole, first = motion_noise([3], torch.arange(0.0, 400, 16)[None], CONFIG)
    assert first.item() == 0
    for start in (16, 80, 112):
        part, first = motion_noise([3], torch.tensor([[float(start), start + 5.0]]), CONFIG)
        assert first.item() == start // 16 and len(part[0]) == FRAME_ANCHORS
        assert torch.equal(part[0], whole[0, first.item() :][:FRAME_ANCHORS])
    # Anchors go on before 0.
    across, first = motion_noise([3], torch.tensor([[-40.0, 30.0]]), CONFIG)
    assert first.item() == -3 and torch.equal(across[0, 3:], whole[0, : len(across[0]) - 3])
    assert torch.equal(
        motion_noise([3], torch.tensor([[-16.0]]), CONFIG)[0][0], across[0, 2:][:FRAME_ANCHORS]
    )
    looped, first = motion_noise([3], torch.tensor([[16.0, 60.0]]), CONFIG, loop=5)
    assert first.item() == 1 and torch.equal(
        looped[0], whole[0, [j % 5 for j in range(1, 1 + len(looped[0]))]]
    )
    whole = torch.cat([across[0, :3], whole[0]])[None]
    other, _ = motion_noise([4], torch.zeros(1, 1), CONFIG)
    rows = torch.cat([whole[0], other[0]])
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_noise_is_standard_normal():
    rows = motion_noise([11], torch.arange(0.0, 64000, 16)[None], CONFIG)[0].double().flatten()
    assert abs(rows.mean()) < 0.015 and abs(rows.var() - 1) < 0.02
    assert abs((rows**3).mean()) < 0.05 and abs((rows**4).mean() - 3) < 0.1
    assert abs((rows[1:] * rows[:-1]).mean()) < 0.015
    z = content_latent([11], 512)[0]
    assert abs((z * rows[:512].float()).mean()) < 0.2  # content and motion are different streams


@torch.no_grad()
@pytest.mark.parametrize("t", [0.0, 15.999, 1e4 + 0.25, 1e7 + 3.5, 1e8])
def test_far_times_match_float64(generator, t):
    """Radians reach 10⁸: only the networks' own rounding may remain."""
    times = t + torch.arange(4, dtype=torch.float64)[None] * 0.5
    single = codes(generator, [5], times)
    double = codes(generator.double(), [5], times)
    generator.float()
    assert (single - double).norm() / double.norm() < 1e-5
    assert len(torch.unique(single, dim=0)) == 4  # half a frame apart and still told apart


@torch.no_grad()
def test_codes_are_continuous_across_anchors(generator):
    t = torch.tensor([[32 - 1e-6, 32.0, 32 + 1e-6]], dtype=torch.float64)
    v = codes(generator, [1], t)
    assert (v[0] - v[1]).abs().max() < 1e-3 and (v[2] - v[1]).abs().max() < 1e-3


@torch.no_grad()
def test_frames_far_apart_take_noise_per_frame(generator):
    """A clip with frames 10⁸ apart needs the noise of two frames, not of all in between."""
    t = torch.tensor([[3.0, 1e8], [40.0, 5e7]], dtype=torch.float64)
    noise, first_anchor = motion_noise([7, 8], t, CONFIG)
    assert noise.shape == (4, FRAME_ANCHORS, 30) and first_anchor.tolist() == [
        0,
        6250000,
        2,
        3125000,
    ]
    wide = codes(generator, [7, 8], t)
    alone = torch.cat(
        [codes(generator, [7 + i], t[i : i + 1, j : j + 1]) for i in (0, 1) for j in (0, 1)]
    )
    assert torch.allclose(wide, alone, rtol=1e-5, atol=1e-6)
