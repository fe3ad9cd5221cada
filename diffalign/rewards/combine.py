"""Several rewards as one: what each is worth on the base model, and a rule that joins them.

A ``Calibration`` holds what the base model's images score, so that rewards of different units can be compared. It is
measured once (``calibrate``) and stored as JSON. A rule is a function of the calibrated scores, R rewards times B
images, and every rule is an entry of ``RULES``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.atomic import write_text
from diffalign.config import from_dict
from diffalign.files import read_text
from diffalign.rewards.base import Metadata, Reward, RewardCard, ask, needs_groups, register
from diffalign.rewards.config import RewardConfig, build_rewards

QUANTILES = 101
MAX_TABLE_BYTES = 64 << 20  # bytes of stored calibrations that are read
TIED = 4  # units in the last place by which equal scores may differ


@dataclass(frozen=True)
class Calibration:
    """Scores of one reward on the base model: mean, population deviation, and quantiles from lowest to highest."""

    mean: float
    std: float
    quantiles: tuple[float, ...]

    def standardise(self, values: Tensor) -> Tensor:
        """(values - mean) / std: 0 is an average image of the base, 1 a deviation better."""
        return (values - self.mean) / self.std

    def rank(self, values: Tensor) -> Tensor:
        """The share of the base's images that score lower, in [0, 1]; linear between quantiles, and so is its slope."""
        knots = values.new_tensor(self.quantiles)
        right = torch.searchsorted(knots, values.detach().contiguous()).clamp(1, len(knots) - 1)
        low, high = knots[right - 1], knots[right]
        slope = (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
        part = torch.where(high > low, slope, 0.5 + 0.5 * (values - low).sign())
        return (right - 1 + part.clamp(0, 1)) / (len(knots) - 1)


def calibrate(values: Tensor) -> Calibration:
    """Measure scores (N,) of the base model's images; those that are not finite do not count.

    ValueError: fewer than two finite scores, or all the same up to float32's rounding.
    """
    values = values[values.isfinite()].double()
    rounding = TIED * torch.finfo(torch.float32).eps
    if len(values) < 2 or values.max() - values.min() <= rounding * values.abs().max():
        raise ValueError(f"{len(values)} finite scores that do not differ calibrate nothing: score more images")
    quantiles = values.quantile(torch.linspace(0, 1, QUANTILES, dtype=torch.float64))
    return Calibration(values.mean().item(), values.std(correction=0).item(), tuple(quantiles.tolist()))


def save_calibrations(path: Path, calibrations: Mapping[str, Calibration]) -> None:
    """Writes reward -> calibration as JSON."""
    table = {name: vars(calibration) for name, calibration in calibrations.items()}
    write_text(path, json.dumps(table, indent=2) + "\n")


def load_calibrations(path: Path) -> dict[str, Calibration]:
    """What ``save_calibrations`` wrote. ValueError naming the file where it is something else."""
    try:
        table = json.loads(read_text(path, MAX_TABLE_BYTES))
        return {n: Calibration(c["mean"], c["std"], tuple(c["quantiles"])) for n, c in table.items()}
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no calibrations ({str(error)[:300]}): write one with save_calibrations"
        ) from error


Rule = Callable[[Tensor, Tensor, float], Tensor]


def weighted_sum(scores: Tensor, weights: Tensor, k: float) -> Tensor:
    """Sum over rewards of weight times score."""
    return (weights[:, None] * scores).sum(0)


def soft_and(scores: Tensor, weights: Tensor, k: float) -> Tensor:
    """Sum over rewards of weight times log sigmoid(score): no reward makes up for one that is far below the base."""
    return (weights[:, None] * F.logsigmoid(scores)).sum(0)


def pessimistic(scores: Tensor, weights: Tensor, k: float) -> Tensor:
    """Return the weighted mean minus k weighted deviations: judges that disagree lower the score.

    Judges whose scores are equal up to their rounding have a deviation of 0 and no slope from it.
    """
    share = (weights / weights.sum()).double()[:, None]
    wide = scores.double()
    mean = (share * wide).sum(0)
    variance = (share * (wide - mean).square()).sum(0)

    rounding = TIED * torch.finfo(scores.dtype).eps * wide.detach().abs().amax(0)
    differ = variance.detach() > rounding.square()
    # The root has no slope at 0, where all judges agree.
    return (mean - k * torch.where(differ, variance, 1.0).sqrt() * differ).to(scores)


def minimum(scores: Tensor, weights: Tensor, k: float) -> Tensor:
    """The lowest score of an image; all weights are 1."""
    return scores.min(0).values


RULES: dict[str, Rule] = {
    "weighted_sum": weighted_sum,
    "soft_and": soft_and,
    "pessimistic": pessimistic,
    "minimum": minimum,
}
SCALES: dict[str, Callable[[Calibration, Tensor], Tensor]] = {
    "raw": lambda calibration, values: values,
    "standardised": Calibration.standardise,
    "rank": Calibration.rank,
}


@dataclass(frozen=True)
class Combined:
    """Rewards joined by a rule; itself a reward.

    rewards: by name, with a weight each, positive. rule: a key of ``RULES``. scale: "raw", "standardised" or "rank" of
    ``calibrations``, by the names of ``rewards``. k: of the rule "pessimistic".

    An image on which one reward fails has no score; extras are left out. ValueError: unknown rule or scale, no reward,
    a weight that is not positive, or not 1 under "minimum", a reward without calibration.
    """

    name: str
    rewards: Mapping[str, tuple[Reward, float]]
    rule: str = "weighted_sum"
    scale: str = "raw"
    calibrations: Mapping[str, Calibration] | None = None
    k: float = 1.0

    def __post_init__(self) -> None:
        """Checks that need no image."""
        for value, known in ((self.rule, RULES), (self.scale, SCALES)):
            if value not in known:
                raise ValueError(f"reward {self.name!r}: {value!r} is none of {', '.join(known)}")
        if not self.rewards:
            raise ValueError(f"reward {self.name!r} combines nothing: give at least one reward")
        if bad := [name for name, (_, weight) in self.rewards.items() if not weight > 0]:
            raise ValueError(f"reward {self.name!r}: weights must be positive, that of {', '.join(bad)} is not")
        if self.rule == "minimum" and (bad := [name for name, (_, weight) in self.rewards.items() if weight != 1]):
            raise ValueError(f"reward {self.name!r}: a minimum has no weights; leave out that of {', '.join(bad)}")
        known = self.calibrations or {}
        if self.scale != "raw" and (missing := [name for name in self.rewards if name not in known]):
            raise ValueError(f"reward {self.name!r}: no calibration of {', '.join(missing)}: measure it on the base")

    @property
    def differentiable(self) -> bool:
        """Whether all parts are."""
        return all(reward.differentiable for reward, _ in self.rewards.values())

    @property
    def needs_groups(self) -> bool:
        """Whether a part does."""
        return any(needs_groups(reward) for reward, _ in self.rewards.values())

    @property
    def range(self) -> tuple[float, float]:
        """Not bounded in general."""
        return (-math.inf, math.inf)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata, groups: Tensor | None = None
    ) -> Tensor:
        """(B,), on the device of the images. groups: (B,), where a part needs them."""
        found = {
            name: ask(reward, images, prompts, metadata, groups)[0].to(images.device)
            for name, (reward, _) in self.rewards.items()
        }
        scores = torch.stack([self._scaled(name, values) for name, values in found.items()])
        weights = scores.new_tensor([weight for _, weight in self.rewards.values()])
        return RULES[self.rule](scores, weights, self.k)

    def _scaled(self, name: str, values: Tensor) -> Tensor:
        return values if self.scale == "raw" else SCALES[self.scale](self.calibrations[name], values)


@register("combined", RewardCard("several rewards as one", 1.0))
def combined(
    name: str,
    rewards: Mapping[str, Any],
    rule: str = "weighted_sum",
    scale: str = "raw",
    calibrations: str | None = None,
    k: float = 1.0,
) -> Combined:
    """Rewards as a configuration names them, by ``rule``; ``calibrations``: the file of ``save_calibrations``.

    Its names are those of the entries, as in ``diffalign score --calibrations``.
    """
    found, weights = build_rewards(from_dict(_Table, {"rewards": rewards}, f"reward {name!r}").rewards)
    known = load_calibrations(Path(calibrations)) if calibrations else None
    return Combined(name, {n: (found[n], weights[n]) for n in found}, rule, scale, known, k)


@dataclass
class _Table:
    rewards: dict[str, float | RewardConfig]


def majority(first: Tensor, second: Tensor) -> Tensor:
    """Which image of each pair most rewards prefer: scores (R, B) each, to (B,): 1 the first, -1 the second, 0 a tie.

    A reward that fails on one of the two does not vote.
    """
    votes = torch.where(first.isfinite() & second.isfinite(), (first - second).sign(), 0.0)
    return votes.sum(0).sign()
