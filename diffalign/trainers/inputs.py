"""What a user may pass to a trainer, in the form that the trainer works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffalign.data.prompts import load_prompts
from diffalign.rewards.base import Reward, get_reward
from diffalign.structures import Prompt


def reward_table(spec: object) -> tuple[dict[str, Reward], dict[str, float]]:
    """Rewards and weights by name. ValueError where there is none."""
    if isinstance(spec, Mapping):
        rewards = {name: get_reward(name) for name in spec}
        weights = {name: float(weight) for name, weight in spec.items()}
    else:
        found = [get_reward(s) for s in (spec if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec])]
        rewards, weights = {r.name: r for r in found}, {r.name: 1.0 for r in found}
    if not rewards:
        raise ValueError("rewards is empty: write rewards: {shapes: 1.0}, or pass reward_funcs=")
    return rewards, weights


def dataset(given: Sequence[Prompt] | None, path: Path | None, field: str) -> list[Prompt]:
    """Prompts that were passed, or those of a file. ValueError where there is neither."""
    if given is not None:
        if not given:
            raise ValueError(f"{field}: the list of prompts is empty; pass at least one Prompt")
        return list(given)
    if path is None:
        raise ValueError(f"{field} is missing: write {field}: prompts.txt, or pass a list of Prompt")
    return load_prompts(path)


def load_optional(path: Path | None) -> list[Prompt]:
    """The prompts of a file, or none."""
    return [] if path is None else load_prompts(path)
