"""What a user may pass to a trainer, in the form that the trainer works with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from diffalign.data.prompts import load_prompts
from diffalign.rewards.base import Reward, get_reward, names, needs_groups, registered
from diffalign.rewards.config import build_rewards
from diffalign.structures import Prompt
from diffalign.user_code import running

RESERVED = frozenset({"mean", "std", "accuracy", "diversity"})  # of ``reward/...`` and ``eval/...`` in metrics.jsonl


def reward_table(spec: object, allow_code: bool = False) -> tuple[dict[str, Reward], dict[str, float]]:
    """Rewards and weights by name. ValueError where there is none, or while a script is loaded for its reward."""
    if script := running():
        raise ValueError(
            f"{script} starts a training while it is loaded for its reward: put that under if __name__ == '__main__'"
        )
    if isinstance(spec, Mapping):
        rewards, weights = build_rewards(spec, allow_code)
    else:
        several = spec if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
        found = [get_reward(one, allow_code) for one in several]
        rewards, weights = {r.name: r for r in found}, {r.name: 1.0 for r in found}
    check_names(rewards)
    if not rewards:
        raise ValueError("rewards is empty: write rewards: {shapes: 1.0}, or pass reward_funcs=")
    return rewards, weights


def check_names(names: Iterable[str]) -> None:
    """Refuse names of rewards that logs use for something else. ValueError: names them."""
    if taken := [name for name in names if name in RESERVED]:
        raise ValueError(
            f"{', '.join(taken)}: logs use this name for something else; give the reward another one, e.g. "
            f"rewards: {{my_{taken[0]}: {{reward: NAME}}}}"
        )


def evaluation_rewards(
    names: Sequence[str], rewards: Mapping[str, Reward], allow_code: bool = False
) -> dict[str, Reward]:
    """Those of ``names``, from the training's ``rewards`` where they are among them.

    Without names, all of these that judge an image by itself: a rank within a group compares no models.
    """
    alone = {name: reward for name, reward in rewards.items() if not needs_groups(reward)}
    found = {name: rewards.get(name) or get_reward(name, allow_code) for name in names} or alone
    check_names(found)
    return found


def check_differentiable(rewards: Mapping[str, Reward]) -> None:
    """ValueError where no gradient reaches the images through a reward; it names those through which one does."""
    if blind := [name for name, reward in rewards.items() if not reward.differentiable]:
        raise ValueError(
            f"{', '.join(blind)}: no gradient reaches an image through it. Differentiable: "
            f"{', '.join(differentiable_names())}; a function of your own that is: "
            "FunctionReward(name, function, differentiable=True)"
        )


def differentiable_names() -> list[str]:
    """The registered rewards that carry a gradient; those that cannot be made without options are left out."""
    found = []
    for name in names():
        with suppress(ValueError, ImportError):
            if registered(name).make().differentiable:
                found.append(name)
    return found


def check_groups(rewards: Mapping[str, Reward], num_groups: int, processes: int) -> None:
    """ValueError where a reward needs whole groups and a process would get parts of one."""
    names = [name for name, reward in rewards.items() if needs_groups(reward)]
    if names and num_groups % processes:
        raise ValueError(
            f"{', '.join(names)} judge whole groups: make num_groups a multiple of the {processes} processes, "
            f"not {num_groups}"
        )


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
