"""Accuracy of generated images, overall and per task."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def summarise(strict: Sequence[bool] | Tensor, tags: Sequence[str]) -> dict[str, float]:
    """Return ``{"accuracy": share of right images, "accuracy/<tag>": the same among those of one task}``, in [0, 1].

    strict, tags: one entry per image; tags appear in the order in which they are first met. The overall number is the
    mean over images, not over tasks. Images without a verdict (NaN) are left out; NaN where none has one.

    ValueError: nothing to count, or lengths that differ.
    """
    right = [float(value) for value in strict]
    if not right or len(right) != len(tags):
        raise ValueError(f"{len(right)} verdicts for {len(tags)} tags: pass one tag per image, and at least one image")
    result = {"accuracy": _mean(right)}
    for tag in dict.fromkeys(tags):
        own = [value for value, other in zip(right, tags, strict=True) if other == tag]
        result[f"accuracy/{tag}"] = _mean(own)
    return result


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
