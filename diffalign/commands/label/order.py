"""Which pair a rater sees next: at random, by the disagreement of rewards, or by what it says about the models.

To add an order, write a class with ``next`` and an entry in ``ORDERS``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import Protocol

import numpy as np

from diffalign.commands.label.answers import Answer
from diffalign.commands.label.comparison import Comparison
from diffalign.evaluation.bradley_terry import information


class Order(Protocol):
    """A rule that chooses the next pair."""

    def next(self, rater: str, is_open: Callable[[int], bool], answers: Callable[[], Sequence[Answer]]) -> int | None:
        """Return the index of the next pair for which ``is_open`` holds; None if there is none."""


class Random:
    """Show the pairs in a random order, another one for each rater."""

    def __init__(self, pairs: Sequence[Comparison], seed: int) -> None:
        self.count, self.seed = len(pairs), seed
        self._shuffled: dict[str, list[int]] = {}

    def next(self, rater: str, is_open: Callable[[int], bool], answers: Callable[[], Sequence[Answer]]) -> int | None:
        """Return the first open pair of the rater's order."""
        if rater not in self._shuffled:
            order = list(range(self.count))
            random.Random(f"{self.seed} {rater}").shuffle(order)
            self._shuffled[rater] = order
        return next(filter(is_open, self._shuffled[rater]), None)


class Given:
    """Show the pairs in the order of their sources, the same for every rater."""

    def __init__(self, pairs: Sequence[Comparison], seed: int) -> None:
        self.count = len(pairs)

    def next(self, rater: str, is_open: Callable[[int], bool], answers: Callable[[], Sequence[Answer]]) -> int | None:
        """Return the first open pair."""
        return next(filter(is_open, range(self.count)), None)


class Disagreement:
    """Show first the pairs that the rewards disagree on; with one reward, those that it can hardly tell apart."""

    def __init__(self, pairs: Sequence[Comparison], seed: int) -> None:
        names = {name: None for pair in pairs for name in pair.scores}
        if not names:
            raise ValueError("order disagreement needs rewards: write --rewards pickscore,hpsv2.1, or --order random")
        hardness = disagreement({name: [pair.gap(name) for pair in pairs] for name in names})
        ties = random.Random(seed).sample(range(len(pairs)), len(pairs))
        self.order = sorted(range(len(pairs)), key=lambda index: (-hardness[index], ties[index]))

    def next(self, rater: str, is_open: Callable[[int], bool], answers: Callable[[], Sequence[Answer]]) -> int | None:
        """Return the hardest open pair."""
        return next(filter(is_open, self.order), None)


def disagreement(gaps: Mapping[str, Sequence[float | None]]) -> list[float]:
    """Return how much several rewards disagree about each pair; -|gap| for a single one.

    Gaps are divided by their root mean square, so that the unit of a reward does not count. The disagreement is their
    variance over rewards, and minus infinity where fewer than two (or the only one) scored the pair.

    Args:
        gaps: Reward -> difference of scores of each pair, None where it failed.
    """
    table = np.array([[np.nan if gap is None else gap for gap in column] for column in gaps.values()], float)
    scale = np.sqrt(np.nanmean(np.where(np.isnan(table).all(1, keepdims=True), 1, table) ** 2, axis=1, keepdims=True))
    table = table / np.where(scale > 0, scale, 1)
    known = (~np.isnan(table)).sum(0)
    filled = np.nan_to_num(table)
    if len(table) == 1:
        found = np.where(known, -np.abs(filled[0]), -np.inf)
    else:
        mean = filled.sum(0) / np.maximum(known, 1)
        found = np.where(known > 1, (filled**2).sum(0) / np.maximum(known, 1) - mean**2, -np.inf)
    return [float(value) for value in found]


class Ranking:
    """Show the two models whose comparison says most about the ranking of all, on a random prompt."""

    def __init__(self, pairs: Sequence[Comparison], seed: int) -> None:
        names = sorted({name for pair in pairs if pair.ranks_models for name in pair.models})
        if len(names) < 2:
            raise ValueError(
                "order ranking compares two or more models: name them, as in diffalign label runs/a runs/b, or write "
                "--order random"
            )
        self.places = {name: place for place, name in enumerate(names)}
        self.random = Random(pairs, seed)
        self.models = [pair.models if pair.ranks_models else None for pair in pairs]
        self.pairings = {pairing for pairing in permutations(names, 2) if pairing in {*self.models}}

    def next(self, rater: str, is_open: Callable[[int], bool], answers: Callable[[], Sequence[Answer]]) -> int | None:
        """Return an open pair of the two most informative models; other pairs come last."""
        gain = information(count_wins(answers(), self.places))
        ranked = sorted(self.pairings, key=lambda p: (-round(gain[self.places[p[0]], self.places[p[1]]], 9), p))
        found = (self._of(pairing, rater, is_open, answers) for pairing in ranked)
        best = next((index for index in found if index is not None), None)
        return self.random.next(rater, is_open, answers) if best is None else best

    def _of(
        self,
        pairing: tuple[str, ...],
        rater: str,
        is_open: Callable[[int], bool],
        answers: Callable[[], Sequence[Answer]],
    ) -> int | None:
        return self.random.next(rater, lambda i: self.models[i] == pairing and is_open(i), answers)


def count_wins(answers: Sequence[Answer], places: Mapping[str, int]) -> np.ndarray:
    """Count (M, M) wins of models over models; a tie is half a win for both.

    Args:
        answers: Answers; those about other models, or of one model with itself, do not count.
        places: Row of each model.
    """
    wins = np.zeros((len(places), len(places)))
    for answer in answers:
        first, second = (places.get(model) for model in answer.models)
        if answer.value is not None and first is not None and second is not None and first != second:
            wins[first, second] += answer.value
            wins[second, first] += 1 - answer.value
    return wins


ORDERS: dict[str, Callable[[Sequence[Comparison], int], Order]] = {
    "random": Random,
    "given": Given,
    "disagreement": Disagreement,
    "ranking": Ranking,
}
