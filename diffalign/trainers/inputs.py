"""Inputs of a training: rewards, prompts and data, read and checked before a model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from diffalign.config.held_out import PANEL, WORD, held_out_table, spec_of
from diffalign.data.prompts import as_prompts, load_prompts
from diffalign.rewards.base import Reward, get_reward, names, needs_groups, registered
from diffalign.rewards.config import build_rewards
from diffalign.rewards.support.record import reward_record
from diffalign.rewards.support.weights import Weights, offloaded
from diffalign.runtime.trainer_config import TrainerConfig
from diffalign.structures import Prompt
from diffalign.user_code import running

C = TypeVar("C", bound=TrainerConfig, covariant=True)
REWARDS = "rewards"  # among ``offload``
RESERVED = frozenset({"mean", "std", "accuracy", "diversity"})  # of ``reward/...`` and ``eval/...`` in metrics.jsonl


@dataclass(frozen=True)
class Inputs(Generic[C]):
    """Data and rewards of a training and its evaluations.

    Attributes:
        config: The validated configuration, which records the rewards.
        data: Prompts, pairs or images; None if the algorithm opens them itself.
        rewards: Rewards to train on, by name.
        weights: Weight of each of ``rewards``.
        eval_rewards: Rewards that evaluations report, the first as accuracy.
        held_out: Names of those among ``eval_rewards`` that only monitor the training.
        eval_prompts: Held-out prompts.
    """

    config: C
    data: Any = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    eval_rewards: Mapping[str, Reward] = field(default_factory=dict)
    held_out: Sequence[str] = ()
    eval_prompts: Sequence[Prompt] = ()


def read_rewards(config: Any, reward_funcs: Any) -> tuple[Any, dict[str, Reward], dict[str, float]]:
    """Build the rewards that were passed, or those of the configuration.

    Returns:
        The configuration, which records rewards that were passed; rewards and weights by name.
    """
    given = config.rewards if reward_funcs is None else reward_funcs
    rewards, weights = reward_table(given, config.allow_reward_code)
    if REWARDS in config.offload:
        rewards = {name: offloaded(reward) for name, reward in rewards.items()}
    if reward_funcs is not None:
        config = dataclasses.replace(config, rewards=reward_record(given, rewards))
    return config, rewards, weights


def reward_table(spec: Any, allow_code: bool = False) -> tuple[dict[str, Reward], dict[str, float]]:
    """Build rewards and weights by name. ValueError: there is none, or a script is being imported for its reward."""
    if script := running():
        raise ValueError(
            f"{script} starts a training while it is imported for its reward: put that under if __name__ == '__main__'"
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
    """Raise ValueError for names of rewards that logs use for something else."""
    if taken := [name for name in names if name in RESERVED]:
        raise ValueError(
            f"{', '.join(taken)}: logs use this name for something else; give the reward another one, e.g. "
            f"rewards: {{my_{taken[0]}: {{reward: NAME}}}}"
        )


def evaluation_rewards(
    names: Sequence[str], rewards: Mapping[str, Reward], allow_code: bool = False
) -> dict[str, Reward]:
    """Return the rewards of evaluations: ``names``, taken from the training's ``rewards`` if they are among them.

    Default: all training rewards that score an image by itself, because a rank within a group compares no models.
    """
    alone = {name: reward for name, reward in rewards.items() if not needs_groups(reward)}
    found = {name: rewards.get(name) or get_reward(name, allow_code) for name in names} or alone
    check_names(found)
    return found


def with_held_out(inputs: Inputs[C]) -> Inputs[C]:
    """Add the judges of ``held_out`` to those of evaluations, and the trained rewards to compare them with.

    Raises ValueError for a judge that the run trains on, or whose weights it does.
    """
    config = inputs.config
    table = held_out_table(
        config.held_out, {**dict.fromkeys(inputs.rewards, 1.0), **(getattr(config, "rewards", None) or {})}
    )
    if not table:
        return inputs
    judges, _ = build_rewards(table, config.allow_reward_code)
    check_names(judges)
    trained = {found: name for name, reward in inputs.rewards.items() for found in networks(reward)}
    for name, judge in judges.items():
        if shared := [trained[found] for found in networks(judge) if found in trained]:
            raise ValueError(f"held_out: {name} has the weights of {shared[0]}, which the run trains on; leave it out")
    alone = {name: reward for name, reward in inputs.rewards.items() if not needs_groups(reward)}
    every = {**inputs.eval_rewards, **alone, **judges}
    return dataclasses.replace(inputs, eval_rewards=every, held_out=list(judges))


def networks(reward: Any) -> set[tuple[str, str | None, str]]:
    """Return (path or id, revision, file) of the networks that score, of a combination those of its parts."""
    held = getattr(reward, "__dict__", {})
    own = {(w.path, w.revision, str(held.get("file", ""))) for w in held.values() if isinstance(w, Weights)}
    parts = held.get("rewards")
    inner = [networks(part) for part, _ in parts.values()] if isinstance(parts, Mapping) else []
    return own.union(*inner)


def held_out_sentence(inputs: Inputs[Any]) -> str:
    """Describe the held-out judges, and the memory of their weights."""
    if not inputs.held_out:
        return ""
    left_out = [name for name in PANEL if WORD in inputs.config.held_out and name not in inputs.held_out]
    trained = f" (without {', '.join(left_out)}, trained on)" if left_out else ""
    size = sum(_bytes(inputs.config.held_out_judges()[name], name) for name in inputs.held_out)
    memory = f"; their published weights take about {size / 1e9:.1f} GB" if size else ""
    return f"{', '.join(inputs.held_out)}{trained}, never trained on{memory}"


def _bytes(entry: Any, name: str) -> float:
    """Return the size of a registered judge's weights at its precision; 0 for code."""
    spec, options = spec_of(name, entry), getattr(entry, "options", {})
    if ":" in spec:
        return 0.0
    found = registered(spec)
    weights = getattr(found.make(**options), "weights", None)
    return found.facts.millions * 1e6 * (weights.dtype.itemsize if isinstance(weights, Weights) else 4)


def check_differentiable(rewards: Mapping[str, Reward]) -> None:
    """Raise ValueError, with the differentiable rewards, if no gradient reaches the images through a reward."""
    if blind := [name for name, reward in rewards.items() if not reward.differentiable]:
        raise ValueError(
            f"{', '.join(blind)}: no gradient reaches an image through it. Differentiable: "
            f"{', '.join(differentiable_names())}; a function of your own that is: "
            "FunctionReward(name, function, differentiable=True)"
        )


def differentiable_names() -> list[str]:
    """List the registered rewards that carry a gradient, without those that have required options."""
    found = []
    for name in names():
        with suppress(ValueError, ImportError):
            if registered(name).make().differentiable:
                found.append(name)
    return found


def check_groups(rewards: Mapping[str, Reward], num_groups: int, processes: int) -> None:
    """Raise ValueError if a reward needs whole groups and a process would get parts of one."""
    names = [name for name, reward in rewards.items() if needs_groups(reward)]
    if names and num_groups % processes:
        raise ValueError(
            f"{', '.join(names)} judge whole groups: make num_groups a multiple of the {processes} processes, "
            f"not {num_groups}"
        )


def dataset(given: Any, path: Path | None, field: str) -> list[Prompt]:
    """Return the prompts that were passed, see ``as_prompts``, or load a file. Raises ValueError without either."""
    if isinstance(given, str | Path):
        given, path = None, Path(given)
    if given is not None:
        if not (prompts := as_prompts(given, "train_dataset")):
            raise ValueError(f"{field}: the list of prompts is empty; pass at least one Prompt")
        return prompts
    if path is None:
        raise ValueError(f"{field} is missing: write {field}: prompts.txt, or pass a list of Prompt")
    return load_prompts(path)


def load_optional(path: Path | None) -> list[Prompt]:
    """Load the prompts of a file; return none without a file."""
    return [] if path is None else load_prompts(path)
