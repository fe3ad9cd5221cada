"""The columns of a benchmark's table: each model, with and without guidance."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffalign.commands.bench.config import BenchConfig, as_pipeline
from diffalign.commands.models_config import fill_in, find_record, load_own_family, run_values
from diffalign.evaluation.checkpoints import CheckpointSpec
from diffalign.models.load import default_guidance, unguided_scale


@dataclass(frozen=True)
class Column:
    """One model with one guidance scale.

    Attributes:
        title: Title in tables.
        spec: The weights.
        guided: Whether the scale guides.
        config: The resolved settings, with this scale.
    """

    title: str
    spec: CheckpointSpec
    guided: bool
    config: BenchConfig

    @property
    def folder(self) -> Path:
        """Folder of the images of all models of one base and scale."""
        config = self.config
        assert config.output_dir is not None
        base = re.sub(r"[^\w.@-]+", "-", str(config.model)).strip("-")[-60:]
        return config.output_dir / "images" / base / f"guidance-{config.guidance_scale:g}"

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser for an image."""
        assert self.config.num_steps is not None
        return self.config.num_steps * (2 if self.guided else 1)


def columns(config: BenchConfig) -> list[Column]:
    """List the columns: whole pipelines first, then runs with their base.

    Raises:
        ValueError: No model, a model without a base, or two columns of one title.
        FileNotFoundError: A path does not exist.
    """
    found = [column for group, specs in _groups(config) for column in _with_guidance(group, specs)]
    if not found:
        raise ValueError("name a model: diffalign bench NAME MODEL ..., a hub id, a pipeline's folder or a run's")
    if twice := [title for title, count in Counter(column.title for column in found).items() if count > 1]:
        raise ValueError(f"models share a name ({', '.join(twice)}): write NAME=PATH for each")
    return found


def _groups(config: BenchConfig) -> Iterator[tuple[BenchConfig, Sequence[CheckpointSpec]]]:
    """Yield the resolved settings of each base model with the weights to sample with it."""
    tuned = tuple(text for text in config.models if as_pipeline(text) is None)
    whole = [pipeline for text in config.models if (pipeline := as_pipeline(text)) is not None]
    if config.model and not config.models:
        whole = [(Path(config.model).name, config.model)]
    for name, path in whole:
        yield _resolved(replace(config, models=(), model=path)), [CheckpointSpec(name)]
    groups: list[BenchConfig] = []
    for text in tuned:
        own = _resolved(replace(config, models=(text,)))
        known = next((i for i, other in enumerate(groups) if replace(other, models=own.models) == own), None)
        if known is None:
            groups.append(own)
        else:
            groups[known] = replace(groups[known], models=(*groups[known].models, text))
    for group in groups:
        first, *specs = group.checkpoint_specs()
        name = "base" if len(groups) == 1 else f"base {Path(str(group.model)).name}"
        yield group, [*([replace(first, name=name)] if config.base else []), *specs]


def _resolved(config: BenchConfig) -> BenchConfig:
    config = fill_in(config, run_values(config, find_record(config)))
    if not config.model:
        raise ValueError(f"{config.models[0]} belongs to no run: write --model with its base, a folder or a hub id")
    load_own_family(config)
    return config


def _with_guidance(config: BenchConfig, specs: Sequence[CheckpointSpec]) -> Iterator[Column]:
    assert config.model is not None
    off = unguided_scale(config.model, config.revision)
    on = config.guidance_scale
    if on is None or on <= off:  # that of the run, or the pipeline's own
        on = default_guidance(config.model, config.revision)
    scales = {"on": [on], "off": [off], "both": [on, off]}[config.guidance]
    for scale in dict.fromkeys(scales):
        guided = scale > off
        how = f"guidance {scale:g}" if guided else "no guidance"
        for spec in specs:
            yield Column(f"{spec.name}, {how}", spec, guided, replace(config, guidance_scale=scale))
