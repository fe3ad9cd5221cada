"""Build the rewards that a configuration names."""

from __future__ import annotations

from diffalign.config.sections import RewardConfig, RewardTable
from diffalign.rewards.base import Reward, get_reward

__all__ = ["RewardConfig", "RewardTable", "build_rewards"]


def build_rewards(table: RewardTable, allow_code: bool = False) -> tuple[dict[str, Reward], dict[str, float]]:
    """Build rewards and return them with their weights, by name. ValueError as from ``get_reward``."""
    rewards, weights = {}, {}
    for name, entry in table.items():
        entry = entry if isinstance(entry, RewardConfig) else RewardConfig(weight=float(entry))
        rewards[name] = get_reward(entry.reward or name, allow_code, **entry.options)
        weights[name] = entry.weight
    return rewards, weights
