"""Configuration of ``diffalign eval`` and ``diffalign compare``; unset fields default to those of the evaluated run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffalign.config import from_dict, option, split_texts
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig
from diffalign.evaluation.checkpoints import CheckpointSpec, parse_checkpoint, parse_checkpoints
from diffalign.evaluation.sampling import SamplingSettings
from diffalign.tokens import printable

if TYPE_CHECKING:
    from diffalign.evaluation.runs import RunConfig
    from diffalign.rewards.base import Reward


@dataclass(kw_only=True)
class EvaluationConfig:
    """Fields of ``diffalign eval`` and ``diffalign compare``; null: as in the ``config.yaml`` of the first run."""

    numbers_checked: ClassVar[bool] = True

    models: tuple[str, ...] = option(
        (), "PATH, NAME=PATH or PATH@SCALE: run folders, checkpoints, LoRA files, full weights, negative prompts"
    )
    model: str | None = option(None, "the base: a folder in diffusers' layout, or a hub id")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    max_sequence_length: int | None = option(None, "text tokens per prompt", ge=1, le=100_000)
    resolution: int | None = option(None, "side of the square images, in pixels", ge=1, le=100_000)
    prompts: Path | None = option(None, ".txt or .jsonl of prompts; in a run: its eval_prompts")
    limit: int | None = option(None, "at most so many prompts, spread evenly over the file")
    rewards: tuple[str, ...] | None = option(
        None, "reward names; the first one is reported by task", guard=guard_rewards
    )
    reward_options: dict[str, float | RewardConfig] | None = option(
        None, "how to make those of them that need options, by name; default: as the run's rewards", guard=guard_rewards
    )
    allow_reward_code: bool = option(
        False, "trust files with rewards that are code or servers; counts only where it is typed", typed_only=True
    )
    output_dir: Path | None = option(
        None, "where everything goes, default runs/eval or runs/compare; an interrupted one goes on"
    )
    num_steps: int | None = option(None, "ODE steps", le=10_000)
    schedule: str | None = option(None, "pipeline or uniform")
    guidance_scale: float | None = option(
        None, "the same for every model, as its pipeline means it; 1 or less guides nothing (Z-Image: 0)"
    )
    embedded_guidance: float | None = option(None, "guidance scale that a distilled model (FLUX.1-dev) takes as input")
    base_share: float | None = option(None, "of the steps, the first ones, made by the base: ImageReFL")
    images_per_prompt: int | None = option(
        None, "default: 2 for figures, which then hold diversity, 1 for a comparison", le=100_000
    )
    seed: int = option(0, "of the noise, the same for every model; a trainer's own evaluation uses 0")
    batch_size: int | None = option(None, "images per forward pass")
    offload: tuple[Literal["text_encoders", "vae"], ...] | None = option(
        None, "parts that are on the device only while they are used"
    )
    cache_dir: Path | None = option(None, "keeps prompt embeddings; default: the run's cache_dir, else nothing is kept")
    scales: tuple[float, ...] = option((), "each LoRA at each of these scales")
    checkpoints: bool = option(False, "each run as a strip over its checkpoints")
    allow_partial: bool = option(False, "go on, with a warning, where the model lacks layers of a LoRA")
    embedder: str | None = option(None, "an image model of transformers, for diversity in its space")

    def __post_init__(self) -> None:
        """Accept a text where several go."""
        split_texts(self)

    def checkpoint_specs(self) -> list[CheckpointSpec]:
        """The base and the models."""
        return parse_checkpoints(self.models, scales=self.scales, checkpoints=self.checkpoints)

    def problems(self) -> Iterator[str]:
        """What is wrong with each of ``models``: a path that is not there, or a scale that is none."""
        for text in self.models:
            try:
                parse_checkpoint(text)
            except (ValueError, FileNotFoundError) as error:
                yield str(error)

    def build_rewards(self) -> dict[str, Reward]:
        """Those of ``rewards``; call it on what ``resolve`` returned. ValueError: one that ranks within a group."""
        from diffalign.rewards.base import needs_groups
        from diffalign.rewards.config import build_rewards

        table = {name: self.reward_options.get(name, 1.0) for name in self.rewards}
        rewards = build_rewards(table, self.allow_reward_code)[0]
        if ranks := [name for name, reward in rewards.items() if needs_groups(reward)]:
            raise ValueError(f"{', '.join(ranks)} rank images within a group, which compares no models: leave them out")
        return rewards

    def sampling(self) -> SamplingSettings:
        """How images are drawn; call it on what ``resolve`` returned."""
        return SamplingSettings(
            str(self.model),
            self.max_sequence_length,
            self.resolution,
            self.num_steps,
            self.schedule,
            self.guidance_scale,
            self.images_per_prompt,
            self.seed,
            self.embedded_guidance,
            self.revision,
            self.base_share,
        )


def resolve(config: EvaluationConfig, output_dir: Path, images_per_prompt: int) -> EvaluationConfig:
    """Fills in what was left out, from the first run that has a ``config.yaml``, then from defaults.

    output_dir, images_per_prompt: the defaults of the command.

    ValueError: no base model or prompts, an empty list of rewards, a number below 1, a share outside [0, 1), or what a
    run that may be a stranger's cannot decide (see ``evaluation.runs``).
    """
    from diffalign.evaluation.runs import RunConfig, find_run
    from diffalign.structures import check_guidance

    found = (find_run(spec.path, config.allow_reward_code) for spec in config.checkpoint_specs())
    record = next(filter(None, found), None) or RunConfig(Path(), {})
    config = replace(config, **_missing(config, _of_run(config, record)))
    default = {"output_dir": output_dir, "images_per_prompt": images_per_prompt, "reward_options": {}}
    config = replace(config, **_missing(config, default))
    if config.guidance_scale is None and config.model:
        from diffalign.models.load import unguided_scale

        config = replace(config, guidance_scale=unguided_scale(config.model, config.revision))
    for name in ("guidance_scale", "embedded_guidance"):
        check_guidance(name, getattr(config, name))
    for name, example in (("model", "assets/shapes-sd3"), ("prompts", "prompts.jsonl"), ("rewards", "[shapes_strict]")):
        if not getattr(config, name):
            raise ValueError(f"{name} is missing: write --{name} {example}, or name a run whose config.yaml has it")
    for name in ("num_steps", "images_per_prompt", "batch_size", "resolution", "max_sequence_length"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not 0 <= config.base_share < 1:
        raise ValueError(f"base_share lies in [0, 1), got {config.base_share}: 0.25 leaves a quarter to the base")
    return config


def _of_run(config: EvaluationConfig, record: RunConfig) -> dict[str, Any]:
    """What the run says of the fields that ``config`` leaves open, checked as if it stood in a file of the command."""
    run = record.values
    same_base = config.model in (None, run.get("model"))
    known = {
        "model": run.get("model"),
        "revision": run.get("revision") if same_base else None,
        "max_sequence_length": run.get("max_sequence_length"),
        "resolution": run.get("resolution"),
        "num_steps": run.get("eval_num_steps") or _steps(run),
        "schedule": run.get("schedule", "pipeline"),
        "guidance_scale": run.get("guidance_scale"),
        "embedded_guidance": run.get("embedded_guidance"),
        "base_share": run.get("base_share", 0.0),
        "offload": run.get("offload", ()),
        "batch_size": run.get("rollout_batch_size", 16),
    }
    open_fields = _missing(config, known)
    checked = from_dict(EvaluationConfig, open_fields, str(record.file))
    values = {name: getattr(checked, name) for name in open_fields}
    values["prompts"] = config.prompts or record.held_out()
    values["cache_dir"] = config.cache_dir or record.cache_dir()
    values["rewards"] = rewards = config.rewards or record.reward_names()
    if config.reward_options is None:
        values["reward_options"] = record.reward_options(rewards, typed=config.rewards is not None)
    if values.get("model"):
        print(f"base model {printable(values['model'])}, as {record.file} says", file=sys.stderr)
    return values


def _steps(run: Mapping[str, Any]) -> Any:
    section = run.get("plan", run.get("recipe"))
    return section.get("num_steps", 28) if isinstance(section, Mapping) else 28


def _missing(config: EvaluationConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if getattr(config, name) is None and value is not None}
