"""Puts tuned weights onto a pipeline for a while: a LoRA at any scale, or full weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffalign.models.base import DiffusionModel
from diffalign.models.lora import WEIGHTS_NAME
from diffalign.models.weights import REFERENCE, WeightSets

ADAPTER = "compared"


def weights_file(model: DiffusionModel, path: Path) -> Path:
    """The file or folder that holds the tuned weights of ``path``.

    path: a LoRA file; a folder with ``pytorch_lora_weights.safetensors`` (a run, its ``raw/``, a checkpoint); or a
    folder whose subfolder, such as ``transformer/``, holds full weights. FileNotFoundError: none of these.
    """
    lora, full = path / WEIGHTS_NAME, path / model.denoiser_name
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if lora.is_file():
        return lora
    if (full / "config.json").is_file():
        return full
    raise FileNotFoundError(
        f"{path} holds neither {WEIGHTS_NAME} nor {model.denoiser_name}/: give a run folder, a checkpoint of a LoRA "
        "run, or a LoRA file"
    )


@contextmanager
def tuned(model: DiffusionModel, path: Path | None, scale: float = 1.0) -> Iterator[None]:
    """Within this context ``model`` draws with the weights of ``path``, loaded as plain diffusers loads them.

    Of tuned weights, ``model.using("reference")`` is the base's denoiser.

    path: as for ``weights_file``; None is the base model. scale: of the LoRA's update; 0 gives the base.
    ValueError: full weights at another scale than 1.
    """
    if path is None:
        yield
        return
    file = weights_file(model, path)
    with _lora(model, file, scale) if file.suffix == ".safetensors" else _full(model, file, scale):
        yield


@contextmanager
def _lora(model: DiffusionModel, file: Path, scale: float) -> Iterator[None]:
    pipeline = model.pipeline
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER)
    pipeline.set_adapters(ADAPTER, scale)
    try:
        with _sets(model, WeightSets(model.raw_denoiser, has_adapter=True)):
            yield
    finally:
        pipeline.unload_lora_weights()


@contextmanager
def _full(model: DiffusionModel, folder: Path, scale: float) -> Iterator[None]:
    if scale != 1:
        raise ValueError(f"{folder} holds full weights, which have no scale: leave out @{scale:g}")
    original = model.raw_denoiser
    other = type(original).from_pretrained(folder, torch_dtype=model.dtype).to(model.device)
    sets = WeightSets(other.requires_grad_(True), has_adapter=False)
    sets.add(REFERENCE, [parameter.data for parameter in original.parameters()])
    model.set_denoiser(other.requires_grad_(False).eval())
    try:
        with _sets(model, sets):
            yield
    finally:
        model.set_denoiser(original)


@contextmanager
def _sets(model: DiffusionModel, sets: WeightSets) -> Iterator[None]:
    before = vars(model).get("weights")
    model.weights = sets
    try:
        yield
    finally:
        if before is None:
            del model.weights
        else:
            model.weights = before
