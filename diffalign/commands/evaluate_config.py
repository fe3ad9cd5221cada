"""Configuration of ``diffalign eval`` and ``diffalign compare``; unset fields default to those of the evaluated run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffalign.commands.models_config import ModelsConfig, fill_in, find_record, load_own_family, run_values
from diffalign.config import option
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig
from diffalign.structures import image_size

if TYPE_CHECKING:
    from diffalign.evaluation.runs import RunConfig
    from diffalign.rewards.base import Reward


@dataclass(kw_only=True)
class ScoringConfig(ModelsConfig):
    """Models, prompts, and the rewards that score the images."""

    prompts: Path | None = option(None, "file, hub id or named set; default: the run's eval_prompts", section="data")
    rewards: tuple[str, ...] | None = option(
        None, "reward names; the first one is reported by task", section="rewards", guard=guard_rewards
    )
    reward_options: dict[str, float | RewardConfig] | None = option(
        None,
        "options of rewards, by name; default: as in the run",
        section="rewards",
        guard=guard_rewards,
        infinite=False,
    )


@dataclass(kw_only=True)
class EvaluationConfig(ScoringConfig):
    """Configuration of ``diffalign eval`` and ``diffalign compare``.

    None stands for the value in the ``config.yaml`` of the first run.
    """

    usage: ClassVar[str] = "diffalign eval|compare MODEL ... [--field VALUE ...]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign eval runs/shapes --rewards shapes_strict",
        "diffalign compare runs/shapes runs/other@0.5 --limit 16",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "models", "model", "prompts", "rewards", "output_dir", "limit", "images_per_prompt", "guidance_scale",
        "num_steps", "batch_size",
    )  # fmt: skip

    embedder: str | None = option(
        None, "image model of transformers, to measure diversity in its embedding space", section="rewards"
    )
    sizes: tuple[int | tuple[int, int], ...] = option(
        (),
        "evaluate at each of these sizes, each a resolution ([512, [768, 1344]]), in a folder of its own",
        section="model",
        ge=1,
        le=100_000,
    )

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the models, and with the sizes."""
        yield from super().problems()
        if self.sizes and self.resolution is not None:
            yield "resolution: sizes are given as well: list every size in sizes, or leave sizes out"
        names = [size_name(size) for size in self.sizes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"sizes: {', '.join(twice)} is given more than once: give each size once"

    def by_size(self, output_dir: Path) -> Iterator[tuple[str, EvaluationConfig]]:
        """Yield the name of each of ``sizes`` and the evaluation at that size alone, in a folder of ``output_dir``."""
        for size in self.sizes:
            name = size_name(size)
            yield name, replace(self, sizes=(), resolution=size, output_dir=output_dir / name)


def size_name(resolution: int | tuple[int, int]) -> str:
    """Return height and width as text, e.g. ``768x1344``."""
    height, width = image_size(resolution)
    return f"{height}x{width}"


@dataclass(kw_only=True)
class ResolvedEvaluation(ScoringConfig):
    """An evaluation with a value for everything that sampling and scoring need, as ``resolve`` returns it."""

    model: str
    prompts: Path
    rewards: tuple[str, ...]
    reward_options: dict[str, float | RewardConfig]
    output_dir: Path
    num_steps: int
    schedule: str
    guidance_scale: float
    base_share: float
    images_per_prompt: int
    batch_size: int
    offload: tuple[Literal["text_encoders", "vae"], ...]

    def build_rewards(self) -> dict[str, Reward]:
        """Build ``rewards``. ValueError: one ranks images within a group."""
        from diffalign.rewards.base import needs_groups
        from diffalign.rewards.config import build_rewards

        table = {name: self.reward_options.get(name, 1.0) for name in self.rewards}
        rewards = build_rewards(table, self.allow_reward_code)[0]
        if ranks := [name for name, reward in rewards.items() if needs_groups(reward)]:
            raise ValueError(f"{', '.join(ranks)} rank images within a group, which compares no models: leave them out")
        return rewards


def resolve(config: ScoringConfig, output_dir: Path, images_per_prompt: int, scores: bool = True) -> ResolvedEvaluation:
    """Fill in what was left out, from the first run that has a ``config.yaml``, then from defaults.

    Args:
        config: The configuration as given.
        output_dir: The default of the command.
        images_per_prompt: The default of the command.
        scores: Whether the command needs a reward.

    Raises:
        ValueError: No base model or prompts, an empty list of rewards, or a value that the config.yaml of an untrusted
            run cannot decide (see ``evaluation.runs``).
    """
    record = find_record(config)
    config = fill_in(config, {**run_values(config, record), **_scoring_values(config, record)})
    config = fill_in(config, {"output_dir": output_dir, "images_per_prompt": images_per_prompt, "reward_options": {}})
    load_own_family(config)
    if config.guidance_scale is None and config.model:
        from diffalign.models.load import unguided_scale

        config = replace(config, guidance_scale=unguided_scale(config.model, config.revision))
    for name, example in (("model", "assets/shapes-sd3"), ("prompts", "prompts.jsonl"), ("rewards", "[shapes_strict]")):
        if not getattr(config, name) and (scores or name != "rewards"):
            raise ValueError(f"{name} is missing: write --{name} {example}, or name a run whose config.yaml has it")
    return ResolvedEvaluation(**{field.name: getattr(config, field.name) for field in fields(ResolvedEvaluation)})


def _scoring_values(config: ScoringConfig, record: RunConfig) -> dict[str, Any]:
    rewards = config.rewards or record.reward_names()
    values: dict[str, Any] = {"prompts": config.prompts or record.held_out(), "rewards": rewards}
    if config.reward_options is None:
        values["reward_options"] = record.reward_options(rewards, typed=config.rewards is not None)
    return values
