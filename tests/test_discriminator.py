"""The discriminator where no golden file looks: T from 2 to 8, minibatch groups, resolutions (spec
§7).
"""

import dataclasses

import pytest
import torch

from mostgan.config import ModelConfig
from mostgan.discriminator import Discriminator, minibatch_std
from mostgan.loss import r1_penalty

TINY = ModelConfig(
    resolution=32,
    channel_base=512,
    channel_max=24,
    max_num_frames=64,
    discriminator_hidden_dim=16,
)


def make(**changes):
    torch.manual_seed(0)
    return Discriminator(dataclasses.replace(TINY, **changes))


@pytest.mark.parametrize("difference", [True, False])
@pytest.mark.parametrize("T", range(2, 9))
def test_any_number_of_frames(T, difference):
    D = make(frames_per_clip=T, motion_difference=difference)
    t = torch.arange(T).float().repeat(4, 1) * 2
    frames = torch.randn(4 * T, 3, 32, 32)
    logits = D(frames, t)
    assert logits.shape == (4,) and logits.isfinite().all()
    swapped = frames.unflatten(0, (4, T)).flip(1).flatten(0, 1)
    assert not torch.allclose(D(swapped, t), logits)  # the order of a clip's frames matters
    assert not torch.allclose(D(frames, t * 2), logits)  # and so do their times
    assert torch.allclose(D(frames, t + 5), logits)  # but only differences of times


@pytest.mark.parametrize("resolution, channel_base", [(64, 512), (128, 1024)])
def test_other_resolutions(resolution, channel_base):
    D = make(resolution=resolution, channel_base=channel_base)
    assert D(
        torch.randn(6, 3, resolution, resolution), torch.tensor([[0.0, 1, 2], [0, 4, 8]])
    ).shape == (2,)


def test_concatenation_at_the_highest_resolution_but_one():
    assert make(concat_resolution=8)(
        torch.randn(6, 3, 32, 32), torch.arange(3.0).repeat(2, 1)
    ).shape == (2,)


def test_minibatch_std_groups():
    """Clip i is in group i mod (B / G)."""
    x = torch.randn(8, 3, 4, 4).double()
    y = minibatch_std(x, 4)
    assert torch.equal(y[:, :3], x)
    for i in range(8):
        expected = (x[i % 2 :: 2].var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
        assert torch.allclose(y[i, 3], expected)
    assert minibatch_std(x[:1], 4).shape == (1, 4, 4, 4)


def test_r1_matches_finite_differences():
    """The penalty's gradient, through two backward passes, against the penalty itself."""
    D = make().double()
    t, frames = torch.tensor([[0.0, 2, 5], [0, 1, 3]]), torch.randn(6, 3, 32, 32).double()
    weight = D.b32.conv1.weight
    penalty = r1_penalty(lambda x: D(x, t), frames)
    (gradient,) = torch.autograd.grad(penalty, weight)
    direction = torch.randn_like(weight)
    with torch.no_grad():
        weight += 1e-5 * direction
    above = r1_penalty(lambda x: D(x, t), frames)
    with torch.no_grad():
        weight -= 2e-5 * direction
    below = r1_penalty(lambda x: D(x, t), frames)
    assert torch.allclose((above - below) / 2e-5, (gradient * direction).sum(), rtol=1e-5)


def test_parameter_count_is_the_papers():
    with torch.device("meta"):
        D = Discriminator(ModelConfig())
    assert round(sum(p.numel() for p in D.parameters()) / 1e6, 1) == 25.9
