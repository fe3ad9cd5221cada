"""Rewards as a configuration names them: a weight each, and options where the defaults will not do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.config import option
from diffalign.rewards.base import Reward, get_reward


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One reward of a run: ``pickscore: 1.0``, or

    look: {reward: pickscore, weight: 0.5, options: {path: my/weights, precision: bf16}}
    """

    numbers_checked: ClassVar[bool] = True

    weight: float = option(1.0, "what its score, or its advantage, is multiplied by")
    reward: str = option("", "registered name, module:function or file.py:function; default: the name of the entry")
    options: dict[str, Any] = option(
        {}, "what the reward takes: path, revision, precision, offload, quantize ...", infinite=True
    )


RewardTable = Mapping[str, float | RewardConfig]


def build_rewards(table: RewardTable, allow_code: bool = False) -> tuple[dict[str, Reward], dict[str, float]]:
    """Rewards and their weights, by the names of the table. ValueError as from ``get_reward``."""
    rewards, weights = {}, {}
    for name, entry in table.items():
        entry = entry if isinstance(entry, RewardConfig) else RewardConfig(weight=float(entry))
        rewards[name] = get_reward(entry.reward or name, allow_code, **entry.options)
        weights[name] = entry.weight
    return rewards, weights
