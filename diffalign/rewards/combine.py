"""Combine several rewards into one by a rule, after calibration on the base model.

A ``Calibration`` holds statistics of a reward's scores on images of the base model, which makes rewards of different
units comparable. It is measured once (``calibrate``) and stored as JSON. A rule maps calibrated scores (R, B) of R
rewards on B images to (B,); ``RULES`` holds all rules.
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
from diffalign.device import to_float64
from diffalign.files import read_text
from diffalign.rewards.base import (
    IMAGES,
    LATENTS,
    Metadata,
    Reward,
    RewardCard,
    ask,
    check_latents,
    needs_groups,
    register,
    wants_latents,
)
from diffalign.rewards.config import RewardConfig, build_rewards

QUANTILES = 101
MAX_TABLE_BYTES = 64 << 20  # of a file of calibrations
TIED = 4  # units in the last place within which scores count as equal


@dataclass(frozen=True)
class Calibration:
    """Statistics of one reward on the base model: mean, population standard deviation, ascending quantiles."""

    mean: float
    std: float
    quantiles: tuple[float, ...]

    def standardise(self, values: Tensor) -> Tensor:
        """(values - mean) / std: 0 is the base model's mean, 1 is one standard deviation above it."""
        return (values - self.mean) / self.std

    def rank(self, values: Tensor) -> Tensor:
        """Share of the base model's images that score lower, in [0, 1]; piecewise linear between quantiles."""
        knots = values.new_tensor(self.quantiles)
        right = torch.searchsorted(knots, values.detach().contiguous()).clamp(1, len(knots) - 1)
        low, high = knots[right - 1], knots[right]
        slope = (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
        part = torch.where(high > low, slope, 0.5 + 0.5 * (values - low).sign())
        return (right - 1 + part.clamp(0, 1)) / (len(knots) - 1)


def calibrate(values: Tensor) -> Calibration:
    """Compute the statistics of scores (N,) of the base model's images, ignoring non-finite scores.

    Raises ValueError for fewer than two finite scores, or if all are equal up to float32 rounding.
    """
    values = values[values.isfinite()].cpu().double()
    rounding = TIED * torch.finfo(torch.float32).eps
    if len(values) < 2 or values.max() - values.min() <= rounding * values.abs().max():
        raise ValueError(
            f"{len(values)} finite scores without any difference cannot calibrate a reward: score more images"
        )
    quantiles = values.quantile(torch.linspace(0, 1, QUANTILES, dtype=torch.float64))
    return Calibration(values.mean().item(), values.std(correction=0).item(), tuple(quantiles.tolist()))


def save_calibrations(path: Path, calibrations: Mapping[str, Calibration]) -> None:
    """Write calibrations by reward name as JSON."""
    table = {name: vars(calibration) for name, calibration in calibrations.items()}
    write_text(path, json.dumps(table, indent=2) + "\n")


def load_calibrations(path: Path) -> dict[str, Calibration]:
    """Read a file of ``save_calibrations``. Raises ValueError that names the file if it has another content."""
    try:
        table = json.loads(read_text(path, MAX_TABLE_BYTES))
        return {n: Calibration(c["mean"], c["std"], tuple(c["quantiles"])) for n, c in table.items()}
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no calibrations ({str(error)[:300]}): write one with diffalign score --calibrations"
        ) from error


Rule = Callable[[Tensor, Tensor, float], Tensor]


def weighted_sum(scores: Tensor, weights: Tensor, k: float) -> Tensor:
    """sum_r w_r s_r."""
    return (weights[:, None] * scores).sum(0)


def soft_and(scores: Tensor, weights: Tensor, k: float) -> Tensor:
    """sum_r w_r log sigmoid(s_r): no reward compensates for one that is far below the base model."""
    return (weights[:, None] * F.logsigmoid(scores)).sum(0)


def pessimistic(scores: Tensor, weights: Tensor, k: float) -> Tensor:
    """Weighted mean minus k weighted standard deviations: disagreement between rewards lowers the score.

    The deviation of scores that are equal up to rounding is 0, with zero gradient.
    """
    share, wide = to_float64(weights / weights.sum())[:, None], to_float64(scores)
    mean = (share * wide).sum(0)
    variance = (share * (wide - mean).square()).sum(0)

    rounding = TIED * torch.finfo(scores.dtype).eps * wide.detach().abs().amax(0)
    differ = variance.detach() > rounding.square()
    # sqrt has no gradient at 0, where all rewards agree.
    return (mean - k * torch.where(differ, variance, 1.0).sqrt() * differ).to(scores)


def minimum(scores: Tensor, weights: Tensor, k: float) -> Tensor:
    """min_r s_r; all weights must be 1."""
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
    """Combine rewards by a rule; the result is a reward itself.

    An image on which one reward fails scores NaN; extras are dropped.

    Args:
        name: of the combined reward.
        rewards: (reward, positive weight) by name.
        rule: a key of ``RULES``.
        scale: "raw", "standardised" or "rank"; the last two need ``calibrations``.
        calibrations: by the names of ``rewards``.
        k: standard deviations that the rule "pessimistic" subtracts.

    Raises:
        ValueError: an unknown rule or scale, no reward, a weight that is not positive (or not 1 under "minimum"), a
            reward without calibration.
    """

    name: str
    rewards: Mapping[str, tuple[Reward, float]]
    rule: str = "weighted_sum"
    scale: str = "raw"
    calibrations: Mapping[str, Calibration] | None = None
    k: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        for value, choices in ((self.rule, list(RULES)), (self.scale, list(SCALES))):
            if value not in choices:
                raise ValueError(f"reward {self.name!r}: {value!r} is unknown; choose one of {', '.join(choices)}")
        if not self.rewards:
            raise ValueError(f"reward {self.name!r} has no rewards: give at least one")
        if bad := [name for name, (_, weight) in self.rewards.items() if not weight > 0]:
            raise ValueError(f"reward {self.name!r}: weights must be positive, that of {', '.join(bad)} is not")
        if self.rule == "minimum" and (bad := [name for name, (_, weight) in self.rewards.items() if weight != 1]):
            raise ValueError(f"reward {self.name!r}: a minimum has no weights; leave out that of {', '.join(bad)}")
        known = self.calibrations or {}
        if self.scale != "raw" and (missing := [name for name in self.rewards if name not in known]):
            raise ValueError(f"reward {self.name!r}: no calibration of {', '.join(missing)}: measure it on the base")

    @property
    def differentiable(self) -> bool:
        """Whether all combined rewards are."""
        return all(reward.differentiable for reward, _ in self.rewards.values())

    @property
    def needs_groups(self) -> bool:
        """Whether one of the combined rewards does."""
        return any(needs_groups(reward) for reward, _ in self.rewards.values())

    @property
    def wants(self) -> str:
        """Latents if all of the combined rewards want them; else the images, which latent rewards encode."""
        return LATENTS if all(wants_latents(reward) for reward, _ in self.rewards.values()) else IMAGES

    def check_latents(self, vae_config: Mapping[str, Any]) -> None:
        """Raise ValueError if a combined reward scores latents of another VAE."""
        check_latents({name: reward for name, (reward, _) in self.rewards.items()}, vae_config)

    @property
    def range(self) -> tuple[float, float]:
        """Unbounded: the rules map bounds in different ways."""
        return (-math.inf, math.inf)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata, groups: Tensor | None = None
    ) -> Tensor:
        """Score a batch: (B,) on the device of the images. groups: ids (B,), if one of the rewards needs them."""
        found = {
            name: ask(reward, images, prompts, metadata, groups)[0].to(images.device)
            for name, (reward, _) in self.rewards.items()
        }
        scores = torch.stack([self._scaled(name, values) for name, values in found.items()])
        weights = scores.new_tensor([weight for _, weight in self.rewards.values()])
        return RULES[self.rule](scores, weights, self.k)

    def _scaled(self, name: str, values: Tensor) -> Tensor:
        return values if self.scale == "raw" else SCALES[self.scale]((self.calibrations or {})[name], values)


@register("combined", RewardCard("several rewards as one", 1.0))
def combined(
    name: str,
    rewards: Mapping[str, Any],
    rule: str = "weighted_sum",
    scale: str = "raw",
    calibrations: str | None = None,
    k: float = 1.0,
) -> Combined:
    """Build ``Combined`` from a configuration.

    Args:
        name: of the combined reward.
        rewards: table of rewards as in a training configuration.
        rule: a key of ``RULES``.
        scale: a key of ``SCALES``.
        calibrations: file of ``diffalign score --calibrations``, with the same names as ``rewards``.
        k: of the rule "pessimistic".
    """
    found, weights = build_rewards(from_dict(_Table, {"rewards": rewards}, f"reward {name!r}").rewards)
    known = load_calibrations(Path(calibrations)) if calibrations else None
    return Combined(name, {n: (found[n], weights[n]) for n in found}, rule, scale, known, k)


@dataclass
class _Table:
    rewards: dict[str, float | RewardConfig]


def majority(first: Tensor, second: Tensor) -> Tensor:
    """Majority vote of R rewards on B pairs: scores (R, B) of both images to (B,), 1 first, -1 second, 0 tie.

    A reward whose score is not finite for one of the two images does not vote.
    """
    votes = torch.where(first.isfinite() & second.isfinite(), (first - second).sign(), 0.0)
    return votes.sum(0).sign()
