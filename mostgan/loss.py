"""Losses as functions of logits, scores and frames (spec §5 and §8, paper 3.4), and the objectives
of a step.

An objective is a pure function of networks and tensors, with nothing drawn inside, so that it
compiles as one graph.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from mostgan import augment


def generator_loss(fake_logits):
    """Non-saturating logistic loss: mean softplus(−D(fake))."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits, fake_logits):
    """Logistic loss: mean softplus(−D(real)) + mean softplus(D(fake))."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def squared_norm(gradient):
    """Σ (∂logit/∂frame)² per frame, averaged over the frames of a clip and over clips: times γ/2 it
    is R1 (spec §8).
    """
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def r1_penalty(logits_of, frames, transform=None):
    """R1 without its γ/2, differentiable in D's parameters.

    logits_of: function of frames [N, 3, H, W] → logits [B]. transform(x, transposed): a linear map
    A on frames, applied before, or its transpose; then R1 is that of D ∘ A, frames are A's result,
    and ∇ₓ D(A x) = Aᵀ ∇ D at A x.

    With g = ∇ Σ D, and g fixed, R1's gradient is that of 2 ⟨∇ Σ D, A Aᵀ g⟩: a Jacobian-vector
    product. To differentiate ∇ D itself, as the eager form on a CPU does, needs convolutions whose
    kernels are as large as images. A CPU is quick at them (the product takes 1.3 times as long
    there), cuDNN takes seconds, and AOTAutograd cannot do it at all where autograd.grad is called
    in a compiled function.

    The logits, times 0, are in the result for the parameters that R1 does not depend on: their
    gradient is then 0 and not None, so that Adam takes the same step for them in either form.
    """
    transform = transform or (lambda x, transposed: x)
    if frames.is_cpu and not torch.compiler.is_compiling():
        x = frames.detach().requires_grad_()
        logits = logits_of(x)
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return squared_norm(transform(gradient, True)) + 0 * logits.sum()
    gradient = torch.func.grad(lambda x: logits_of(x).sum())(frames).detach()
    of_unmoved = transform(gradient, True)
    return squared_norm(of_unmoved) + _zero_with_gradient(
        logits_of, frames, transform(of_unmoved, False)
    )


def _zero_with_gradient(logits_of, frames, direction):
    """0, with the gradient to D's parameters of 2/N · ⟨∂ Σ logits / ∂ frames, direction⟩."""
    logits, derivative = torch.func.jvp(logits_of, (frames,), (direction,))
    surrogate = 2 / len(frames) * derivative.sum() + 0 * logits.sum()
    return surrogate - surrogate.detach()


def diversity(scores, num_ws):
    """Motion diversity (Eq. 3): Σ over layers of the mean squared entry of the scores' Gram matrix,
    / num_ws.

    scores: one [N, O, K] per MoStAtt layer. Rows, one per frame and style, are divided by their
    detached norm; the Gram matrix is of all N·K rows of the batch, diagonal included. ‖R Rᵀ‖² = ‖Rᵀ
    R‖², so the smaller product is taken.
    """
    total = 0.0
    for score in scores:
        rows = score.float() if score.dtype in (torch.bfloat16, torch.float16) else score
        rows = rows.transpose(1, 2).flatten(0, 1)  # [N·K, O]
        rows = rows / (rows.detach().norm(dim=1, keepdim=True) + 1e-6)
        gram = rows @ rows.t() if rows.shape[0] <= rows.shape[1] else rows.t() @ rows
        total = total + gram.square().sum() / rows.shape[0] ** 2
    return total / num_ws


class Latents(NamedTuple):
    """What B generated clips are drawn from: the arguments of Generator.forward, in its order."""

    z: Tensor
    t: Tensor  # [B, T]
    noise: Tensor
    first_anchor: Tensor
    label: Tensor | None


def frozen(module):
    """The module as a function through which no gradient reaches its own parameters."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda *inputs: functional_call(module, parameters, inputs)


def stacked(frames, clips):
    """Frames [N, 3, H, W] ↔ clips as ADA takes them, [B, T·3, H, W]."""
    return frames.reshape(clips, -1, *frames.shape[2:])


def augmented(frames, params):
    """ADA on frames [N, 3, H, W]: one transform per clip. params: of augment.on_device, or None."""
    if params is None:
        return frames
    clips = augment.resample(stacked(frames, len(params.geometry)), params.geometry)
    return augment.recolor(clips, params).view(frames.shape)


def generator_objective(G, D, latents, params, diversity_weight):
    """Make D take generated clips for real ones, and motion styles differ.

    Returns loss, its two parts, D's logits [B], and what later steps may use: frames [N, 3, H, W],
    w [B, w_dim].
    """
    z, t, noise, first_anchor, label = latents
    w = G.content_code(z, label)
    frames, scores = G.synthesis(
        G.synthesis.content(w), *G.motion(w, t, noise, first_anchor, label)
    )
    logits = D(augmented(frames, params), t, label)
    adversarial, diverse = generator_loss(logits), diversity(scores, G.config.num_ws)
    return adversarial + diversity_weight * diverse, adversarial, diverse, logits, frames, w


def discriminator_objective(G, D, real, real_params, fake, fake_params):
    """Tell real clips, real = (frames, t, label), from generated ones. fake: Latents of fresh
    clips; or clips made before, as real; or D's logits of them. Returns loss, logits of the real
    clips.
    """
    if isinstance(fake, Latents):
        with torch.no_grad():
            fake = G(*fake), fake.t, fake.label
    if not isinstance(fake, Tensor):
        frames, t, label = fake
        fake = D(augmented(frames, fake_params), t, label)
    frames, t, label = real
    logits = D(augmented(frames, real_params), t, label)
    return discriminator_loss(logits, fake), logits


def r1_objective(D, real, params):
    """R1 of the augmented discriminator, without its γ/2. ADA's geometry is linear, and stays
    outside of what is differentiated twice.
    """
    frames, t, label = real
    if params is None:
        return r1_penalty(lambda x: D(x, t, label), frames)
    clips = len(t)

    def logits_of(moved):
        return D(augment.recolor(stacked(moved, clips), params).view(frames.shape), t, label)

    def geometry(x, transposed):
        return augment.resample(stacked(x, clips), params.geometry, transposed).view(x.shape)

    return r1_penalty(logits_of, geometry(frames, False), geometry)
