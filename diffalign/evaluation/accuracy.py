"""Accuracy of generated images, overall and per task."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def summarise(strict: Sequence[bool] | Tensor, tags: Sequence[str]) -> dict[str, float]:
    """Return the mean score over all images as "accuracy", and per task as "accuracy/<tag>".

    Args:
        strict: One score per image, 0 or 1 for a verifier; NaN for a failed image, which is left out.
        tags: Task of each image. Keys of the result follow their first occurrence.

    Returns:
        Means over images, not over tasks; NaN where no image has a score.

    Raises:
        ValueError: No image, or lengths differ.
    """
    scores = [float(value) for value in strict]
    if not scores or len(scores) != len(tags):
        raise ValueError(f"{len(scores)} scores for {len(tags)} tags: pass one tag per image, and at least one image")
    result = {"accuracy": _mean(scores)}
    for tag in dict.fromkeys(tags):
        own = [value for value, other in zip(scores, tags, strict=True) if other == tag]
        result[f"accuracy/{tag}"] = _mean(own)
    return result


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
