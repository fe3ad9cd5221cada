"""Fields that the commands share which sample models; what is left out comes from the ``config.yaml`` of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from diffalign.config import Checked, from_dict, option
from diffalign.evaluation.checkpoints import CheckpointSpec, parse_checkpoint, parse_checkpoints
from diffalign.evaluation.sampling import SamplingSettings
from diffalign.tokens import printable

if TYPE_CHECKING:
    from diffalign.evaluation.runs import RunConfig


@dataclass(kw_only=True)
class ModelsConfig(Checked):
    """Models, and how their images are sampled. None stands for the value in the ``config.yaml`` of the first run."""

    models: tuple[str, ...] = option(
        (),
        "PATH, NAME=PATH or PATH@SCALE: run folders, checkpoints, LoRAs (or hub ids), full weights, negative prompts",
        section="model",
    )
    model: str | None = option(None, "base model: a folder in diffusers' layout, a hub id or a file", section="model")
    revision: str | None = option(None, "branch, tag or commit of a hub model", section="model")
    family: str | None = option(
        None, "your own model family, for a pipeline of another class: file.py:Class or module:Class", section="model"
    )
    max_sequence_length: int | None = option(None, "text tokens per prompt", section="model", ge=1, le=100_000)
    resolution: int | tuple[int, int] | None = option(
        None,
        "side length of square images, or height and width ([768, 1344]), in pixels",
        section="model",
        ge=1,
        le=100_000,
    )
    limit: int | None = option(
        None, "largest number of prompts, spread evenly over the file", section="data", infinite=False
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

    def sampling(self) -> SamplingSettings:
        """Collect the settings that images are sampled with, after all of them were filled in."""
        settings = (self.num_steps, self.schedule, self.guidance_scale, self.images_per_prompt, self.base_share)
        assert self.model is not None
        assert None not in settings
        num_steps, schedule, guidance_scale, images_per_prompt, base_share = cast(Any, settings)
        return SamplingSettings(
            self.model,
            self.max_sequence_length,
            self.resolution,
            num_steps,
            schedule,
            guidance_scale,
            images_per_prompt,
            self.seed,
            self.embedded_guidance,
            self.revision,
            base_share,
        )


C = TypeVar("C", bound=ModelsConfig)


def find_record(config: ModelsConfig) -> RunConfig:
    """Return the config of the first model that belongs to a run; an empty one without a run."""
    from diffalign.evaluation.runs import RunConfig, find_run

    found = (find_run(spec.path, config.allow_reward_code) for spec in config.checkpoint_specs())
    return next(filter(None, found), None) or RunConfig(Path(), {})


def run_values(config: ModelsConfig, record: RunConfig) -> dict[str, Any]:
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
        "offload": _sampling_parts(run.get("offload", ())),
        "batch_size": run.get("rollout_batch_size", 16),
    }
    open_fields = left_open(config, known)
    checked = from_dict(type(config), open_fields, str(record.file))
    values = {name: getattr(checked, name) for name in open_fields}
    values["cache_dir"] = config.cache_dir or record.cache_dir()
    if values.get("model"):
        print(f"base model {printable(values['model'])}, as {record.file} says", file=sys.stderr)
    return values


def fill_in(config: C, values: Mapping[str, Any]) -> C:
    """Set the fields that are None to those of ``values`` that are not."""
    return replace(config, **left_open(config, values))


def load_own_family(config: ModelsConfig) -> None:
    """Import the model family that the configuration names as code."""
    if config.family:
        from diffalign.models.registry import load_family

        load_family(config.family, config.allow_reward_code)


def _sampling_parts(offload: Any) -> Any:
    """Return the parts of a model among those that a run keeps on the CPU, without the rewards it trains on."""
    return [part for part in offload if part != "rewards"] if isinstance(offload, list | tuple) else offload


def _steps(run: Mapping[str, Any]) -> Any:
    section = run.get("plan", run.get("recipe"))
    return section.get("num_steps", 28) if isinstance(section, Mapping) else 28


def left_open(config: ModelsConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``values`` that are not None and whose field in ``config`` is."""
    return {name: value for name, value in values.items() if getattr(config, name) is None and value is not None}
