"""Puts what was tuned onto a pipeline for a while: a LoRA at any scale, full weights, or a negative prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffalign.models.base import DiffusionModel
from diffalign.models.lora import WEIGHTS_NAME
from diffalign.models.negative import NEGATIVE_NAME
from diffalign.models.weights import REFERENCE, WeightSets

ADAPTER = "compared"


def weights_file(model: DiffusionModel, path: Path) -> Path:
    """The file or folder that holds the tuned weights of ``path``.

    path: the file of a LoRA or a negative prompt; a folder with ``pytorch_lora_weights.safetensors`` or
    ``negative_prompt.safetensors`` (a run, its ``raw/``, a checkpoint); or a folder whose subfolder, such as
    ``transformer/``, holds full weights. FileNotFoundError: none of these.
    """
    files, full = (path / WEIGHTS_NAME, path / NEGATIVE_NAME), path / model.denoiser_name
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if found := [file for file in files if file.is_file()]:
        return found[0]
    if (full / "config.json").is_file():
        return full
    raise FileNotFoundError(
        f"{path} holds no {WEIGHTS_NAME}, {NEGATIVE_NAME} or {model.denoiser_name}/: give a run folder, a checkpoint "
        "of a LoRA run, or a LoRA file"
    )


@contextmanager
def tuned(model: DiffusionModel, path: Path | None, scale: float = 1.0) -> Iterator[None]:
    """Within this context ``model`` draws with the weights of ``path``, loaded as plain diffusers loads them.

    A negative prompt is ``model.negative``, to guide away from. Of all that is tuned, ``model.using("reference")`` is
    the base's.

    path: as for ``weights_file``; None is the base model. scale: of the LoRA's update; 0 gives the base.
    ValueError: full weights or a negative prompt at another scale than 1, or of another model.
    """
    if path is None:
        yield
        return
    file = weights_file(model, path)
    kind = _negative if file.name == NEGATIVE_NAME else _lora if file.suffix == ".safetensors" else _full
    if kind is not _lora and scale != 1:
        raise ValueError(f"{file} is no LoRA, and has no scale: leave out @{scale:g}")
    with _weights_kept(model), kind(model, file, scale):
        yield


@contextmanager
def _lora(model: DiffusionModel, file: Path, scale: float) -> Iterator[None]:
    pipeline = model.pipeline
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER)
    pipeline.set_adapters(ADAPTER, scale)
    try:
        model.weights = WeightSets(model.raw_denoiser, has_adapter=True)
        yield
    finally:
        pipeline.unload_lora_weights()


@contextmanager
def _full(model: DiffusionModel, folder: Path, scale: float) -> Iterator[None]:
    original = model.raw_denoiser
    other = type(original).from_pretrained(folder, torch_dtype=model.dtype).to(model.device)
    model.weights = WeightSets(other.requires_grad_(True), has_adapter=False)
    model.weights.add(REFERENCE, [parameter.data for parameter in original.parameters()])
    model.set_denoiser(other.requires_grad_(False).eval())
    try:
        yield
    finally:
        model.set_denoiser(original)


@contextmanager
def _negative(model: DiffusionModel, file: Path, scale: float) -> Iterator[None]:
    try:
        model.load_negative(file)
        yield
    finally:
        model.negative = None


@contextmanager
def _weights_kept(model: DiffusionModel) -> Iterator[None]:
    before = vars(model).get("weights")
    try:
        yield
    finally:
        if before is not None:
            model.weights = before
        else:
            vars(model).pop("weights", None)
