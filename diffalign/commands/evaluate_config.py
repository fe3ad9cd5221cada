"""Configuration of ``diffalign eval`` and ``diffalign compare``; unset fields default to those of the evaluated run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffalign.config import Checked, from_dict, option
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig
from diffalign.evaluation.checkpoints import CheckpointSpec, parse_checkpoint, parse_checkpoints
from diffalign.evaluation.sampling import SamplingSettings
from diffalign.tokens import printable

if TYPE_CHECKING:
    from diffalign.evaluation.runs import RunConfig
    from diffalign.rewards.base import Reward


@dataclass(kw_only=True)
class EvaluationConfig(Checked):
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

    models: tuple[str, ...] = option(
        (),
        "PATH, NAME=PATH or PATH@SCALE: run folders, checkpoints, LoRA files, full weights, negative prompts",
        section="model",
    )
    model: str | None = option(None, "base model: a folder in diffusers' layout, or a hub id", section="model")
    revision: str | None = option(None, "branch, tag or commit of a hub model", section="model")
    family: str | None = option(
        None, "your own model family, for a pipeline of another class: file.py:Class or module:Class", section="model"
    )
    max_sequence_length: int | None = option(None, "text tokens per prompt", section="model", ge=1, le=100_000)
    resolution: int | None = option(
        None, "side length of the square images, in pixels", section="model", ge=1, le=100_000
    )
    prompts: Path | None = option(None, "file, hub id or named set; default: the run's eval_prompts", section="data")
    limit: int | None = option(
        None, "largest number of prompts, spread evenly over the file", section="data", infinite=False
    )
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
    allow_reward_code: bool = option(
        False,
        "trust code (of rewards, a model family) and servers that are named; only valid on the command line",
        section="rewards",
        typed_only=True,
    )
    output_dir: Path | None = option(
        None,
        "output folder, where an interrupted command resumes; default: runs/eval or runs/compare",
        section="output",
    )
    num_steps: int | None = option(None, "ODE steps", section="sampling", ge=1, le=10_000)
    schedule: str | None = option(None, "noise schedule: pipeline or uniform", section="sampling")
    guidance_scale: float | None = option(
        None,
        "classifier-free guidance of every model, as its pipeline defines it; 1 or less disables it (Z-Image: 0)",
        section="sampling",
        ge=0,
        hint="1 turns guidance off (Z-Image: 0)",
    )
    embedded_guidance: float | None = option(
        None, "guidance embedding of a distilled model (FLUX.1-dev)", section="sampling", ge=0
    )
    base_share: float | None = option(
        None,
        "share of the steps, the first ones, made by the base model (ImageReFL); 0.25: a quarter",
        section="sampling",
        ge=0,
        lt=1,
    )
    images_per_prompt: int | None = option(
        None, "default: 2 for eval, which measures diversity, 1 for compare", section="sampling", ge=1, le=100_000
    )
    seed: int = option(
        0, "noise seed of every model; a trainer's own evaluation uses 0", section="sampling", infinite=False
    )
    batch_size: int | None = option(None, "images per forward pass", section="performance", ge=1)
    offload: tuple[Literal["text_encoders", "vae"], ...] | None = option(
        None, "keep these parts on the CPU while they are not used", section="performance"
    )
    cache_dir: Path | None = option(
        None, "folder for prompt embeddings; default: the run's cache_dir, else no cache", section="performance"
    )
    scales: tuple[float, ...] = option(
        (), "evaluate each LoRA at each of these scales", section="model", infinite=False
    )
    checkpoints: bool = option(False, "evaluate every checkpoint of each run", section="model")
    allow_partial: bool = option(
        False, "warn instead of stopping where the model lacks layers of a LoRA", section="model"
    )
    embedder: str | None = option(
        None, "image model of transformers, to measure diversity in its embedding space", section="rewards"
    )

    def checkpoint_specs(self) -> list[CheckpointSpec]:
        """The base and the models."""
        return parse_checkpoints(self.models, scales=self.scales, checkpoints=self.checkpoints)

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with each of ``models``: a missing path, or a malformed scale."""
        for text in self.models:
            try:
                parse_checkpoint(text)
            except (ValueError, FileNotFoundError) as error:
                yield str(error)


@dataclass(kw_only=True)
class ResolvedEvaluation(EvaluationConfig):
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

    def sampling(self) -> SamplingSettings:
        """Collect the settings that images are sampled with."""
        return SamplingSettings(
            self.model,
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


def resolve(config: EvaluationConfig, output_dir: Path, images_per_prompt: int) -> ResolvedEvaluation:
    """Fill in what was left out, from the first run that has a ``config.yaml``, then from defaults.

    Args:
        config: The configuration as given.
        output_dir: The default of the command.
        images_per_prompt: The default of the command.

    Raises:
        ValueError: No base model or prompts, an empty list of rewards, or a value that the config.yaml of an untrusted
            run cannot decide (see ``evaluation.runs``).
    """
    from diffalign.evaluation.runs import RunConfig, find_run

    found = (find_run(spec.path, config.allow_reward_code) for spec in config.checkpoint_specs())
    record = next(filter(None, found), None) or RunConfig(Path(), {})
    config = replace(config, **_missing(config, _of_run(config, record)))
    default = {"output_dir": output_dir, "images_per_prompt": images_per_prompt, "reward_options": {}}
    config = replace(config, **_missing(config, default))
    if config.family:
        from diffalign.models.registry import load_family

        load_family(config.family, config.allow_reward_code)
    if config.guidance_scale is None and config.model:
        from diffalign.models.load import unguided_scale

        config = replace(config, guidance_scale=unguided_scale(config.model, config.revision))
    for name, example in (("model", "assets/shapes-sd3"), ("prompts", "prompts.jsonl"), ("rewards", "[shapes_strict]")):
        if not getattr(config, name):
            raise ValueError(f"{name} is missing: write --{name} {example}, or name a run whose config.yaml has it")
    return ResolvedEvaluation(**{field.name: getattr(config, field.name) for field in fields(config)})


def _of_run(config: EvaluationConfig, record: RunConfig) -> dict[str, Any]:
    """Return the run's values of the fields that ``config`` leaves open, checked like a file of the command."""
    run = record.values
    same_base = config.model in (None, run.get("model"))
    known = {
        "model": run.get("model"),
        "revision": run.get("revision") if same_base else None,
        "family": run.get("family") if same_base and record.trusted else None,
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
