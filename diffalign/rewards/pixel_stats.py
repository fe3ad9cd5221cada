"""Brightness and sharpness: rewards without weights, for first tests and as examples of custom rewards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from diffalign.rewards.base import FunctionReward, Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import on_images

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@on_images()
def brightness(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """Compute the mean luma, [0, 1]."""
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1).mean((1, 2))


@on_images()
def sharpness(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """Compute the mean squared luma difference of neighbouring pixels, [0, 2]; 0 for an image of one pixel."""
    luma = (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1)
    down, across = (luma.diff(dim=axis).square().flatten(1) for axis in (1, 2))
    return down.sum(1) / max(1, down.shape[1]) + across.sum(1) / max(1, across.shape[1])


register("brightness", RewardCard("mean luma", 0.1))(
    partial(FunctionReward, function=brightness, differentiable=True, range=(0.0, 1.0))
)
register("sharpness", RewardCard("mean square of luma's steps", 0.01))(
    partial(FunctionReward, function=sharpness, differentiable=True, range=(0.0, 2.0))
)
