"""The generator where no golden file looks: orders, windows, sizes, labels, rendering (spec
§3–6).
"""

import dataclasses

import pytest
import torch

import kernels
import mostgan
from mostgan.config import ModelConfig, UserError
from mostgan.model import Generator
from mostgan.motion import content_latent, motion_noise
from mostgan.rendering import to_uint8

TINY = ModelConfig(
    resolution=32,
    channel_base=512,
    channel_max=24,
    z_dim=32,
    w_dim=32,
    motion_noise_dim=32,
    motion_code_dim=32,
    num_frequencies=16,
    max_period=64,
    motion_distance=16,
    motion_vector_dim=16,
    motion_resolutions=(16, 32),
)


def make(**changes):
    torch.manual_seed(0)
    return Generator(dataclasses.replace(TINY, **changes)).eval().requires_grad_(False)


def frames_of(generator, seeds, t, label=None, **options):
    noise, first_anchor = motion_noise(seeds, t, generator.config)
    dtype = generator.mapping.w_avg.dtype
    z = content_latent(seeds, generator.config.z_dim).to(dtype)
    return generator(z, t, noise.to(dtype), first_anchor, label, **options)


def test_motion_first_is_strategy_two():
    """Strategy ii written out from paper 4.3: MoStAtt on the raw weight, then the content style,
    then demodulation.
    """
    generator = make(modulation_order="motion_first").double()
    layer = generator.synthesis.b16.conv1
    torch.manual_seed(1)
    x, w = torch.randn(6, 24, 16, 16).double(), torch.randn(2, 32).double()
    vectors = torch.randn(6, 8, 16).double()
    y, _ = layer(x, layer.content(w), vectors)
    style, factors = layer.affine(w), layer.hypernetwork(vectors).view(6, 8, 1, -1)
    for n in range(6):
        M = torch.einsum(
            "kri,kry,krx->kiyx", factors[n][..., :24], factors[n][..., 24:27], factors[n][..., 27:]
        )
        score = torch.einsum("oiyx,kiyx->ok", layer.weight, M) / (24 * 9) ** 0.5
        P = torch.einsum("ok,kiyx->oiyx", score.softmax(1), M)
        weight = layer.weight * (1 + torch.nn.functional.leaky_relu(P / P.abs().max(), 0.2))
        weight = weight * style[n // 3].view(1, -1, 1, 1)
        weight = weight * (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        reference = torch.nn.functional.conv2d(x[n : n + 1], weight, layer.bias, padding=1)
        assert torch.allclose(
            y[n : n + 1], torch.nn.functional.leaky_relu(reference, 0.2) * 2**0.5, atol=1e-12
        )
    first = make().double().synthesis.b16.conv1
    assert not torch.allclose(y, first(x, first.content(w), vectors)[0], atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"motion_styles": 0},
        {"motion_styles": 1},
        {"rank": 5},
        {"motion_vector_dim": 24},
        {"resolution": 64},
        {"modulation_order": "motion_first"},
        {"prenorm_resolutions": (32,)},
        {"motion_demod_only_resolutions": (32,)},
        {"motion_demod_only_resolutions": (16, 32), "modulation_order": "motion_first"},
        {"motion_resolutions": (4, 8)},
    ],
    ids=str,
)
def test_clips_and_frames_are_independent(changes):
    """A frame does not depend on which frames and clips it is computed with; one frame of one clip
    works.
    """
    generator = make(**changes).double()
    t = torch.tensor([[0.0, 3.0, 20.5], [7.0, 8.0, 40.0]], dtype=torch.float64)
    together = frames_of(generator, [1, 2], t).unflatten(0, (2, 3))
    for b in range(2):
        for i in range(3):
            alone = frames_of(generator, [1 + b], t[b : b + 1, i : i + 1])
            assert torch.allclose(alone[0], together[b, i], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(together[0, 0], together[0, 2], atol=1e-3)


def test_labels_matter():
    generator = make(num_labels=3)
    t, label = torch.zeros(1, 1), torch.eye(3)
    frames = [frames_of(generator, [0], t, label[i : i + 1]) for i in range(3)]
    assert (frames[0] - frames[1]).abs().max() > 1e-2 and (frames[1] - frames[2]).abs().max() > 1e-2
    for bad in (None, 3, -1):
        with pytest.raises(UserError, match="label"):
            next(mostgan.render(generator, 0, label=bad))
    with pytest.raises(UserError, match="without labels"):
        next(mostgan.render(make(), 0, label=1))


@pytest.mark.parametrize("start", [0, 13, 10_000_000])
def test_a_window_alone_equals_the_longer_render(start):
    generator = make()
    whole = torch.cat(
        list(mostgan.render(generator, 3, start=start, frames=40, clips=2, window=16)), dim=1
    )
    assert whole.shape == (2, 40, 3, 32, 32) and whole.dtype == torch.uint8
    for first, count, window in ((0, 1, 16), (5, 20, 7), (16, 24, 64)):
        part = torch.cat(
            list(mostgan.render(generator, 3, start + first, count, clips=2, window=window)), dim=1
        )
        # The same numbers up to rounding; at the edge between two levels of uint8 that may show.
        difference = (part.int() - whole[:, first : first + count].int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    alone = torch.cat(list(mostgan.render(generator, 4, start, 8)), dim=1)
    assert (alone[0].int() - whole[1, :8].int()).abs().max() <= 1  # clip i has seed + i


def test_render_is_the_forward_pass():
    generator = make()
    t = 5 + torch.arange(6, dtype=torch.float64)[None]
    expected = to_uint8(frames_of(generator, [2], t, psi=0.7))
    rendered = next(mostgan.render(generator, 2, start=5, frames=6, psi=0.7))[0]
    assert (rendered.int() - expected.int()).abs().max() <= 1
    whole = next(mostgan.render(generator, 2, start=5, frames=6, psi=1.0))[0]
    assert not torch.equal(whole, rendered)


def test_shared_motion_differs_from_own_motion():
    generator = make()
    own, shared = (
        next(mostgan.render(generator, 0, frames=4, clips=2, motion_seed=seed))
        for seed in (None, 0)
    )
    assert torch.equal(own[0], shared[0]) and not torch.equal(own[1], shared[1])


def test_no_motion_at_all_gives_no_nan():
    """P ≡ 0 must give P̂ = 0 (spec §5), in the gradients too."""
    content_weight = torch.randn(1, 4, 3, 3, 3, requires_grad=True)
    motion_style = torch.zeros(2, 8, 1, 9, requires_grad=True)
    weight, _ = kernels.mostatt(content_weight, motion_style)
    assert torch.equal(weight[0], content_weight[0])
    weight.sum().backward()
    assert content_weight.grad.isfinite().all() and motion_style.grad.isfinite().all()


def test_parameter_count_is_the_papers():
    with torch.device("meta"):
        generator = Generator(ModelConfig())
    assert round(sum(p.numel() for p in generator.parameters()) / 1e6, 1) == 40.9
    assert ModelConfig().num_ws == 14


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"resolution": 48}, "power of two"),
        ({"resolution": 16}, "power of two"),
        ({"resolution": 2048}, "power of two"),
        ({"motion_styles": -1}, "motion_styles"),
        ({"rank": 0}, "rank"),
        ({"motion_resolutions": (20,)}, "powers of two"),
        ({"num_frequencies": 5}, "motion_code_dim"),
        ({"modulation_order": "iii"}, "modulation_order"),
        ({"frames_per_clip": 0}, "frames_per_clip"),
    ],
)
def test_impossible_configurations_are_named(changes, word):
    with pytest.raises(UserError, match=word):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"start": -2e8}, "start"),
        ({"start": 2e8}, "start"),
        ({"frames": 0}, "frames"),
        ({"clips": 0}, "clips"),
        ({"start": 1e8, "frames": 2}, "last frame"),
        ({"step": 0}, "speed"),
        ({"loop": 0}, "loop"),
        ({"window": 0}, "window"),
        ({"seed": -1}, "seed"),
        ({"motion_seed": 2**63}, "seed"),
        ({"seed": [1, 2]}, "per clip"),
        ({"seed": [()]}, "per clip"),
        ({"content_frames": 0}, "content_frames"),
        ({"style_gain": {8: 0.0}}, "0 to 7"),
        ({"style_gain": {0: float("nan")}}, "finite"),
    ],
)
def test_impossible_renders_are_named(options, word):
    with pytest.raises(UserError, match=word):
        next(mostgan.render(make(), **{"seed": 0} | options))
