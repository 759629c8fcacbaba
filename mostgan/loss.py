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


def _unmoved(x, transposed):
    return x


def r1_penalty(logits_of, frames, transform=_unmoved):
    """R1 without its γ/2, differentiable in D's parameters.

    logits_of: function of frames [N, 3, H, W] → logits [B]. transform(x, transposed): a linear map
    A on frames, applied before, or its transpose; then R1 is that of D ∘ A, frames are A's result,
    and ∇ₓ D(A x) = Aᵀ ∇ D at A x.

    With g = ∇ Σ D, and g fixed, R1's gradient is that of 2 ⟨∇ Σ D, A Aᵀ g⟩: a Jacobian-vector
    product. To differentiate ∇ D itself needs, as PyTorch writes the second derivative of a
    convolution, others whose kernels are as large as images. cuDNN takes seconds for them, and
    AOTAutograd cannot do it at all where autograd.grad is called in a compiled function. A CPU
    takes them in less time than the product.

    The logits, times 0, are in the result for the parameters that R1 does not depend on: their
    gradient is then 0 and not None, so that Adam takes the same step for them in either form.
    """
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
    detached norm; the Gram matrix is of all N·K rows of the batch, diagonal included. The smaller
    of the products R Rᵀ and Rᵀ R is taken, for their norms are equal.
    """
    if not scores:
        return torch.zeros(())  # a model without motion styles
    total = 0.0
    for score in scores:
        rows = score.float() if score.dtype in (torch.bfloat16, torch.float16) else score
        rows = rows.transpose(1, 2).flatten(0, 1)  # [N·K, O]
        rows = rows / (rows.detach().norm(dim=1, keepdim=True) + 1e-6)
        gram = rows @ rows.t() if rows.shape[0] <= rows.shape[1] else rows.t() @ rows
        total = total + gram.square().sum() / rows.shape[0] ** 2
    return total / num_ws


# --------------------------------------------------------------------------------------- objectives


class Latents(NamedTuple):
    """What B generated clips are drawn from: arguments of Generator.forward."""

    z: Tensor
    t: Tensor  # [B, T]
    noise: Tensor
    first_anchor: Tensor
    label: Tensor | None
    frame_condition: Tensor | None = None  # [B, T, E] at the times t


class Clips(NamedTuple):
    """B clips, real or generated: the arguments of Discriminator.forward, in its order."""

    frames: Tensor  # [B·T, 3, H, W], about [-1, 1]
    t: Tensor  # [B, T]
    label: Tensor | None  # [B, num_labels]
    frame_condition: Tensor | None = None  # [B, T, E]


def frozen(module):
    """The module as a function through which no gradient reaches its own parameters."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda *inputs: functional_call(module, parameters, inputs)


def stacked(frames, clips):
    """Frames [N, 3, H, W] ↔ clips as ADA takes them, [B, T·3, H, W]."""
    return frames.reshape(clips, -1, *frames.shape[2:])


def augmented(frames, transforms):
    """ADA on frames [N, 3, H, W]: one transform per clip. transforms: of augment.on_device, or
    None.
    """
    if transforms is None:
        return frames
    clips = augment.resample(stacked(frames, len(transforms.geometry)), transforms.geometry)
    return augment.recolor(clips, transforms).view(frames.shape)


def generated(G, latents):
    """Clips that the generator makes of latents, with no gradient."""
    with torch.no_grad():
        *of_clips, of_frames = latents
        frames = G(*of_clips, frame_condition=of_frames)
        return Clips(frames, latents.t, latents.label, of_frames)


def generator_objective(G, D, latents, transforms, diversity_weight):
    """Make D take generated clips for real ones, and motion styles differ (paper 3.4).

    Returns the loss, its two parts, D's logits [B], the clips and their w [B, w_dim].
    """
    z, t, noise, first_anchor, *conditions = latents
    w = G.content_code(z, latents.label)
    motion = G.motion(w, t, noise, first_anchor, *conditions)
    frames, scores = G.synthesis(G.synthesis.content(w), *motion)
    logits = D(augmented(frames, transforms), t, *conditions)
    adversarial, diverse = generator_loss(logits), diversity(scores, G.config.num_ws)
    loss = adversarial + diversity_weight * diverse
    return loss, adversarial, diverse, logits, Clips(frames, t, *conditions), w


def discriminator_objective(D, real, real_transforms, fake, fake_transforms):
    """Tell real clips from generated ones, wherever those come from.

    real, fake: Clips. Returns the loss and D's logits of the real clips [B].
    """
    fake_logits = D(augmented(fake.frames, fake_transforms), *fake[1:])
    real_logits = D(augmented(real.frames, real_transforms), *real[1:])
    return discriminator_loss(real_logits, fake_logits), real_logits


def r1_objective(D, real, transforms):
    """R1 of the augmented discriminator, without its γ/2. ADA's geometry is linear, and stays
    outside of what is differentiated twice.
    """
    frames, *of_clips = real
    if transforms is None:
        return r1_penalty(lambda x: D(x, *of_clips), frames)
    clips = len(of_clips[0])

    def logits_of(moved):
        recolored = augment.recolor(stacked(moved, clips), transforms)
        return D(recolored.view(frames.shape), *of_clips)

    def geometry(x, transposed):
        return augment.resample(stacked(x, clips), transforms.geometry, transposed).view(x.shape)

    return r1_penalty(logits_of, geometry(frames, False), geometry)
