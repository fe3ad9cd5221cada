"""Agreement between raters: Cohen's kappa of two, Krippendorff's alpha of any number with missing answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Measure the agreement of two raters beyond chance (Cohen 1960): 1 is perfect, 0 chance.

    Args:
        first: Answers of one rater.
        second: Answers of the other about the same items.

    Returns:
        Kappa; NaN without items, or where both raters gave one and the same answer throughout.

    Raises:
        ValueError: The numbers of answers differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} answers: pass one of each rater per item")
    count = len(first)
    if not count:
        return math.nan
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    ours, theirs = Counter(first), Counter(second)
    chance = sum(ours[value] * theirs[value] for value in ours) / count**2
    return math.nan if chance == 1 else (observed - chance) / (1 - chance)


def krippendorff_alpha(items: Sequence[Sequence[Hashable]]) -> float:
    """Measure the agreement of several raters about nominal answers (Krippendorff 2004): 1 is perfect, 0 chance.

    alpha = 1 - observed disagreement / expected disagreement, over pairs of answers about one item.

    Args:
        items: The answers to each item, from any number of raters; items with fewer than two do not count.

    Returns:
        Alpha; NaN without an item of two answers, or where all answers are the same.
    """
    usable = [Counter(answers) for answers in items if len(answers) > 1]
    totals: Counter[Hashable] = Counter()
    observed = 0.0
    for answers in usable:
        totals += answers
        size = answers.total()
        observed += (size**2 - sum(n * n for n in answers.values())) / (size - 1)
    count = totals.total()
    expected = (count**2 - sum(n * n for n in totals.values())) / max(count - 1, 1)
    return 1 - observed / expected if expected else math.nan


def pairwise_kappa(answers: Mapping[str, Mapping[str, Hashable]]) -> dict[tuple[str, str], tuple[float, int]]:
    """Compute Cohen's kappa of every two raters with items in common.

    Args:
        answers: Rater -> item -> answer.

    Returns:
        (rater, rater) -> (kappa, number of common items).
    """
    found = {}
    for first, second in combinations(answers, 2):
        common = [item for item in answers[first] if item in answers[second]]
        if common:
            ours, theirs = ([answers[rater][item] for item in common] for rater in (first, second))
            found[first, second] = (cohen_kappa(ours, theirs), len(common))
    return found
