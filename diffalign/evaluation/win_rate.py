"""Win rates and means with bootstrap confidence intervals over prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """Win rate, wins plus half of the ties per pair averaged over prompts, and counts of image pairs."""

    rate: Interval
    wins: int
    ties: int
    losses: int


def win_rate(
    candidate: Tensor, baseline: Tensor, groups: Tensor, *, confidence: float = CONFIDENCE, seed: int = 0
) -> WinRate:
    """Compare image i of two models, sampled for the same prompt from the same noise.

    Equal rewards tie and count half; pairs with a non-finite reward are left out. The interval is a bootstrap over
    prompts, because images of one prompt are not independent.

    Args:
        candidate: (N,) rewards, higher is better.
        baseline: (N,) rewards of the other model.
        groups: (N,) integers, the prompt of each image.
        confidence: Level of the interval, in (0, 1).
        seed: Seed of the bootstrap.

    Raises:
        ValueError: Lengths differ, or no pair is finite.
    """
    ours, theirs, labels = (t.detach().double().cpu().numpy() for t in (candidate, baseline, groups))
    if not len(ours) == len(theirs) == len(labels):
        raise ValueError(f"{len(ours)} and {len(theirs)} rewards for {len(labels)} prompts: pass one of each per image")
    usable = np.isfinite(ours) & np.isfinite(theirs)
    outcome = (1 + np.sign(ours - theirs)[usable]) / 2
    return rate_of_outcomes(outcome, labels[usable], confidence=confidence, seed=seed)


def rate_of_outcomes(
    outcome: np.ndarray, groups: np.ndarray, *, confidence: float = CONFIDENCE, seed: int = 0
) -> WinRate:
    """Average N outcomes (1 win, 0.5 tie, 0 loss), as ``win_rate``; groups: (N,) integers, the prompt of each."""
    counts = [int((outcome == value).sum()) for value in (1, 0.5, 0)]
    return WinRate(_bootstrap(outcome, groups, confidence, seed), *counts)


def mean_interval(values: Tensor, groups: Tensor, *, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """Average the finite ones of (N,) values over images, with a bootstrap interval over prompts.

    Images, not prompts, have equal weight: the mean equals the one in logs and grids.

    Raises:
        ValueError: Lengths differ, or no value is finite.
    """
    numbers, labels = (t.detach().double().cpu().numpy() for t in (values, groups))
    if len(numbers) != len(labels):
        raise ValueError(f"{len(numbers)} values for {len(labels)} prompts: pass one of each per image")
    usable = np.isfinite(numbers)
    return _bootstrap(numbers[usable], labels[usable], confidence, seed, by_image=True)


def _bootstrap(
    values: np.ndarray, labels: np.ndarray, confidence: float, seed: int, by_image: bool = False
) -> Interval:
    """Compute percentiles of the mean when prompts are resampled with replacement."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}; 0.95 is usual")
    if not len(values):
        raise ValueError("no finite reward to compare: see the warnings of the failed reward")
    _, prompt_index, count = np.unique(labels, return_inverse=True, return_counts=True)
    # equal weight per image: prompts with fewer images weigh less
    weight = count / count.mean() if by_image else np.ones(len(count))
    per_prompt = np.bincount(prompt_index, values) / count
    # (RESAMPLES, prompts): how often each prompt is drawn
    draws = np.random.default_rng(seed).multinomial(len(count), np.full(len(count), 1 / len(count)), RESAMPLES)
    means = draws @ (weight * per_prompt) / (draws @ weight)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = values.mean() if by_image else per_prompt.mean()
    return Interval(float(mean), float(low), float(high))
