"""Apply a checkpoint to a model within a context: a LoRA at any scale, full weights, or a negative prompt.

Unused tensors of a file are an error that names them. A failed load leaves the model unchanged.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from diffalign.lora_source import HALF_NAME, PEFT_WEIGHTS, WEIGHTS_NAME
from diffalign.models.base import DiffusionModel
from diffalign.models.full_weights import load_full
from diffalign.models.lora_file import LoraFile, convert, fold_alphas, read_lora
from diffalign.models.lora_reading import diffusers_state, read_updates
from diffalign.models.negative_prompt import NEGATIVE_NAME
from diffalign.models.quiet import quiet_libraries
from diffalign.models.weights import REFERENCE, WeightSets

ADAPTER = "compared"
PARTIAL = "set allow_partial (--allow_partial) to go on with the rest"


def weights_file(model: DiffusionModel, path: Path) -> Path:
    """Find the file or folder of the tuned weights in ``path``.

    Args:
        model: Its denoiser's name is the subfolder of full weights.
        path: File of a LoRA or negative prompt; folder with ``pytorch_lora_weights.safetensors`` or
            ``negative_prompt.safetensors`` (a run, its ``raw/``, a checkpoint), or with peft's
            ``adapter_model.safetensors``; or folder with full weights in a subfolder such as ``transformer/``.

    Raises:
        FileNotFoundError: None of these.
    """
    files = [path / name for name in (WEIGHTS_NAME, HALF_NAME, NEGATIVE_NAME, PEFT_WEIGHTS)]
    full = path / model.denoiser_name
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
def with_tuned_weights(
    model: DiffusionModel, path: Path | None, scale: float = 1.0, *, allow_partial: bool = False
) -> Iterator[None]:
    """Run ``model`` with the weights of ``path`` within this context, loaded as diffusers loads them.

    A negative prompt becomes ``model.negative``. ``model.using("reference")`` gives the base weights of all three
    kinds. On exit, and after any error, the model is unchanged.

    Args:
        model: A base model without an adapter.
        path: As for ``weights_file``; None keeps the base weights.
        scale: Scale of the LoRA's update, any finite number; 0 gives the base.
        allow_partial: Warn instead of raising if the model lacks some layers of the file.

    Raises:
        ValueError: Some of the file is unused (without ``allow_partial``) or all of it; the file is damaged, empty or
            not finite; ``scale`` is not 1 for full weights or a negative prompt; or the weights fit another model.
    """
    if path is None:
        yield
        return
    if not math.isfinite(scale):
        raise ValueError(f"{path}: scale {scale} is not finite; 1 is the LoRA as trained")
    file = weights_file(model, path)
    kind = _negative if file.name == NEGATIVE_NAME else _lora if file.suffix == ".safetensors" else _full
    if kind is not _lora and scale != 1:
        raise ValueError(f"{file} is no LoRA, and has no scale: leave out @{scale:g}")
    with _weights_kept(model), kind(model, file, scale, allow_partial):
        yield


def check_weights(model: DiffusionModel, path: Path | None, *, allow_partial: bool = False) -> None:
    """Check before any work that ``path`` holds weights, and that a LoRA fits.

    Raises what ``with_tuned_weights`` would raise.
    """
    if path is not None and (file := weights_file(model, path)).suffix == ".safetensors" and file.name != NEGATIVE_NAME:
        _fitting(model, file, allow_partial)


def _fitting(model: DiffusionModel, file: Path, allow_partial: bool) -> LoraFile:
    """Read a LoRA. ValueError: some of it is unused, or with ``allow_partial`` all of it."""
    found = read_lora(model.pipeline, file)
    if not found.used:
        kind = type(model.pipeline).__name__
        raise ValueError(f"{found.problem()}: a LoRA of another family than this {kind}? Give the base it was made for")
    if found.unused and not allow_partial:
        raise ValueError(f"{found.problem()}: give the base that it was made for, or {PARTIAL}")
    return found


@contextmanager
def _lora(model: DiffusionModel, file: Path, scale: float, allow_partial: bool) -> Iterator[None]:
    found = _fitting(model, file, allow_partial)
    if found.unused:
        warnings.warn(found.problem(), stacklevel=5)
    source: Any = file.parent
    how: dict[str, Any] = {"weight_name": file.name, "use_safetensors": True}
    if convert(model.pipeline, file).converted_here:
        source, how = diffusers_state(read_updates(model.pipeline, file, allow_partial=True)), {}
    with _structure_kept(model):
        try:
            with quiet_libraries(), warnings.catch_warnings(), _only(model, found):
                warnings.simplefilter("ignore")  # peft warns about skipped layers
                model.pipeline.load_lora_weights(source, adapter_name=ADAPTER, **how)
                model.pipeline.set_adapters(ADAPTER, scale)
        except Exception as error:  # of diffusers, transformers or peft
            raise ValueError(f"{file} does not load into this model: {str(error)[:500]}") from error
        loaded = sum(ADAPTER in name.split(".") for part in _modules(model) for name, _ in part.named_parameters())
        if loaded < len(found.used):
            raise ValueError(f"{file}: {loaded} of {len(found.used)} tensors were loaded, the others were passed over")
        model.weights = WeightSets(model.raw_denoiser, has_adapter=bool(getattr(model.raw_denoiser, "peft_config", 0)))
        yield


@contextmanager
def _only(model: DiffusionModel, found: LoraFile) -> Iterator[None]:
    """Restrict the pipeline's LoRA loader to usable tensors, with each layer's alpha folded in."""
    pipeline = model.pipeline
    read: Callable = pipeline.lora_state_dict

    def usable(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        state, *rest = read(*args, **kwargs)
        state, rest = fold_alphas(state, rest)
        return {name: tensor for name, tensor in state.items() if name in found.used}, *rest

    vars(pipeline)["lora_state_dict"] = usable
    try:
        yield
    finally:
        del vars(pipeline)["lora_state_dict"]


@contextmanager
def _full(model: DiffusionModel, folder: Path, scale: float, allow_partial: bool) -> Iterator[None]:
    original = model.raw_denoiser
    other = load_full(original, folder, allow_partial)
    model.weights = WeightSets(other.requires_grad_(True), has_adapter=False)
    model.weights.add(REFERENCE, [parameter.data for parameter in original.parameters()])
    model.set_denoiser(other.requires_grad_(False).eval())
    try:
        yield
    finally:
        model.set_denoiser(original)


@contextmanager
def _negative(model: DiffusionModel, file: Path, scale: float, allow_partial: bool) -> Iterator[None]:
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


def _modules(model: DiffusionModel) -> list[nn.Module]:
    return [part for part in model.pipeline.components.values() if isinstance(part, nn.Module)]


@contextmanager
def _structure_kept(model: DiffusionModel) -> Iterator[None]:
    """Restore every component's modules, tensors and flags by identity on exit.

    Adapters wrap layers and never write to the wrapped weights, so references are enough.
    """
    parts = [module for part in _modules(model) for module in part.modules()]
    before = [(module, _contents(module), dict(vars(module))) for module in parts]
    flags = [(tensor, tensor.requires_grad) for part in _modules(model) for tensor in part.parameters()]
    try:
        yield
    finally:
        for module, contents, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
            for name, kept in contents.items():
                held = vars(module)[name]
                held.clear()
                held.update(kept)
        for tensor, flag in flags:
            tensor.requires_grad_(flag)


def _contents(module: nn.Module) -> dict[str, dict]:
    return {name: dict(vars(module)[name]) for name in ("_modules", "_parameters", "_buffers", "_forward_hooks")}
