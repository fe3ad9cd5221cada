"""Build a pipeline on the meta device from its configuration files, to estimate memory without reading weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from diffalign.models.base import DiffusionModel
from diffalign.models.load import absent_parts, pipeline_class
from diffalign.models.published_configs import published_folder
from diffalign.models.quiet import pass_on, quiet_libraries
from diffalign.models.registry import get_family
from diffalign.models.single_file import layout


def model_on_meta(
    path: str | Path, *, revision: str | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> DiffusionModel:
    """Build the model of ``load_model`` on the meta device, with shapes and schedules but no weights or tokenizers.

    Arguments and errors are those of ``load_model``; only configuration files of a hub id are fetched.
    """
    path = layout(path)
    if not Path(path).exists() and (known := published_folder(path)) is not None:
        path, revision = known, None
    name = pipeline_class(path, revision)
    family, kind = get_family(name), getattr(diffusers, name)
    index = DiffusionPipeline.load_config(path, revision=revision)
    # As from_pretrained does, leave out what another class of the same components wrote.
    expected = inspect.signature(kind).parameters
    given = {key: value for key, value in index.items() if key in expected}
    left_out = {**absent_parts(path, family, revision), **family.load_options}
    for key, value in given.items():
        if isinstance(value, (list, tuple)) and len(value) == 2:
            given[key] = None if key in left_out else _part(path, key, revision, *value)
    with quiet_libraries() as lines:
        pipeline = kind(**{**given, **family.load_options})
        for key, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                part.to(torch.float32 if key == "vae" else dtype)
    pass_on(f"model {path}", lines)
    return family(pipeline, **{key: value for key, value in options.items() if value is not None})


def _part(path: str | Path, name: str, revision: str | None, library: str | None, kind: str | None) -> Any:
    """Load a scheduler, build a network on the meta device, or return None for other components."""
    module = {"diffusers": diffusers, "transformers": transformers}.get(library or "")
    found = getattr(module, kind or "", None)
    if found is None or not isinstance(found, type):
        return None
    build: Any = found
    if issubclass(found, SchedulerMixin):
        return build.from_pretrained(path, subfolder=name, revision=revision)
    if not issubclass(found, nn.Module):
        return None
    config = build.load_config(path, subfolder=name, revision=revision) if library == "diffusers" else None
    if config is None:
        config = build.config_class.from_pretrained(path, subfolder=name, revision=revision)
    with torch.device("meta"):
        return build.from_config(config) if library == "diffusers" else build(config)
