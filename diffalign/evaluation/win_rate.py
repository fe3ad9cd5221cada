"""How often one model beats another on the same prompts and noise, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """rate: wins plus half of the ties, as a share of all pairs, averaged over prompts; counts are of image pairs."""

    rate: Interval
    wins: int
    ties: int
    losses: int


def win_rate(
    candidate: Tensor, baseline: Tensor, groups: Tensor, *, confidence: float = CONFIDENCE, seed: int = 0
) -> WinRate:
    """Compares image i of two models, drawn for the same prompt from the same noise.

    candidate, baseline: (N,) rewards, higher is better. groups: (N,) integers, the prompt of each image. Equal rewards
    tie and count half; a pair in which a reward is not finite counts nowhere. The interval is a bootstrap over prompts,
    because the images of one prompt are not independent.

    ValueError: lengths that differ, or no pair to count.
    """
    ours, theirs, labels = (t.detach().double().cpu().numpy() for t in (candidate, baseline, groups))
    if not len(ours) == len(theirs) == len(labels):
        raise ValueError(f"{len(ours)} and {len(theirs)} rewards for {len(labels)} prompts: pass one of each per image")
    usable = np.isfinite(ours) & np.isfinite(theirs)
    outcome = (1 + np.sign(ours - theirs)[usable]) / 2
    counts = [int((outcome == value).sum()) for value in (1, 0.5, 0)]
    return WinRate(_bootstrap(outcome, labels[usable], confidence, seed), *counts)


def mean_interval(values: Tensor, groups: Tensor, *, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """The mean of (N,) values, with a bootstrap interval over prompts; values that are not finite are left out.

    Each image that has a value counts alike, so that the mean is the one that logs and pictures show.

    ValueError: lengths that differ, or no finite value.
    """
    numbers, labels = (t.detach().double().cpu().numpy() for t in (values, groups))
    if len(numbers) != len(labels):
        raise ValueError(f"{len(numbers)} values for {len(labels)} prompts: pass one of each per image")
    usable = np.isfinite(numbers)
    return _bootstrap(numbers[usable], labels[usable], confidence, seed, by_image=True)


def _bootstrap(
    values: np.ndarray, labels: np.ndarray, confidence: float, seed: int, by_image: bool = False
) -> Interval:
    """Percentiles of the mean, over prompts or images, when prompts are drawn with replacement."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, got {confidence}; 0.95 is usual")
    if not len(values):
        raise ValueError("no finite reward to compare: look for warnings of the reward that failed")
    _, place, count = np.unique(labels, return_inverse=True, return_counts=True)
    # Prompts with fewer images weigh less where each image counts alike.
    weight = count / count.mean() if by_image else np.ones(len(count))
    per_prompt = np.bincount(place, values) / count
    # How often each prompt is drawn, all resamples at once.
    draws = np.random.default_rng(seed).multinomial(len(count), np.full(len(count), 1 / len(count)), RESAMPLES)
    means = draws @ (weight * per_prompt) / (draws @ weight)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = values.mean() if by_image else per_prompt.mean()
    return Interval(float(mean), float(low), float(high))
