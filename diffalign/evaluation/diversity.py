"""Diversity among images of one prompt; it collapses under reward hacking."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffalign.device import to_float64


def pairwise_distance(images: Tensor, groups: Tensor) -> float:
    """Compute mean_groups mean_{i<j} sqrt(mean_d (x_i - x_j)^2), d over the 3 H W values of an image.

    Args:
        images: (N, 3, H, W), in [0, 1].
        groups: (N,) integers, the prompt of each image. A group with one image is left out.

    Returns:
        RMS pixel distance: 0 if all images of each prompt are equal, 1 for black against white.

    Raises:
        ValueError: Lengths differ, or no group has two images.
    """
    flat = to_float64(images.detach().flatten(1))
    return _mean_over_groups(flat, groups, torch.pdist) / flat.shape[1] ** 0.5


def embedding_distance(embeddings: Tensor, groups: Tensor) -> float:
    """Compute mean_groups mean_{i<j} 1 - cos(e_i, e_j), in [0, 2].

    Args:
        embeddings: (N, D) image embeddings.
        groups: (N,) integers, the prompt of each image. A group with one image is left out.

    Raises:
        ValueError: Lengths differ, or no group has two images.
    """
    unit = torch.nn.functional.normalize(to_float64(embeddings.detach()), dim=1)
    # |a - b|^2 = 2 (1 - cos) between unit vectors.
    return _mean_over_groups(unit, groups, lambda rows: torch.pdist(rows).square() / 2)


def _mean_over_groups(rows: Tensor, groups: Tensor, distances: Callable[[Tensor], Tensor]) -> float:
    """Average ``distances`` within each group, then over groups."""
    if len(rows) != len(groups):
        raise ValueError(f"{len(rows)} images for {len(groups)} group ids: pass one id per image")
    groups = groups.to(rows.device)
    rows_by_group = [rows[groups == group] for group in groups.unique()]
    means = [distances(own).mean() for own in rows_by_group if len(own) > 1]
    if not means:
        raise ValueError("no prompt has two images: sample at least two per prompt to measure diversity")
    return float(torch.stack(means).mean())
