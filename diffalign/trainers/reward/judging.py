"""Score the images of pairs with other judges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.rewards.support.images import from_pil
from diffalign.rollout.scoring import score
from diffalign.trainers.reward.data import JudgeData


def score_pairs(
    judges: Mapping[str, Reward], data: JudgeData, positions: Sequence[int], size: int, device: torch.device
) -> dict[str, Tensor]:
    """Return the margin of each judge on pairs: name -> (N,), float64, NaN where it failed.

    Args:
        judges: Rewards by name.
        data: The pairs.
        positions: Of the pairs, N.
        size: Pairs per call; those with images of one size are scored together.
        device: Of the images.
    """
    found = {name: torch.full((len(positions), 2), math.nan, dtype=torch.float64) for name in judges}
    waiting: dict[tuple[int, ...], list[tuple[int, int, Tensor]]] = {}  # shape -> (row, side, image)

    def flush(shape: tuple[int, ...]) -> None:
        rows, sides, images = zip(*waiting.pop(shape), strict=True)
        prompts = [data.pair(positions[row]).prompt for row in rows]
        scores = score(judges, torch.stack(images).to(device), prompts)
        for name in judges:
            found[name][list(rows), list(sides)] = scores[name].double()

    for row, position in enumerate(positions if judges else ()):
        _, images = data.load(position)
        for side, image in enumerate(images):
            pixels = from_pil(image)
            waiting.setdefault(tuple(pixels.shape), []).append((row, side, pixels))
        for shape in [shape for shape, held in waiting.items() if len(held) >= 2 * size]:
            flush(shape)
    for shape in list(waiting):
        flush(shape)
    return {name: both[:, 0] - both[:, 1] for name, both in found.items()}
