"""Load a ``DiffusionModel`` from a path or hub id; the pipeline's ``model_index.json`` selects the family."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from diffalign.embedded import located
from diffalign.models.base import DiffusionModel
from diffalign.models.quantise import quantisation
from diffalign.models.quiet import pass_on, quiet_libraries
from diffalign.models.registry import get_family
from diffalign.models.single_file import SingleFile, layout, load_parts, single_file

COMMIT = re.compile("[0-9a-f]{40}")
LIBRARIES = ("diffusers", "transformers")


@contextmanager
def local_files(path: str | Path) -> Iterator[None]:
    """Turn errors from damaged or incomplete files of a local model into a ValueError with path and cause."""
    try:
        yield
    except Exception as error:  # safetensors, json, diffusers and transformers raise different types
        explained = str(error).startswith(f"model {path}:")
        if explained or not Path(path).exists() or "memory" in str(error).lower() or isinstance(error, MemoryError):
            raise
        problem = f"{type(error).__name__}: {str(error)[:300]}"
        raise ValueError(f"model {path}: its files cannot be read ({problem}); restore the folder") from error


def pipeline_class(path: str | Path, revision: str | None = None) -> str:
    """Return the pipeline class named in ``model_index.json``, of a single file in its base's.

    Raises as ``load_model`` does.
    """
    path = layout(path)
    local = Path(path)
    if not local.exists() and (str(path).count("/") != 1 or str(path).startswith((".", "/"))):
        raise FileNotFoundError(
            f"model {path}: no such folder; give a folder in diffusers' layout, or a hub id 'owner/name'"
        )
    if local.exists() and not (local / "model_index.json").is_file():
        raise FileNotFoundError(f"model {path}: has no model_index.json; give the folder that save_pretrained wrote")
    with local_files(path):
        index = DiffusionPipeline.load_config(path, revision=revision)
    name = index.get("_class_name") if isinstance(index, dict) else None
    try:
        get_family(str(name)[:200])
    except ValueError as error:
        raise ValueError(f"model {path}: {error}") from error
    assert isinstance(name, str)
    _check_libraries(path, index)
    return name


def unguided_scale(path: str | Path, revision: str | None = None) -> float:
    """Return the scale that turns guidance off in a model's family; 1 if the family cannot be read yet."""
    try:
        return get_family(pipeline_class(path, revision)).unguided_scale
    except (OSError, ValueError):  # loading the model will report the error
        return DiffusionModel.unguided_scale


def edits(path: str | Path, revision: str | None = None) -> bool:
    """Return whether a model's family edits source images; False if the family cannot be read yet."""
    try:
        return get_family(pipeline_class(path, revision)).edits
    except (OSError, ValueError):  # loading the model will report the error
        return False


def default_guidance(path: str | Path, revision: str | None = None) -> float:
    """Return the default guidance scale of a model's pipeline; ``unguided_scale`` if it has none, or ignores it."""
    kind = pipeline_class(path, revision)
    if DiffusionPipeline.load_config(layout(path), revision=revision).get("is_distilled"):
        return unguided_scale(path, revision)
    parameters = inspect.signature(getattr(diffusers, kind).__call__).parameters
    name = get_family(kind).guidance_argument
    scale = parameters[name].default if name is not None and name in parameters else None
    return float(scale) if isinstance(scale, int | float) else unguided_scale(path, revision)


def _check_libraries(path: str | Path, index: Mapping[str, Any]) -> None:
    """Raise ValueError for a component of another library: diffusers would import any module named there."""
    for part, value in index.items():
        library = value[0] if isinstance(value, (list, tuple)) and value else None
        if library is None or library in LIBRARIES:
            continue
        if not (isinstance(library, str) and library.isidentifier() and find_spec(f"diffusers.pipelines.{library}")):
            raise ValueError(
                f"model {path}: model_index.json takes {part} from {library!r}, and only {' and '.join(LIBRARIES)} are "
                "trusted: give a model without custom code"
            )


def loaded_commit(model: DiffusionModel) -> str | None:
    """Return the hub commit of the denoiser, or None if it was loaded from a folder."""
    folder = Path(str(model.raw_denoiser.config.get("_name_or_path", "")))
    found = [name for parent, name in pairwise(folder.parts) if parent == "snapshots" and COMMIT.fullmatch(name)]
    return found[-1] if found else None


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    quantise: str = "no",
    in_float32: Collection[str] = (),
    **options: Any,
) -> DiffusionModel:
    """Load a pipeline with diffusers and wrap it in the model of its family.

    Args:
        path: Folder in diffusers' layout, hub id, single file (see ``single_file``), or name of an embedded model
            (``embedded.MODELS``); of a folder, an fp16 variant alone is enough.
        dtype: Dtype of the frozen weights; the VAE stays float32.
        revision: Branch, tag or commit of a hub id, of a single file's base.
        quantise: "8bit" or "4bit" loads the denoiser quantised, for a LoRA on it: see ``quantisation``.
        in_float32: Other components whose weights stay float32.
        options: Options of the family, e.g. ``max_sequence_length`` for SD3; None counts as not given.

    Raises:
        FileNotFoundError: The folder does not exist or has no ``model_index.json``.
        ValueError: Unsupported family, unknown option, or missing weights.
    """
    path = located(path, "model")
    name = pipeline_class(path, revision)
    family = get_family(name)
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := given.keys() - inspect.signature(family).parameters:
        raise ValueError(f"model {path}: a {name} has no option {', '.join(sorted(unknown))}; leave it out")
    quantised = {} if quantise == "no" else {"quantization_config": quantisation(quantise, family.denoiser_name)}
    if os.environ.get("RANK", "0") == "0":
        print(f"loading {path} ({name})", file=sys.stderr)
    base = layout(path)
    with quiet_libraries() as lines, local_files(path):
        try:
            parts = {**absent_parts(base, family, revision), **family.load_options, **quantised}
            if (file := single_file(path)) is not None:
                parts = _with_file(file, parts, family, revision, torch.float32 if in_float32 else dtype)
            dtypes = {"default": dtype, **dict.fromkeys(in_float32, torch.float32)} if in_float32 else dtype
            pipeline = _from_pretrained(base, dtype=dtypes, revision=revision, **parts)
        except (RuntimeError, SafetensorError, ValueError) as error:
            elsewhere = isinstance(error, ValueError) and "expected shape" not in str(error)
            if elsewhere or isinstance(error, torch.OutOfMemoryError):
                raise
            why = (lines[-1] if lines else str(error))[:400]
            raise ValueError(f"model {path}: weights do not fit its configuration, copy it again ({why})") from error
        pipeline.vae.to(torch.float32)
    pass_on(f"model {path}", lines)
    pipeline.set_progress_bar_config(disable=True)
    return family(pipeline, **given)


def _with_file(
    file: SingleFile, parts: Mapping[str, Any], family: type[DiffusionModel], revision: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Add the parts that a single file holds to the arguments of ``from_pretrained``."""
    others, base = dict(parts), layout(file.text)
    quantised = others.pop("quantization_config", None)
    options = {} if quantised is None else {"quantization_config": quantised.quant_mapping[family.denoiser_name]}
    options |= {} if revision is None else {"config_revision": revision}
    index = DiffusionPipeline.load_config(base, revision=revision)
    return {**others, **load_parts(file, index["_class_name"], index, family.denoiser_name, dtype, **options)}


def absent_parts(path: str | Path, family: type[DiffusionModel], revision: str | None = None) -> dict[str, None]:
    """Return arguments, all None, for the parts that a pipeline lacks, such as the T5 of SD3.

    These are parts that ``model_index.json`` has as null, and optional ones whose folder is missing.
    """
    index = DiffusionPipeline.load_config(path, revision=revision)
    local = Path(path)
    return {
        name: None
        for name, entry in index.items()
        if isinstance(entry, (list, tuple))
        and (
            (len(entry) == 2 and entry[0] is None)
            or (name in family.optional_parts and local.is_dir() and not (local / name).is_dir())
        )
    }


def _from_pretrained(path: str | Path, **options: Any) -> DiffusionPipeline:
    """Load a pipeline, falling back to its fp16 files; if both fail, raise the first error of diffusers."""
    try:
        return DiffusionPipeline.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        if any(word in str(error) for word in ("no file named", "variant", ".safetensors", ".bin")):
            with suppress(OSError, ValueError):
                return DiffusionPipeline.from_pretrained(path, variant="fp16", **options)
        raise
