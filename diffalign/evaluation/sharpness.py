"""How sharp a reward is at an image: a hacked one falls at once when the image moves a little."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEP = 0.01  # root mean square over an image's values: 2.5 of 255 levels


def sharpness(score: Callable[[Tensor], Tensor], images: Tensor, step: float = STEP) -> Tensor:
    """r(x) - r(x - step g), with g = grad r(x) at a root mean square of 1: (B,), a constant.

    Reward that a model found in the images, and not in what they show, is lost in so small a step. The mean over images
    falls as held-out quality rises (RSA-FT); compare it with that of the base model's images.

    score: images (B, 3, H, W), [0, 1], to (B,), differentiable, each by itself. images: of that kind, moved too.

    Departures from the paper: 1. the step is as long per pixel at any resolution, where the paper fixes the norm of an
    image's step.
    """
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        found = score(x)
        (gradient,) = torch.autograd.grad(found.sum(), x)
    size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    moved = images - step * gradient / torch.where(size > 0, size, 1)
    with torch.no_grad():
        return found.detach() - score(moved.clamp(0, 1))
