"""Diversity of the images of one prompt: reward hacking shows as its collapse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pairwise_distance(images: Tensor, groups: Tensor) -> float:
    """mean over groups of mean over pairs i < j of sqrt(mean_d (x_i - x_j)^2), d over the 3 H W values of an image.

    images: (N, 3, H, W), [0, 1]. groups: (N,) integers, the prompt of each image. The result is in pixel values: 0 when
    all images of a prompt are equal, 1 for black against white. A group with one image has no pair and is left out.

    ValueError: lengths that differ, or no group with two images.
    """
    flat = images.detach().flatten(1).double()
    return _mean_over_groups(flat, groups, torch.pdist) / flat.shape[1] ** 0.5


def embedding_distance(embeddings: Tensor, groups: Tensor) -> float:
    """mean over groups of mean over pairs i < j of 1 - cos(e_i, e_j), in [0, 2].

    embeddings: (N, D), of any model of images. groups: (N,) integers, the prompt of each image. A group with one image
    has no pair and is left out.

    ValueError: lengths that differ, or no group with two images.
    """
    unit = torch.nn.functional.normalize(embeddings.detach().double(), dim=1)
    # |a - b|^2 = 2 (1 - cos) between unit vectors.
    return _mean_over_groups(unit, groups, lambda rows: torch.pdist(rows).square() / 2)


def _mean_over_groups(rows: Tensor, groups: Tensor, distances: Callable[[Tensor], Tensor]) -> float:
    """The mean over groups of the mean of ``distances`` between the rows of a group."""
    if len(rows) != len(groups):
        raise ValueError(f"{len(rows)} images for {len(groups)} group ids: pass one id per image")
    members = [rows[groups == group] for group in groups.unique()]
    found = [distances(own).mean() for own in members if len(own) > 1]
    if not found:
        raise ValueError("no prompt has two images: draw at least two per prompt to measure diversity")
    return float(torch.stack(found).mean())
