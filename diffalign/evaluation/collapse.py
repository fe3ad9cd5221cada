"""Detect that an online training collapses: its reward falls far below its best, or its images lose their diversity.

A reward climbs, stands, and may then fall for good: the policy leaves the region where its data are informative. The
fall begins tens of iterations before images look bad, and the metrics of the run show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffalign.rollout.collapse_config import CollapseConfig

COLLAPSE = "collapse"  # metric: 1 in rows with an alarm
REWARD, ACCURACY, DIVERSITY = "reward/mean", "eval/accuracy", "eval/diversity"
WATCHED = (REWARD, ACCURACY, DIVERSITY)
FIRST_ROW = "time/collect"  # in the first row of an iteration, whose later rows repeat its rewards
# Metrics that explain a collapse, where a run has them.
DISTANCES = ("reference_distance", "ema_distance", "kl", "log_ratio_max", "zero_std_groups", "eval/reference_distance")
LEAST_FALL = 0.05  # of an evaluation, relative to its best


@dataclass(frozen=True)
class Best:
    """Highest value so far, and the optimizer step of it."""

    value: float
    step: int


class CollapseMonitor:
    """Follow the rows of a run's metrics.

    The mean reward of the last ``window`` iterations collapses if it lies ``significance`` standard errors, and the
    share ``drop`` of what was gained since the first window, below the best such mean. The first reward of evaluations
    collapses if it has lost that share twice in a row, and diversity if it is below a share of the base's. The standard
    error comes from differences of successive iterations, so that a trend does not enter it.

    Args:
        config: Thresholds.
        remedy: What to try, in words.
        rows: Rows of ``metrics.jsonl`` that a resumed run has.
    """

    def __init__(self, config: CollapseConfig, remedy: str, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.window, self.drop = config.window, config.drop
        self.significance, self.floor = config.significance, config.diversity
        self.remedy, self.message = remedy, ""
        self.rewards: list[float] = []
        self.squares = 0.0  # sum of squared differences of successive rewards
        self.first: dict[str, float] = {}  # metric -> its value in the first window, or the first one
        self.best: dict[str, Best] = {}
        self.low = 0  # evaluations in a row that have fallen
        self.seen: dict[str, list[float]] = {}
        self.active = False
        for row in rows:
            self(int(row["step"]), row)

    def __call__(self, step: int, row: Mapping[str, Any]) -> str:
        """Read a row, and set ``active``; return the message the first time there is a cause, else an empty string."""
        if not self.window:
            return ""
        for name in DISTANCES:
            if _number(row.get(name)):
                self.seen.setdefault(name, []).append(float(row[name]))
        causes = [*self._evaluation(step, row), *self._diversity(row)]
        if FIRST_ROW in row and _number(row.get(REWARD)):
            causes += self._reward(step, float(row[REWARD]))
            self.active = False  # until this row shows otherwise
        self.active = self.active or bool(causes)
        if not causes or self.message:
            return ""
        self.message = f"step {step}: the training collapses: {'; '.join([*causes, *self._distances()])}. {self.remedy}"
        return self.message

    def _reward(self, step: int, reward: float) -> list[str]:
        """Compare the mean of the last window with the best one."""
        self.squares += (reward - self.rewards[-1]) ** 2 if self.rewards else 0.0
        self.rewards.append(reward)
        if len(self.rewards) < self.window:
            return []
        mean = math.fsum(self.rewards[-self.window :]) / self.window
        first, best = self.first.setdefault(REWARD, mean), self._improve(REWARD, mean, step)
        if len(self.rewards) < 2 * self.window:
            return []
        # Of the difference of two such means; half the mean square of a difference is the variance of one reward.
        error = math.sqrt(self.squares / (len(self.rewards) - 1) / self.window)
        if best.value - mean <= max(self.significance * error, self.drop * (best.value - first)):
            return []
        over = f"the mean reward of {self.window} iterations"
        return [f"{over} fell from {best.value:.3g} (step {best.step}) to {mean:.3g}"]

    def _evaluation(self, step: int, row: Mapping[str, Any]) -> list[str]:
        """Compare the first reward of an evaluation with the best evaluation."""
        if not _number(row.get(ACCURACY)):
            return []
        value = float(row[ACCURACY])
        first, best = self.first.setdefault(ACCURACY, value), self._improve(ACCURACY, value, step)
        fall = best.value - value
        fallen = fall > max(self.drop * (best.value - first), LEAST_FALL * abs(best.value))
        self.low = self.low + 1 if fallen else 0
        if self.low < 2:
            return []
        return [f"held-out accuracy fell from {best.value:.3g} (step {best.step}) to {value:.3g}"]

    def _diversity(self, row: Mapping[str, Any]) -> list[str]:
        if not _number(row.get(DIVERSITY)):
            return []
        value = float(row[DIVERSITY])
        first = self.first.setdefault(DIVERSITY, value)
        return [f"diversity fell from {first:.3g} to {value:.3g}"] if value < self.floor * first else []

    def _improve(self, name: str, value: float, step: int) -> Best:
        if name not in self.best or value > self.best[name].value:
            self.best[name] = Best(value, step)
        return self.best[name]

    def _distances(self) -> list[str]:
        """Say what moved meanwhile: means of the first and the last window."""
        found = []
        for name, values in self.seen.items():
            early, late = (math.fsum(part) / len(part) for part in (values[: self.window], values[-self.window :]))
            if late > 1.5 * early:
                found.append(f"{name.removeprefix('eval/')} rose from {early:.2g} to {late:.2g}")
        return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
