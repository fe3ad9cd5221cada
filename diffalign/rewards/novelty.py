"""How far an image is from the others of its group: the diversity of GARDO (arXiv 2512.24138).

    d_i = min over the other images j of the group of 1 - cos(e_i, e_j)

with e the embedding of a vision model, DINOv3 in the released code, or the pixels. ``advantage_diversity: novelty``
multiplies positive advantages by d_i / mean of the group's d, so that good images that differ from the others count
more. Give it the weight 0 for that; with another weight it is a reward of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from diffalign.device import to_float64
from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.embedding import ImageEmbedder
from diffalign.rewards.support.preprocess import check_images

CARD = RewardCard("distance to the nearest image of its group", 0.05, "arXiv 2512.24138")


def nearest_distance(vectors: Tensor, groups: Tensor) -> Tensor:
    """Compute the cosine distance of each vector to the nearest other one of its group: (N,), in [0, 2].

    Args:
        vectors: (N, D).
        groups: (N,) integers; a vector alone in its group has distance 0.
    """
    unit = torch.nn.functional.normalize(to_float64(vectors), dim=1)
    found = unit.new_zeros(len(unit))
    for label in groups.unique().tolist():
        rows = (groups == label).nonzero().flatten().to(unit.device)
        if len(rows) > 1:
            distance = 1 - (unit[rows] @ unit[rows].T).clamp(-1, 1)
            found[rows] = distance.fill_diagonal_(torch.inf).amin(1)
    return found


def _pixels(images: Tensor) -> Tensor:
    return (images.float() * 2 - 1).flatten(1)


@cache
def _embedder(path: str, device: torch.device) -> ImageEmbedder:
    return ImageEmbedder(path, device)


@register("novelty", CARD)  # type: ignore[arg-type]  # it takes groups as well
@dataclass(frozen=True)
class Novelty:
    """Score images by their distance to the nearest other image of their group, in [0, 2]. A group reward.

    path: folder or hub id of a vision model (DINOv2, DINOv3, CLIP, ...), which loads at first use; None compares
        pixels, as values in [-1, 1].
    """

    name: str
    path: str | None = None
    differentiable: bool = False
    needs_groups: bool = True
    range: tuple[float, float] = (0.0, 2.0)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata, groups: Tensor) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1], in groups (B,): (B,) float32, NaN where an image is not finite."""
        check_images(images)
        finite = images.isfinite().flatten(1).all(1).cpu()
        usable = images[finite.to(images.device)]
        embed = _pixels if self.path is None else _embedder(self.path, images.device)
        vectors = embed(usable)
        found = torch.full((len(images),), torch.nan)
        found[finite] = nearest_distance(vectors, groups.cpu()[finite]).float().cpu()
        return found
