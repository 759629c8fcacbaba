"""The plain ops where no golden file looks: gradients of gradients, sizes, memory layouts."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import reference


@pytest.mark.parametrize(
    "op",
    [
        reference.filter2d,
        reference.downsample2d,
        reference.upsample2d,
        lambda x: reference.fir(x, 2),
        lambda x: reference.fir(x, 1, gain=4.0),
    ],
    ids=["filter", "downsample", "upsample", "fir pad 2", "fir pad 1"],
)
def test_fir_differentiates_twice(op):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        op, (x,), check_forward_ad=True
    ) and torch.autograd.gradgradcheck(op, (x,))


def test_fir_keeps_a_constant():
    """The filter sums to 1 (4 in upsampling, for the zeros between): away from the border, one
    color stays.
    """
    x = torch.ones(1, 2, 16, 16)
    for op, inner in (
        (reference.filter2d, 12),
        (reference.downsample2d, 4),
        (reference.upsample2d, 26),
    ):
        y = op(x)
        border = (y.shape[2] - inner) // 2
        assert torch.allclose(y[..., border:-border, border:-border], torch.ones(()))


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize(
    "frames, channels, size", [(1, 5, 8), (3, 5, 8), (20, 7, 9), (2, 512, 8), (2, 24, 32)]
)
def test_one_kernel_per_frame(frames, channels, size, up):
    """Every way the per-frame convolution is computed in gives what each frame gives alone."""
    x, weight = (
        torch.randn(frames, channels, size, size).double(),
        torch.randn(frames, 3, channels, 3, 3).double(),
    )
    y = reference.conv2d_per_frame(x, weight, up)
    for n in range(frames):
        if up == 2:
            alone = F.conv_transpose2d(x[n : n + 1], weight[n].transpose(0, 1), stride=2)
        else:
            alone = F.conv2d(x[n : n + 1], weight[n], padding=1)
        assert torch.allclose(y[n : n + 1], alone)


def test_epilogue():
    x, demod, bias = (
        torch.randn(4, 3, 5, 5).double(),
        torch.rand(4, 3).double(),
        torch.randn(3).double(),
    )
    expected = F.leaky_relu(x * demod[:, :, None, None] + bias[:, None, None], 0.2) * 2**0.5
    assert torch.allclose(reference.demod_bias_lrelu(x.clone(), demod, bias), expected)


def test_diversity_of_orthogonal_and_of_equal_styles():
    """Orthogonal rows: the Gram matrix is the identity, mean square 1 / rows. Equal rows: all ones,
    mean square 1.
    """
    from mostgan.loss import diversity

    orthogonal = torch.eye(8).double()[None] * 3  # one frame, 8 styles, 8 output channels
    assert torch.allclose(diversity([orthogonal], 1), torch.tensor(1 / 8).double(), atol=1e-6)
    equal = torch.ones(2, 5, 4).double()
    assert torch.allclose(diversity([equal, equal], 4), torch.tensor(2 / 4).double(), atol=1e-6)


@pytest.mark.parametrize("k, rank, styles", [(1, 1, 1), (3, 2, 5)])
def test_public_mostatt_on_a_cpu_is_the_plain_one(k, rank, styles):
    W, style = torch.randn(2, 7, 5, k, k), torch.randn(6, styles, rank, 5 + 2 * k)
    for ours, plain in zip(kernels.mostatt(W, style), reference.mostatt(W, style)):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("rank, styles", [(1, 1), (2, 5)])
def test_style_gain_scales_a_share_of_P(rank, styles):
    """Written out from Eq. 2 with style 0's share scaled; the maximum that P is divided by is the
    whole P's.
    """
    W, style = torch.randn(2, 7, 5, 3, 3).double(), torch.randn(6, styles, rank, 5 + 6).double()
    M = reference.motion_modulation(style, 5, 3).unflatten(2, (5, 3, 3))
    plain, score = reference.mostatt(W, style)
    A = score.softmax(2)
    for gain in (0.0, 0.3, 1.0, 4.0):
        gains = torch.ones(styles).double()
        gains[0] = gain
        weight, same_score = kernels.mostatt(W, style, gains)
        whole = torch.einsum("nok,nkiyx->noiyx", A, M)
        P = whole + (gain - 1) * torch.einsum("no,niyx->noiyx", A[:, :, 0], M[:, 0])
        P_hat = F.leaky_relu(P / whole.abs().amax(dim=(1, 2, 3, 4), keepdim=True), 0.2)
        assert torch.allclose(weight, W.repeat_interleave(3, 0) * (1 + P_hat)) and torch.equal(
            score, same_score
        )
        assert torch.equal(kernels.mostatt_demod(W, style, style_gain=gains)[0], weight)
    weight, _ = kernels.mostatt(W, style, torch.zeros(styles).double())
    assert torch.equal(weight, W.repeat_interleave(3, 0))


def agree(ours, exact):
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("order", ["content first", "motion first", "no content style"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("k, rank, styles", [(3, 3, 6), (1, 1, 1)])
def test_gradient_of_mostatt_is_autograds(k, rank, styles, rows, order):
    weight, motion = (
        torch.randn(rows, 5, 7, k, k).double(),
        torch.randn(6, styles, rank, 7 + 2 * k).double(),
    )
    content = None if order == "no content style" else torch.randn(2, 7).double()
    inputs = [x.requires_grad_() for x in (weight, motion, content) if x is not None]
    outputs = reference.mostatt_demod(
        weight, motion, content, content_first=order == "content first"
    )
    cotangents = [torch.randn_like(out) for out in outputs]
    exact = torch.autograd.grad(outputs, inputs, cotangents)
    _, score, demod = (out.detach() for out in outputs)
    first = order == "content first"
    given = weight, motion, content
    ours = reference.mostatt_backward(cotangents, given, score, demod, first)
    agree(ours[: len(exact)], exact)


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("clamp", [None, 1.0])
def test_gradients_of_a_convolution_and_its_epilogue_are_autograds(up, clamp):
    x, weight = torch.randn(3, 4, 5, 6).double(), torch.randn(3, 2, 4, 3, 3).double()
    inputs = [v.requires_grad_() for v in (x, weight)]
    y = reference.conv2d_per_frame(x, weight, up)
    grad = torch.randn_like(y)
    ours = (
        reference.conv2d_per_frame_grad_x(grad, weight, up),
        reference.conv2d_per_frame_grad_weight(grad, x, 3, up),
    )
    agree(ours, torch.autograd.grad(y, inputs, grad))
    inputs = [
        v.double().requires_grad_() for v in (y.detach(), torch.rand(3, 2) + 0.5, torch.randn(2))
    ]
    z = reference.epilogue(*inputs, up, clamp)
    grad = torch.randn_like(z)
    ours = reference.epilogue_backward(grad, z.detach(), *inputs[1:], up, clamp)
    agree(ours, torch.autograd.grad(z, inputs, grad))


def test_autocast_does_not_reach_into_mostatt():
    torch.manual_seed(0)
    weight, motion_style = torch.randn(1, 8, 6, 3, 3), torch.randn(2, 4, 1, 12)
    expected = reference.mostatt_demod(weight, motion_style)
    with torch.autocast("cpu", torch.bfloat16):
        made = reference.mostatt_demod(weight, motion_style)
    assert made[0].dtype == torch.bfloat16 and torch.equal(made[0], expected[0].bfloat16())
    assert torch.equal(made[1], expected[1]) and torch.equal(made[2], expected[2])
