"""Ops as a CPU trains them and samples by them: the same results, and the same gradients as
autograd's, in float64.
"""

import pytest
import torch

import kernels
from kernels import cpu, reference

CASES = {
    "one weight for all clips": ("mostatt_demod", [(1, 5, 4, 3, 3), (6, 3, 2, 10), (2, 4)], {}),
    "a weight per clip": ("mostatt_demod", [(2, 5, 4, 3, 3), (6, 3, 1, 10)], {}),
    "one style": ("mostatt_demod", [(1, 5, 4, 3, 3), (6, 1, 1, 10), (2, 4)], {}),
    "same": ("conv2d_per_frame", [(4, 3, 6, 5), (4, 2, 3, 3, 3)], {}),
    "up": ("conv2d_per_frame", [(4, 3, 6, 5), (4, 2, 3, 3, 3)], {"up": 2}),
    "epilogue": ("epilogue", [(4, 3, 6, 5), (4, 3), (3,)], {"clamp": 0.7}),
    "epilogue up": ("epilogue", [(4, 3, 7, 9), (4, 3), (3,)], {"up": 2}),
    "layer": ("conv2d_epilogue", [(4, 3, 6, 5), (4, 2, 3, 3, 3), (4, 2), (2,)], {"up": 2}),
}


def inputs_of(shapes):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if inputs[0].ndim == 4:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    return [x.requires_grad_() for x in inputs]


def gradients(results, inputs, **options):
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(1)
    loss = sum((r * torch.randn_like(r)).sum() for r in results)
    return results, torch.autograd.grad(loss, inputs, **options)


def close(ours, theirs):
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_autograds(case):
    name, shapes, options = CASES[case]
    if name == "mostatt_demod":
        options = {"content_first": len(shapes) == 3}
    inputs = inputs_of(shapes)
    assert cpu.trains(inputs[0])
    ours = gradients(getattr(cpu, name)(*inputs, **options), inputs)
    theirs = gradients(getattr(reference, name)(*inputs, **options), inputs)
    for mine, wanted in zip(ours, theirs, strict=True):
        close(mine, wanted)


def test_no_motion_has_a_finite_gradient():
    weight, style = inputs_of([(1, 5, 4, 3, 3), (6, 3, 1, 10)])
    results, of_inputs = gradients(cpu.mostatt_demod(weight, style.detach() * 0), [weight])
    assert torch.equal(results[0], weight.expand(6, -1, -1, -1, -1))
    assert all(g.isfinite().all() for g in of_inputs)


def test_filters_in_bf16_are_float32s():
    x = torch.randn(2, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = reference.upsample2d(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference.upsample2d(x.float()).bfloat16())


@pytest.mark.parametrize("up", [1, 2])
def test_a_demodulated_kernel_gives_the_same_layer(up, monkeypatch):
    """Demodulation in the kernel, as one large frame without gradients has it on a CPU."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 6, 40, 40).double(), torch.randn(1, 4, 6, 3, 3).double()
    demod, bias = torch.rand(1, 4).double(), torch.randn(4).double()
    expected = reference.conv2d_epilogue(x.requires_grad_(), weight, demod, bias, up, 2.0)
    monkeypatch.setattr(reference, "conv2d_per_frame", None)  # what the other way begins with
    with torch.no_grad():
        y = kernels.conv2d_epilogue(x, weight, demod, bias, up, 2.0)
    assert y.shape == expected.shape and (y - expected).abs().max() < 1e-12
