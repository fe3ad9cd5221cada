"""Calibration of a judge of pairs: how often it is right where it is p sure (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 5  # of confidences in [0.5, 1]


@dataclass(frozen=True)
class Bin:
    """The pairs whose confidence lies in [low, high).

    Attributes:
        low: Lowest confidence.
        high: Highest confidence; the last bin includes it.
        pairs: Number of pairs.
        confidence: Their mean confidence; NaN without pairs.
        accuracy: Share of them that the judge is right about; NaN without pairs.
    """

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


def reliability(probability: np.ndarray, label: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Sort pairs into bins of equal width by confidence, max(p, 1 - p).

    Args:
        probability: (N,), that the first image is preferred, by the judge.
        label: (N,), in [0, 1], by raters; a label that is no choice counts as a share of one.
        bins: Number of bins.

    Raises:
        ValueError: Lengths differ.
    """
    if len(probability) != len(label):
        raise ValueError(f"{len(probability)} probabilities for {len(label)} labels: pass one of each per pair")
    confidence = np.maximum(probability, 1 - probability)
    right = np.where(probability >= 0.5, label, 1 - label)
    edges = np.linspace(0.5, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    found = []
    for number in range(bins):
        own = place == number
        means = (confidence[own].mean(), right[own].mean()) if own.any() else (np.nan, np.nan)
        found.append(Bin(float(edges[number]), float(edges[number + 1]), int(own.sum()), *map(float, means)))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error: the mean over pairs of |accuracy - confidence| of their bin."""
    total = sum(one.pairs for one in bins)
    if not total:
        return float("nan")
    return sum(one.pairs * abs(one.accuracy - one.confidence) for one in bins if one.pairs) / total
