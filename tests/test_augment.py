"""ADA augmentation (spec §8, §8a): golden outputs, a literal reference, and properties of the
draws.
"""

import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mostgan import augment
from mostgan.augment import _SYM6, PIPELINES, apply, draw, on_device, recolor, resample, update_p
from mostgan.config import UserError

GOLDEN = Path(os.environ.get("MOSTGAN_GOLDEN", Path(__file__).parent / "golden"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(99), dtype=dtype)


def check_augment(path: Path) -> dict[str, float]:
    """Compare every output in the golden file, named {pipeline}.p{q}; returns the relative
    errors.
    """
    golden = load_file(path)
    clips = golden.pop("clips")
    errors = {}
    for key, expected in golden.items():
        match = re.fullmatch(r"(\w+)\.p(0\.\d+)", key)
        assert match, f"unexpected key {key} in {path}"
        params = draw(match[1], 1.0, len(clips), *clips.shape[2:], percentile=float(match[2]))
        out = apply(clips, params._replace(noise=None))  # the golden file leaves out easy's noise
        assert out.shape == expected.shape and out.dtype == expected.dtype
        errors[key] = float((out - expected).norm() / expected.norm())
    assert {key.split(".")[0] for key in errors} == set(PIPELINES)
    wrong = {key: error for key, error in errors.items() if not error <= 2e-5}
    assert not wrong, f"relative errors above 2e-5: {wrong}"
    return errors


def test_golden():
    assert len(check_augment(GOLDEN / "augment.safetensors")) == 9


def test_golden_check_notices_errors(tmp_path):
    from safetensors.torch import save_file

    golden = load_file(GOLDEN / "augment.safetensors")
    golden["bgc.p0.5"][0, 0, 10, 10] += 0.1
    save_file(golden, tmp_path / "augment.safetensors")
    with pytest.raises(AssertionError, match="bgc.p0.5"):
        check_augment(tmp_path / "augment.safetensors")


def literal_resample(x: torch.Tensor, geometry: torch.Tensor) -> torch.Tensor:
    """§8a's resampling to the letter: the largest padding, zeros inserted, plain convolutions,
    grid_sample.
    """
    b, c, h, w = x.shape
    f = (_SYM6 / _SYM6.sum()).to(x)
    kernel = torch.outer(f, f).expand(c, 1, -1, -1)
    x = F.pad(x, (w - 1, w - 1, h - 1, h - 1), mode="reflect")
    up = x.new_zeros(b, c, 2 * x.shape[2], 2 * x.shape[3])
    up[:, :, ::2, ::2] = x
    up = 4 * F.conv2d(F.pad(up, (6, 5, 6, 5)), kernel.flip(2, 3), groups=c)
    out_h, out_w = 2 * (h + 6), 2 * (w + 6)

    def diag(a, b):
        return torch.diag(torch.tensor([a, b, 1.0], dtype=torch.float64))

    half = torch.tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]], dtype=torch.float64)
    g = half.inverse() @ diag(2, 2) @ geometry @ diag(0.5, 0.5) @ half
    g = diag(2 / up.shape[3], 2 / up.shape[2]) @ g @ diag(out_w / 2, out_h / 2)
    grid = F.affine_grid(g[:, :2].to(x), [b, c, out_h, out_w], align_corners=False)
    out = F.grid_sample(up, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.conv2d(out[:, :, 1:-1, 1:-1], kernel, groups=c)[:, :, ::2, ::2]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_resampling_is_the_specs(pipeline, size):
    # 24 draws of everything at once reach far beyond the image; separable and turned clips are
    # among them.
    geometry = draw(pipeline, 0.8, 24, *size, seeded(1)).geometry
    geometry[:4, :2, 2] *= 8  # and some leave the padding
    off_diagonal = geometry[:, [0, 1], [1, 0]].abs().amax(1)
    assert (off_diagonal < 1e-9).any() and (pipeline == "bgc_noro" or (off_diagonal > 1e-3).any())
    x = images(24, 3, *size)
    params = draw(pipeline, 0.0, 24, *size)._replace(geometry=geometry)
    # sym6's digits.
    torch.testing.assert_close(
        apply(x, params), literal_resample(x, geometry), rtol=1e-5, atol=1e-5
    )
    moved = (geometry != torch.eye(3, dtype=torch.float64)).flatten(1).any(1)
    torch.testing.assert_close(
        apply(x, params)[moved], literal_resample(x, geometry)[moved], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_p_zero_is_the_identity_bit_for_bit(pipeline):
    x = images(5, 9, 16, 16, dtype=torch.float32)
    assert torch.equal(apply(x, draw(pipeline, 0.0, 5, 16, 16, seeded(0))), x)


def test_untouched_clips_are_bit_exact_beside_transformed_ones():
    x = images(64, 3, 16, 16, dtype=torch.float32)
    params = draw("bgc", 0.1, 64, 16, 16, seeded(0))
    plain = (params.geometry == torch.eye(3)).flatten(1).all(1) & (
        params.color == torch.eye(3, 4)
    ).flatten(1).all(1)
    assert 0 < plain.sum() < 64
    out = apply(x, params)
    assert torch.equal(out[plain], x[plain])
    assert ((out - x).abs().amax((1, 2, 3)) > 0)[~plain].all()


@pytest.mark.parametrize("pipeline", ["bgc", "bgc_noro", "easy"])
def test_every_frame_of_a_clip_is_transformed_alike(pipeline):
    frame = images(8, 3, 16, 16)
    params = draw(pipeline, 0.8, 8, 16, 16, seeded(2))._replace(noise=None)
    out = apply(frame.repeat(1, 4, 1, 1), params).unflatten(1, (4, 3))
    assert torch.equal(out, out[:, :1].expand_as(out))
    torch.testing.assert_close(out[:, 0], apply(frame, params))
    assert (out[:, 0] - frame).abs().amax((1, 2, 3)).gt(1e-3).sum() >= 6  # something did happen


def test_clips_do_not_affect_each_other():
    x = images(6, 3, 16, 16)
    params = draw("bgc", 0.7, 6, 16, 16, seeded(3))
    out = apply(x, params)
    for i in range(6):
        alone = params._replace(geometry=params.geometry[i : i + 1], color=params.color[i : i + 1])
        torch.testing.assert_close(apply(x[i : i + 1], alone), out[i : i + 1])


def test_draws_follow_the_generator():
    first, again, other = (draw("easy", 0.5, 16, 32, 32, seeded(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)
    assert not torch.equal(first.geometry, other.geometry)
    x = torch.zeros(16, 3, 8, 8)
    params = first._replace(noise=torch.ones(16, dtype=torch.float64))
    assert torch.equal(apply(x, params, seeded(1)), apply(x, params, seeded(1)))
    assert not torch.equal(apply(x, params, seeded(1)), apply(x, params, seeded(2)))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_generator_advances_alike_for_every_p(pipeline):
    low, high = seeded(1), seeded(1)
    draw(pipeline, 0.0, 4, 8, 8, low)
    draw(pipeline, 1.0, 4, 8, 8, high)
    assert torch.equal(low.get_state(), high.get_state())


N = 4000


def near(fraction: float, expected: float) -> bool:
    return abs(fraction - expected) < 5 * math.sqrt(expected * (1 - expected) / N) + 1e-9


def test_how_often_the_geometry_applies():
    p = 0.4
    g = draw("bgc_noro", p, N, 64, 64, seeded(0)).geometry
    xx, yy, x, y = g[:, 0, 0], g[:, 1, 1], g[:, 0, 2], g[:, 1, 2]
    assert near((xx < 0).double().mean(), p / 2)  # flips
    assert (yy > 0).all() and not g[:, [0, 1], [1, 0]].any()
    # Neither scale nor anisotropy.
    assert near(((xx.abs() - 1).abs() < 1e-12).double().mean(), (1 - p) ** 2)
    shifted = (x != 0) | (y != 0)  # both integer shifts round to 0 with probability (1/16)^2
    assert near(shifted.double().mean(), 1 - (1 - p) * (1 - p * 255 / 256))
    # In each factor log2 has standard deviation 0.2: over both axes they add up and cancel
    # respectively.
    assert math.isclose(float((xx.abs() * yy).log2().std()), 0.4 * math.sqrt(p), rel_tol=0.1)
    assert math.isclose(float((xx.abs() / yy).log2().std()), 0.4 * math.sqrt(p), rel_tol=0.1)


@pytest.mark.parametrize(
    "pipeline, multiplier, largest", [("bgc", 1.0, math.pi), ("easy", 0.5, 0.2 * math.pi)]
)
def test_how_often_clips_are_rotated(pipeline, multiplier, largest):
    p = 0.4
    g = draw(pipeline, p, N, 64, 64, seeded(0)).geometry
    turned = g[:, [0, 1], [1, 0]].abs().amax(1) > 1e-9
    right = 0.5 * p if pipeline == "bgc" else 0.0  # rot90 by ±90°
    assert near(turned.double().mean(), 1 - (1 - p * multiplier) * (1 - right))
    if pipeline == "easy":
        angle = torch.atan2(g[:, 1, 0], g[:, 1, 1]).abs()
        assert 0.1 * math.pi < angle.max() <= largest + 1e-9  # two rotations


def test_how_often_colour_applies():
    p = 0.3
    m = draw("bgc", p, N, 8, 8, seeded(0)).color
    white = m[:, :, :3].sum(2).mean(1)  # what a grey of 1 becomes, less the offset
    assert near((white < 0).double().mean(), p / 2)  # luma flip
    assert near((m[:, :, 3].abs().amax(1) > 0).double().mean(), p)  # brightness
    assert near(((white.abs() - 1).abs() > 1e-12).double().mean(), p)  # contrast
    linear = m[:, :, :3] / white[:, None, None]
    assert near(
        ((linear - torch.eye(3)).abs().amax((1, 2)) < 1e-12).double().mean(),
        (1 - p) ** 2 * (1 - p / 2),
    )
    # Grey stays grey through everything.
    torch.testing.assert_close(m[:, :, :3].sum(2), white[:, None].expand(N, 3))


def test_how_often_noise_and_cutout_apply():
    p = 0.5
    params = draw("easy", p, N, 64, 64, seeded(0))
    noisy = params.noise > 0
    assert near(noisy.double().mean(), 0.1 * p)
    assert math.isclose(float(params.noise[noisy].square().mean().sqrt()), 0.1, rel_tol=0.2)
    cut = params.cutout.isfinite().all(1)
    assert near(cut.double().mean(), p) and torch.equal(cut, params.cutout.isfinite().any(1))
    assert 0 <= params.cutout[cut].min() and params.cutout[cut].max() < 1


def test_which_pipeline_does_what():
    for name in PIPELINES:
        params = draw(name, 1.0, 2, 8, 8, seeded(0))
        assert (params.color is not None) == (name != "easy")
        assert (params.noise is not None) == (params.cutout is not None) == (name == "easy")


def test_easy_leaves_colours_alone():
    # One colour; reflection keeps it so.
    x = images(1, 3, 1, 1, dtype=torch.float32).expand(16, 3, 24, 24)
    params = draw("easy", 1.0, 16, 24, 24, seeded(0))._replace(noise=None, cutout=None)
    params.geometry[:, :2, 2] *= 0.3  # within reach of the padding
    torch.testing.assert_close(apply(x, params), x.contiguous(), rtol=1e-4, atol=1e-4)


def test_cutout_is_a_quarter_of_the_image_wide():
    x = torch.ones(2, 6, 16, 32)
    centres = torch.tensor([[0.5, 0.25], [math.inf, math.inf]], dtype=torch.float64)
    out = apply(x, draw("easy", 0.0, 2, 16, 32)._replace(cutout=centres))
    expected = torch.ones(16, 32)
    expected[2:6, 12:20] = 0
    assert torch.equal(out[0], expected.expand(6, 16, 32)) and torch.equal(out[1], x[1])


def test_noise_has_the_drawn_strength():
    params = draw("easy", 0.0, 2, 64, 64)._replace(
        noise=torch.tensor([0.0, 0.2], dtype=torch.float64)
    )
    out = apply(torch.zeros(2, 9, 64, 64), params, seeded(0))
    assert not out[0].any() and math.isclose(float(out[1].std()), 0.2, rel_tol=0.02)
    assert (out[1, 0] != out[1, 3]).any()  # every frame has its own


def one_of_each(pipeline: str, size: int):
    """Draws among which there are untouched, separable and turned clips."""
    params = draw(pipeline, 0.4, 4, size, size, seeded(5))._replace(noise=None)
    params.geometry[0] = torch.eye(3)
    angle = torch.tensor(0.3).cos(), torch.tensor(0.3).sin()
    params.geometry[1] = torch.tensor(
        [[angle[0], -angle[1], 1.3], [angle[1], angle[0], 0.4], [0, 0, 1]]
    )
    params.geometry[2] = torch.tensor([[-1.2, 0, 0.7], [0, 0.8, -0.4], [0, 0, 1]])
    return params


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_first_and_second_derivatives(pipeline):
    params = one_of_each(pipeline, 6)
    x = images(4, 3, 6, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply(x, params), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: apply(x, params), x, fast_mode=True)


def test_r1_through_the_augmentation():
    """R1 of a toy discriminator: by autograd, and as `loss.r1_objective` has it, with the
    geometry's transpose outside of torch.func.grad; each against differences.
    """
    x, weight = images(4, 3, 8, 8), images(2, 3, 3, 3)
    params = one_of_each("bgc", 8)

    def logit(augmented, w):
        return F.softplus(F.conv2d(augmented, w)).square().sum()

    def by_autograd(w):
        inputs = x.clone().requires_grad_()
        return (
            torch.autograd.grad(logit(apply(inputs, params), w), inputs, create_graph=True)[0]
            .square()
            .sum()
        )

    def by_func(w):
        colors = on_device(params, x.shape, x.device, x.dtype)
        gradient = torch.func.grad(lambda y: logit(recolor(y, colors), w))(
            resample(x, params.geometry)
        )
        return resample(gradient, params.geometry, transposed=True).square().sum()

    w = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(by_autograd(w), w)
    torch.testing.assert_close(torch.autograd.grad(by_func(w), w)[0], expected)
    step = 1e-5 * images(2, 3, 3, 3)
    difference = by_autograd(weight + step) - by_autograd(weight - step)
    torch.testing.assert_close(difference, 2 * (expected * step).sum(), rtol=1e-6, atol=0)


def test_precision_is_kept_under_autocast_and_half_inputs():
    x = images(4, 3, 16, 16, dtype=torch.float32)
    params = draw("bgc", 0.8, 4, 16, 16, seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = apply(x, params)
    assert torch.equal(under_autocast, apply(x, params))
    half = x.bfloat16()
    assert torch.equal(apply(half, params), apply(half.float(), params))


def test_inputs_are_left_alone():
    x = images(4, 3, 16, 16)
    before, params = x.clone(), draw("easy", 1.0, 4, 16, 16, seeded(0))
    kept = [None if a is None else a.clone() for a in params]
    apply(x, params)
    assert torch.equal(x, before)
    assert all(a is b or torch.equal(a, b) for a, b in zip(params, kept, strict=True))


def test_unknown_pipeline():
    with pytest.raises(
        UserError, match="unknown augmentation pipeline 'gbc'; known: bgc, bgc_noro, easy"
    ):
        draw("gbc", 0.5, 1, 8, 8)


def test_controller():
    assert update_p(0.0, 1.0, 64) == 64 * 4 / 100_000
    assert update_p(0.5, 0.2, 64) == 0.5 - 64 * 4 / 100_000
    assert update_p(0.5, 0.6, 64) == 0.5
    assert update_p(0.001, -1.0, 64) == 0.0
    assert update_p(0.999, 1.0, 64) == 1.0
    assert math.isclose(update_p(0.0, 1.0, 8, interval=2, target=0.5, kclips=10), 0.0016)


def test_deterministic_augmentation_is_the_same_augmentation():
    """With --deterministic, ADA's resampling takes another way backwards: the same numbers, by
    algorithms that may.
    """
    frames = torch.rand(4, 9, 32, 32)
    params = augment.draw("bgc", 1.0, 4, 32, 32, torch.Generator().manual_seed(0))
    gradients = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            x = frames.clone().requires_grad_()
            augment.apply(x, params).square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        gradients.append(x.grad)
    assert not torch.equal(*gradients), "the other way was not taken"
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-5)
