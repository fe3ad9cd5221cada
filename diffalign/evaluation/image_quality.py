"""Detect collapsed images (no contrast, all alike, noise) by comparison with the base model at equal seeds."""

from __future__ import annotations

import torch
from torch import Tensor

FLAT = 0.25  # of the base's contrast within an image
ALIKE = 0.25  # of the base's spread over images
NOISY = 3.0  # times the base's differences between neighbouring pixels


def contrast(images: Tensor) -> float:
    """Compute the standard deviation of the values of an image, averaged over images (B, 3, H, W)."""
    return images.flatten(1).std(1).mean().item()


def spread(images: Tensor) -> float:
    """Compute the standard deviation over images, averaged over pixels; 0 for a single image."""
    return images.std(0).mean().item() if len(images) > 1 else 0.0


def roughness(images: Tensor) -> float:
    """Compute the mean absolute difference between neighbouring pixels."""
    across, down = images.diff(dim=-1).abs().mean(), images.diff(dim=-2).abs().mean()
    return ((across + down) / 2).item()


def ruined(base: Tensor, tuned: Tensor) -> list[str]:
    """Describe each collapse of the tuned images; both (B, 3, H, W), from equal prompts and noise."""
    base, tuned = base.float(), torch.nan_to_num(tuned.float())
    found = []
    if contrast(tuned) < FLAT * contrast(base):
        found.append(f"images have lost their contrast: {contrast(tuned):.3f}, the base's have {contrast(base):.3f}")
    if spread(tuned) < ALIKE * spread(base):
        found.append(f"images are all alike: they spread by {spread(tuned):.3f}, the base's by {spread(base):.3f}")
    if roughness(tuned) > NOISY * roughness(base):
        found.append(f"images look like noise: roughness {roughness(tuned):.3f}, the base's {roughness(base):.3f}")
    return found
