"""Whether a training has ruined its images: all grey, all alike, or noise. ScoredImages on the seeds of the base."""

from __future__ import annotations

import torch
from torch import Tensor

FLAT = 0.25  # of the base's contrast within an image
ALIKE = 0.25  # of the base's spread over images
NOISY = 3.0  # times the base's differences between neighbouring pixels


def contrast(images: Tensor) -> float:
    """The standard deviation of an image's pixels, mean over images (B, 3, H, W)."""
    return images.flatten(1).std(1).mean().item()


def spread(images: Tensor) -> float:
    """The standard deviation of a pixel over images, mean over pixels; 0 for a single one."""
    return images.std(0).mean().item() if len(images) > 1 else 0.0


def roughness(images: Tensor) -> float:
    """The mean difference between neighbouring pixels."""
    across, down = images.diff(dim=-1).abs().mean(), images.diff(dim=-2).abs().mean()
    return ((across + down) / 2).item()


def ruined(base: Tensor, tuned: Tensor) -> list[str]:
    """What is wrong with the images of a tuned model, a line each; (B, 3, H, W), of the same prompts and noise."""
    base, tuned = base.float(), torch.nan_to_num(tuned.float())
    found = []
    if contrast(tuned) < FLAT * contrast(base):
        found.append(f"images have lost their contrast: {contrast(tuned):.3f}, the base's have {contrast(base):.3f}")
    if spread(tuned) < ALIKE * spread(base):
        found.append(f"images are all alike: they spread by {spread(tuned):.3f}, the base's by {spread(base):.3f}")
    if roughness(tuned) > NOISY * roughness(base):
        found.append(f"images look like noise: roughness {roughness(tuned):.3f}, the base's {roughness(base):.3f}")
    return found
