"""Losses as functions of logits, scores and frames (spec §5 and §8, paper 3.4)."""

import torch
import torch.nn.functional as F


def generator_loss(fake_logits):
    """Non-saturating logistic loss: mean softplus(−D(fake))."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits, fake_logits):
    """Logistic loss: mean softplus(−D(real)) + mean softplus(D(fake))."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(logits_of, frames):
    """Σ (∂logit/∂frame)² per frame, averaged over the frames of a clip and over clips; times γ/2 it is R1.

    logits_of: function of frames [N, 3, H, W] → logits [B]; differentiable with respect to its own parameters.
    """
    if not frames.requires_grad:
        frames = frames.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(logits_of(frames).sum(), frames, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def diversity(scores, num_ws):
    """Motion diversity (Eq. 3): Σ over layers of the mean squared entry of the scores' Gram matrix, / num_ws.

    scores: one [N, O, K] per MoStAtt layer. Rows, one per frame and style, are divided by their detached norm; the
    Gram matrix is of all N·K rows of the batch, diagonal included. ‖R Rᵀ‖² = ‖Rᵀ R‖², so the smaller product is taken.
    """
    total = 0.0
    for score in scores:
        rows = score.float() if score.dtype in (torch.bfloat16, torch.float16) else score
        rows = rows.transpose(1, 2).flatten(0, 1)  # [N·K, O]
        rows = rows / (rows.detach().norm(dim=1, keepdim=True) + 1e-6)
        gram = rows @ rows.t() if rows.shape[0] <= rows.shape[1] else rows.t() @ rows
        total = total + gram.square().sum() / rows.shape[0] ** 2
    return total / num_ws
