"""Similarity of an edited image to its source: SSIM (Wang et al. 2004), differentiable, without weights.

As a part of a weighted sum it keeps an edit from changing more than it was asked to.

Departures from the paper: 1. SSIM is averaged over the three colour channels, not computed on luminance; 2. borders
count, by windows that are cut at the edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import on_images
from diffalign.rewards.support.sources import source_images

WINDOW, SIGMA = 11, 1.5  # pixels
C1, C2 = 0.01**2, 0.03**2  # of values in [0, 1]


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Compute the mean SSIM of images (B, C, H, W) in [0, 1]: (B,)."""
    offset = torch.arange(WINDOW, dtype=one.dtype, device=one.device) - WINDOW // 2
    line = torch.exp(-(offset**2) / (2 * SIGMA**2))
    kernel = torch.outer(line, line)[None, None].expand(one.shape[1], 1, WINDOW, WINDOW)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=WINDOW // 2, groups=x.shape[1])

    weight = blur(torch.ones_like(one))

    mean, mean_other = blur(one) / weight, blur(other) / weight
    variance = blur(one * one) / weight - mean**2
    variance_other = blur(other * other) / weight - mean_other**2
    covariance = blur(one * other) / weight - mean * mean_other
    luminance = (2 * mean * mean_other + C1) / (mean**2 + mean_other**2 + C1)
    structure = (2 * covariance + C2) / (variance + variance_other + C2)
    return (luminance * structure).flatten(1).mean(1)


@register("source_similarity", RewardCard("SSIM with the source of an edit", 0.05, "Wang et al. 2004"))
@dataclass(frozen=True)
class SourceSimilarity:
    """Score edited images by their SSIM with the source image in each prompt's metadata, in [-1, 1]."""

    name: str
    differentiable: bool = True
    range: tuple[float, float] = (-1.0, 1.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        images = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        return ssim(images, source_images(metadata, (images.shape[-2], images.shape[-1])).to(images))
