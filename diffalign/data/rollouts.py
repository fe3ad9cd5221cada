"""Preference pairs from images that were scored: rollout buffers on disk, or in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from diffalign.files import some

# What a line of a buffer's metadata.jsonl must hold.
LINE: dict[str, Any] = {"file_name": str, "group": int, "sample": int, "rewards": Mapping}


def _best_and_worst(ranked: Sequence[int]) -> list[tuple[int, int]]:
    return [(ranked[0], ranked[-1])] if len(ranked) > 1 else []


def _all(ranked: Sequence[int]) -> list[tuple[int, int]]:
    return list(combinations(ranked, 2))


# From the places of a group, best first, to pairs (better, worse).
PAIRINGS: dict[str, Callable[[Sequence[int]], list[tuple[int, int]]]] = {"best_worst": _best_and_worst, "all": _all}


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """How scored images of one prompt become pairs.

    rule: "best_worst", one pair per group, or "all", each two images of a group. rewards: names and weights of what
    counts; empty: the only reward there is. min_gap: scores must differ by more than this, so that 0 drops ties.
    scale: labels are sigmoid(scale times the gap); None: they are 1.
    """

    rule: str = field(default="best_worst", metadata={"help": "best_worst, or all: each two images of a group"})
    rewards: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "names and weights of what counts; default: the only reward",
            "bare": 1.0,
            "range": {"infinite": False},
        },
    )
    min_gap: float = field(
        default=0.0, metadata={"help": "scores must differ by more than this; 0 drops ties", "range": {"ge": 0}}
    )
    scale: float | None = field(
        default=None, metadata={"help": "labels are sigmoid(scale * gap); null: they are 1", "range": {"gt": 0}}
    )

    def __post_init__(self) -> None:
        """ValueError: an unknown rule, or a negative gap or scale."""
        if self.rule not in PAIRINGS:
            raise ValueError(f"unknown rule {self.rule!r}; known: {', '.join(PAIRINGS)}")
        if self.min_gap < 0 or (self.scale is not None and self.scale <= 0):
            raise ValueError(f"min_gap {self.min_gap} must not be negative, and scale {self.scale} must be positive")

    def label(self, gap: float) -> float:
        """The probability that the better image is preferred."""
        return 1.0 if self.scale is None else 1 / (1 + math.exp(-self.scale * gap))


def pick_pairs(groups: Sequence[int], scores: Sequence[float | None], pairing: Pairing) -> list[tuple[int, int]]:
    """Pairs (better, worse) of places whose groups are equal and whose scores differ enough.

    Groups come in the order of their numbers, pairs of "all" by their places in the ranking; equal scores rank by
    place. Places without a score (None or NaN) are left out.
    """
    return [(better, worse) for better, worse, _ in _pairs_with_gaps(groups, scores, pairing)]


def _pairs_with_gaps(
    groups: Sequence[int], scores: Sequence[float | None], pairing: Pairing
) -> list[tuple[int, int, float]]:
    known = {place: score for place, score in enumerate(scores) if score is not None and not math.isnan(score)}
    members: dict[int, list[int]] = {}
    for place, (group, _) in enumerate(zip(groups, scores, strict=True)):
        if place in known:
            members.setdefault(group, []).append(place)
    return [
        (better, worse, gap)
        for group in sorted(members)
        for better, worse in PAIRINGS[pairing.rule](sorted(members[group], key=lambda i: (-known[i], i)))
        if (gap := known[better] - known[worse]) > pairing.min_gap
    ]


def rollout_pairs(rows: Iterable[Mapping[str, Any]], pairing: Pairing, where: str = "rollouts") -> list[dict[str, Any]]:
    """Rows of the format ``pairs`` from the lines of a buffer's ``metadata.jsonl``: see ``RolloutBuffer.save``.

    Lines hold file_name, prompt, group, sample, rewards and metadata. Images of a pair are paths as in file_name.
    ValueError: a reward that the lines do not have, or several and none named.
    """
    lines = list(rows)
    for number, line in enumerate(lines, start=1):
        wrong = [name for name, kind in LINE.items() if not isinstance(line.get(name), kind)]
        if wrong:
            raise ValueError(f"{where}: line {number} of its metadata has no {wrong[0]}; is it a rollout buffer's?")
    weights = _weights(lines, pairing.rewards, where)
    scores = [_score(line["rewards"], weights) for line in lines]
    found = []
    for better, worse, gap in _pairs_with_gaps([line["group"] for line in lines], scores, pairing):
        first, second = lines[better], lines[worse]
        found.append(
            {
                "name": f"group {first['group']}, samples {first['sample']} and {second['sample']}",
                "image_0": Path(first["file_name"]),
                "image_1": Path(second["file_name"]),
                "prompt": first.get("prompt"),
                "metadata": first.get("metadata"),
                "label": pairing.label(gap),
            }
        )
    return found


def _weights(lines: Sequence[Mapping[str, Any]], asked: Mapping[str, float], where: str) -> Mapping[str, float]:
    known = list(dict.fromkeys(name for line in lines for name in line["rewards"]))
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"{where} has no reward {some(unknown)}; it has {some(known, 20)}")
    if not asked and len(known) != 1:
        names = some(known, 20) or "(none)"
        raise ValueError(f"{where} has the rewards {names}: name those that count in rollouts.rewards")
    return asked or {known[0]: 1.0}


def _score(rewards: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    known = {name: value for name in weights if (value := rewards.get(name)) is not None}
    return sum(weights[name] * value for name, value in known.items()) if len(known) == len(weights) else None
