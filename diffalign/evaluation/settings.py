"""What an evaluation can be told; what is left out comes from the run that is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffalign.config import from_dict, load_yaml, option
from diffalign.evaluation.gallery import Sampling
from diffalign.evaluation.subjects import Subject, parse_subjects
from diffalign.rewards.base import Reward, needs_groups
from diffalign.rewards.settings import RewardConfig, build_rewards


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
    rewards: tuple[str, ...] | None = option(None, "reward names; the first one is reported by task")
    reward_options: dict[str, float | RewardConfig] | None = option(
        None, "how to make those of them that need options, by name; default: as the run's rewards"
    )
    allow_reward_code: bool = option(False, "run the code of rewards that are named file.py:function")
    output_dir: Path | None = option(
        None, "where everything goes, default runs/eval or runs/compare; an interrupted one goes on"
    )
    num_steps: int | None = option(None, "ODE steps", le=10_000)
    schedule: str | None = option(None, "pipeline or uniform")
    guidance_scale: float | None = option(None, "the same for every model")
    embedded_guidance: float | None = option(None, "guidance that a distilled model (FLUX.1-dev) is told")
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
    embedder: str | None = option(None, "an image model of transformers, for diversity in its space")

    def subjects(self) -> list[Subject]:
        """The base and the models."""
        return parse_subjects(self.models, scales=self.scales, checkpoints=self.checkpoints)

    def build_rewards(self) -> dict[str, Reward]:
        """Those of ``rewards``; call it on what ``resolve`` returned. ValueError: one that ranks within a group."""
        table = {name: self.reward_options.get(name, 1.0) for name in self.rewards}
        rewards = build_rewards(table, self.allow_reward_code)[0]
        if ranks := [name for name, reward in rewards.items() if needs_groups(reward)]:
            raise ValueError(f"{', '.join(ranks)} rank images within a group, which compares no models: leave them out")
        return rewards

    def sampling(self) -> Sampling:
        """How images are drawn; call it on what ``resolve`` returned."""
        return Sampling(
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


@dataclass
class _Rewards:
    """The part of a run's configuration that says how its rewards are made."""

    rewards: dict[str, float | RewardConfig]


def resolve(config: EvaluationConfig, output_dir: Path, images_per_prompt: int) -> EvaluationConfig:
    """Fills in what was left out, from the first run that has a ``config.yaml``, then from defaults.

    output_dir, images_per_prompt: the defaults of the command.

    ValueError: no base model or prompts, an empty list of rewards, a number below 1, a share outside [0, 1).
    """
    run = next(filter(None, (_run_of(subject.path) for subject in config.subjects())), {})
    known = {
        "model": run.get("model"),
        "revision": run.get("revision") if config.model in (None, run.get("model")) else None,
        "max_sequence_length": run.get("max_sequence_length"),
        "resolution": run.get("resolution"),
        "prompts": run.get("eval_prompts") and Path(run["eval_prompts"]),
        "rewards": tuple(run.get("eval_rewards") or run.get("rewards") or ()),
        "reward_options": from_dict(_Rewards, {"rewards": run.get("rewards") or {}}).rewards,
        "num_steps": run.get("eval_num_steps") or run.get("plan", run.get("recipe", {})).get("num_steps", 28),
        "schedule": run.get("schedule", "pipeline"),
        "guidance_scale": run.get("guidance_scale", 1.0),
        "embedded_guidance": run.get("embedded_guidance"),
        "base_share": run.get("base_share", 0.0),
        "offload": tuple(run.get("offload", ())),
        "cache_dir": run.get("cache_dir") and Path(run["cache_dir"]),
        "output_dir": output_dir,
        "images_per_prompt": images_per_prompt,
        "batch_size": run.get("rollout_batch_size", 16),
    }
    config = replace(config, **{name: value for name, value in known.items() if getattr(config, name) is None})
    for name, example in (("model", "assets/shapes-sd3"), ("prompts", "prompts.jsonl"), ("rewards", "[shapes_strict]")):
        if not getattr(config, name):
            raise ValueError(f"{name} is missing: write --{name} {example}, or name a run whose config.yaml has it")
    for name in ("num_steps", "images_per_prompt", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not 0 <= config.base_share < 1:
        raise ValueError(f"base_share lies in [0, 1), got {config.base_share}: 0.25 leaves a quarter to the base")
    return config


def _run_of(path: Path | None) -> Mapping[str, Any] | None:
    """The configuration of the run that a path lies in: its folder, or one or two above it."""
    if path is None:
        return None
    places = [path, *path.resolve().parents[:2]]
    return next((load_yaml(place / "config.yaml") for place in places if (place / "config.yaml").is_file()), None)


def spread(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of ``count`` places, evenly spread, the first and the last among them."""
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}: leave it out for all prompts")
    return sorted({round(i * (count - 1) / max(1, limit - 1)) for i in range(limit)})
