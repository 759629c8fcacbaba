"""R1 by a Jacobian-vector product against the double backward, for every kind of discriminator and
of ADA.
"""

import dataclasses
from unittest import mock

import pytest
import torch

from mostgan import augment
from mostgan.config import ModelConfig
from mostgan.discriminator import Discriminator
from mostgan.loss import r1_objective, squared_norm, stacked

TINY = ModelConfig(
    resolution=32,
    channel_base=256,
    channel_max=16,
    max_num_frames=64,
    discriminator_hidden_dim=8,
    motion_styles=2,
)
MODELS = {
    "K = 2": {},
    "StyleGAN-V": {"motion_styles": 0, "motion_difference": False, "discriminator_hidden_dim": 24},
    "labels": {"num_labels": 3},
    "groups": {"mbstd_group": 2},
    "one group": {"mbstd_group": 1},
    "T = 5": {"frames_per_clip": 5},
    "64²": {"resolution": 64, "channel_base": 512, "concat_resolution": 8},
}


def make(dtype, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, **changes)
    D, T = Discriminator(config).to(dtype), config.frames_per_clip
    t = torch.arange(T, dtype=dtype).square().repeat(4, 1)
    label = torch.eye(3, dtype=dtype)[[0, 1, 2, 0]] if config.num_labels else None
    frames = torch.randn(4 * T, 3, config.resolution, config.resolution, dtype=dtype)
    return D, (frames, t, label)


def double_backward(D, real, params):
    """R1 as its definition reads, with everything differentiated twice."""
    frames, t, label = real
    frames = frames.detach().requires_grad_()
    moved = frames
    if params is not None:
        moved = augment.resample(stacked(frames, len(t)), params.geometry)
        moved = augment.recolor(moved, params).view(frames.shape)
    (gradient,) = torch.autograd.grad(D(moved, t, label).sum(), frames, create_graph=True)
    return squared_norm(gradient)


def gradients(penalty, D):
    return penalty.detach(), torch.autograd.grad(penalty, list(D.parameters()), allow_unused=True)


def agree(ours, exact, D, tolerance):
    (value, grads), (exact_value, exact_grads) = ours, exact
    assert abs(value - exact_value) <= tolerance * exact_value
    for (name, _), grad, exact_grad in zip(D.named_parameters(), grads, exact_grads, strict=True):
        if exact_grad is None:
            continue
        assert grad is not None, name
        size = exact_grad.norm()
        assert (grad - exact_grad).norm() <= tolerance * (size if size > 1e-6 else 1), name


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")


def product(D, real, params):
    """R1 by the product in eager mode, as a GPU takes it without torch.compile: the FIR filter has
    a forward derivative of its own.
    """
    with mock.patch.object(torch.Tensor, "is_cpu", False):
        return r1_objective(D, real, params)


def single(D, real):
    return D.float(), tuple(None if x is None else x.float() for x in real)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_r1_by_the_product_is_the_double_backward(changes):
    D, real = make(torch.float64, **changes)
    exact = gradients(double_backward(D, real, None), D)
    agree(gradients(product(D, real, None), D), exact, D, 1e-12)
    D, real = single(D, real)
    agree(gradients(product(D, real, None), D), exact, D, 1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_compiled_r1_is_the_double_backward(dtype, tolerance):
    """In one whole graph, with labels."""
    D, real = make(torch.float64, num_labels=3)
    exact = gradients(double_backward(D, real, None), D)
    if dtype == torch.float32:
        D, real = single(D, real)
    agree(gradients(compiled(r1_objective)(D, real, None), D), exact, D, tolerance)


@pytest.mark.parametrize("pipeline", ["bgc", "bgc_noro", "easy"])
def test_r1_with_ada(pipeline):
    D, real = make(torch.float64)
    params = augment.draw(pipeline, 0.8, 4, 32, 32, torch.Generator().manual_seed(1))
    params = augment.on_device(params, (4, 9, 32, 32), torch.device("cpu"), torch.float64)
    exact = gradients(double_backward(D, real, params), D)
    agree(gradients(r1_objective(D, real, params), D), exact, D, 1e-12)
    agree(gradients(product(D, real, params), D), exact, D, 1e-12)
    if pipeline == "bgc":
        agree(gradients(compiled(r1_objective)(D, real, params), D), exact, D, 1e-12)
