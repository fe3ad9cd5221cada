"""``diffalign export``: write trained weights in the format of diffusers, kohya's tools or peft, or merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffalign.commands.export_config import ExportConfig
from diffalign.embedded import located
from diffalign.evaluation.checkpoints import CheckpointSpec
from diffalign.evaluation.runs import RunConfig, find_run
from diffalign.models import load_model
from diffalign.models.base import DiffusionModel
from diffalign.models.checkpoint_context import weights_file
from diffalign.models.full_weights import load_full
from diffalign.models.lora_export import (
    DTYPES,
    save_pipeline,
    write_diffusers,
    write_kohya,
    write_merged,
    write_peft,
)
from diffalign.models.lora_factors import Updates, combine, resize
from diffalign.models.lora_reading import read_updates
from diffalign.models.meta_device import model_on_meta
from diffalign.models.negative_prompt import NEGATIVE_NAME
from diffalign.models.registry import load_family
from diffalign.tokens import printable


def run(config: ExportConfig) -> Path:
    """Write the export, print where it is, and return its file or folder.

    Raises:
        ValueError: The base is unknown, or the weights cannot be written in this format.
    """
    specs = config.specs()
    record = find_run(specs[0].path, config.allow_reward_code)
    family = config.family or (record.values.get("family") if record is not None and record.trusted else None)
    if family:
        load_family(family, config.allow_reward_code)
    base = config.model or _base_of(specs[0], record)
    revision = config.revision or (None if config.model or record is None else record.values.get("revision"))
    model, dtype = model_on_meta(base, revision=revision), DTYPES[config.dtype]
    load = partial(load_model, base, revision=revision, dtype=dtype)
    folder = config.output_dir or Path("runs/export") / f"{specs[0].folder_name}-{config.format}"
    files = [weights_file(model, spec.path) for spec in specs if spec.path is not None]
    _check_folder(folder, [*files, Path(base)], config.format == "merged")

    if full := next((file for file in files if file.is_dir()), None):
        written = _full(config, load, full, folder)
    else:
        updates, note = _updates(config, model, files, [spec.scale for spec in specs])
        if config.format == "merged":
            # Rounded once, after the sum.
            written = write_merged(load(in_float32=tuple(updates)), updates, folder, dtype)
        else:
            written = _write(config, model, updates, folder, base, {} if record is None else record.values)
        print(note)
    print(f"{written}: {config.format}, {config.dtype}")
    return written


def _check_folder(folder: Path, sources: Sequence[Path], merged: bool) -> None:
    """Raise ValueError for an output folder that holds what is read, or where a pipeline would replace other files."""
    here = folder.resolve()
    if folder.is_file():
        raise ValueError(f"output_dir {folder} is a file: name a folder")
    for source in (one.resolve() for one in sources if one.exists()):
        if here in (source, source.parent) or (merged and source.is_relative_to(here)):
            raise ValueError(f"output_dir {folder} holds {source}, which is read: name another folder")
    if merged and folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ValueError(f"output_dir {folder} holds other files, which a pipeline would replace: name a new folder")


def _base_of(spec: CheckpointSpec, record: RunConfig | None) -> str:
    """Return the base model of a run, or of a LoRA's header. ValueError: neither names one."""
    if record is not None and isinstance(found := record.values.get("model"), str):
        return str(located(found, "model"))
    for file in [spec.path, *sorted(spec.path.glob("*.safetensors"))] if spec.path else []:
        if file.is_file() and (found := _header(file).get("diffalign.base_model")):
            return str(located(found, "model"))
    beside = spec.path / "adapter_config.json" if spec.path else None
    if beside is not None and beside.is_file():
        found = json.loads(beside.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if isinstance(found, str) and found:
            return found
    raise ValueError(f"{spec.path} names no base model: write --model with the one that it was made for")


def _header(file: Path) -> Mapping[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):  # reading its tensors will report the error
        return {}


def _full(config: ExportConfig, load: Callable[[], DiffusionModel], weights: Path, folder: Path) -> Path:
    """Write a pipeline with a fully trained denoiser. ValueError: the options are those of a LoRA."""
    if config.format != "merged" or config.rank or len(config.models) > 1 or config.specs()[0].scale != 1:
        raise ValueError(
            f"{weights} holds all weights of a denoiser, no LoRA: write --format merged, without --rank, a scale or "
            "further models"
        )
    model = load()
    model.set_denoiser(load_full(model.raw_denoiser, weights, allow_partial=False))
    return save_pipeline(model.pipeline, folder, DTYPES[config.dtype])


def _updates(
    config: ExportConfig, model: DiffusionModel, files: list[Path], scales: list[float]
) -> tuple[Updates, str]:
    """Read, combine and resize the LoRAs; return them with a line about them."""
    if negative := next((file for file in files if file.name == NEGATIVE_NAME), None):
        raise ValueError(f"{negative} is a negative prompt, which other programs take as embeddings: nothing to export")
    read = [read_updates(model.pipeline, file) for file in files]
    updates = combine(list(zip(read, scales, strict=True)))
    kept = ""
    if config.rank is not None:
        updates, share = resize(updates, config.rank)
        kept = f", {share:.2%} of the squared norm kept"
    layers = [own for component in updates.values() for own in component.values()]
    ranks = sorted({own.rank for own in layers})
    several = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return updates, f"{len(layers)} layers of rank {several}{kept}"


def _write(
    config: ExportConfig, model: DiffusionModel, updates: Updates, folder: Path, base: str, record: Mapping[str, Any]
) -> Path:
    dtype = DTYPES[config.dtype]
    if config.format == "kohya":
        return write_kohya(model.pipeline, updates, folder, dtype, _training(base, record))
    if config.format == "peft":
        return write_peft(updates, folder, dtype, base)
    return write_diffusers(model.pipeline, updates, folder, dtype)


# Our field -> kohya's, of what both name.
TRAINING = {
    "learning_rate": "ss_learning_rate",
    "max_train_steps": "ss_max_train_steps",
    "seed": "ss_seed",
    "gradient_accumulation_steps": "ss_gradient_accumulation_steps",
    "max_grad_norm": "ss_max_grad_norm",
}


def _training(base: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Return header entries about the base and the run's settings."""
    known = {theirs: str(record[ours]) for ours, theirs in TRAINING.items() if record.get(ours) is not None}
    return {"ss_sd_model_name": printable(base), "ss_training_comment": "trained with diffalign", **known}
