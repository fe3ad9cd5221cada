"""Sharpness of a reward at an image: the drop after a small step down its gradient, large for hacked images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEP = 0.01  # RMS over the values of an image: 2.5 of 255 levels


def sharpness(score: Callable[[Tensor], Tensor], images: Tensor, step: float = STEP) -> Tensor:
    """Compute r(x) - r(x - step g), where g is grad r(x) scaled to an RMS of 1.

    A reward gained by adversarial pixel patterns is lost in such a small step. The mean over images falls as held-out
    quality rises (RSA-FT); compare it with the value for images of the base model.

    Args:
        score: Differentiable per-image reward, (B, 3, H, W) in [0, 1] to (B,).
        images: (B, 3, H, W), in [0, 1].
        step: RMS of the step, in pixel values.

    Returns:
        (B,), detached.

    Departures from the paper: 1. the step has the same RMS per pixel at any resolution; the paper fixes its norm.
    """
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        reward = score(x)
        (gradient,) = torch.autograd.grad(reward.sum(), x)
    size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    moved = images - step * gradient / torch.where(size > 0, size, 1)
    with torch.no_grad():
        return reward.detach() - score(moved.clamp(0, 1))
