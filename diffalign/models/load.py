"""From a path or a hub id to a ``DiffusionModel``: the family is read from the pipeline's own index."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffalign.models.base import DiffusionModel
from diffalign.models.flux import FluxModel
from diffalign.models.quantise import quantisation
from diffalign.models.qwen_image import QwenImageModel
from diffalign.models.sana import SanaModel
from diffalign.models.sd import SDModel
from diffalign.models.sd3 import SD3Model
from diffalign.models.sdxl import SDXLModel
from diffalign.models.z_image import ZImageModel

COMMIT = re.compile("[0-9a-f]{40}")
FAMILIES: dict[str, type[DiffusionModel]] = {
    "StableDiffusionPipeline": SDModel,
    "StableDiffusionXLPipeline": SDXLModel,
    "StableDiffusion3Pipeline": SD3Model,
    "FluxPipeline": FluxModel,
    "QwenImagePipeline": QwenImageModel,
    "SanaPipeline": SanaModel,
    "ZImagePipeline": ZImageModel,
}


@contextmanager
def local_files(path: str | Path) -> Iterator[None]:
    """Raise ValueError, with the path and the cause, where the files of a local model are damaged or incomplete."""
    try:
        yield
    except Exception as error:  # of safetensors, json, diffusers and transformers, each with kinds of its own
        if not Path(path).exists() or "memory" in str(error).lower() or isinstance(error, MemoryError):
            raise
        problem = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"model {path}: its files cannot be read ({problem}); restore the folder") from error


def pipeline_class(path: str | Path, revision: str | None = None) -> str:
    """The name of the pipeline's class in its own index. FileNotFoundError, ValueError: as for ``load_model``."""
    local = Path(path)
    if not local.exists() and (str(path).count("/") != 1 or str(path).startswith((".", "/"))):
        raise FileNotFoundError(
            f"model {path}: no such folder; give a folder in diffusers' layout, or a hub id 'owner/name'"
        )
    if local.exists() and not (local / "model_index.json").is_file():
        raise FileNotFoundError(f"model {path}: has no model_index.json; give the folder that save_pretrained wrote")
    with local_files(path):
        name = DiffusionPipeline.load_config(path, revision=revision)["_class_name"]
    if name not in FAMILIES:
        raise ValueError(f"model {path}: pipelines of class {name} are not supported; supported: {', '.join(FAMILIES)}")
    return name


def loaded_commit(model: DiffusionModel) -> str | None:
    """The commit of the hub that the denoiser came from; None for one from a folder."""
    place = Path(str(model.raw_denoiser.config.get("_name_or_path", "")))
    found = [name for folder, name in pairwise(place.parts) if folder == "snapshots" and COMMIT.fullmatch(name)]
    return found[-1] if found else None


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    quantise: str = "no",
    **options: Any,
) -> DiffusionModel:
    """Loads a pipeline with plain diffusers and wraps it.

    path: a folder in diffusers' layout, or a hub id. revision: its branch, tag or commit.
    dtype: of the frozen weights; the VAE stays float32.
    quantise: the denoiser loads in "8bit" or "4bit", for a LoRA on it; see ``quantisation``.
    options: of the family, e.g. ``max_sequence_length`` for SD3; None counts as not given.
    FileNotFoundError: no such folder, or one without ``model_index.json``. ValueError: a family not known yet, or an
    option that it does not have.
    """
    name = pipeline_class(path, revision)
    family = FAMILIES[name]
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := given.keys() - inspect.signature(family).parameters:
        raise ValueError(f"model {path}: a {name} has no option {', '.join(sorted(unknown))}; leave it out")
    told = {} if quantise == "no" else {"quantization_config": quantisation(quantise, family.denoiser_name)}
    with local_files(path):
        pipeline = DiffusionPipeline.from_pretrained(
            path, torch_dtype=dtype, revision=revision, **told, **family.load_options
        )
    pipeline.vae.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return family(pipeline, **given)
