"""Read a LoRA file of any format as low-rank updates by component and layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from diffalign.models.lora_factors import Factors, Updates, adapter_state
from diffalign.models.lora_file import convert, peft_parts, read_lora

PARTS = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}

SCALED = ("up", "bias")


def read_updates(pipeline: DiffusionPipeline, file: Path, *, allow_partial: bool = False) -> Updates:
    """Read the updates of a LoRA file that diffusers, peft or kohya's tools wrote.

    Args:
        pipeline: The model that it belongs to; on the meta device is enough.
        file: The file. An ``adapter_config.json`` beside it, as peft writes, tells rank and alpha.
        allow_partial: Leave out what does not fit the pipeline.

    Raises:
        ValueError: Some of the file does not fit the pipeline, or it cannot be read.
    """
    found = read_lora(pipeline, file)
    if not found.used or (found.unused and not allow_partial):
        raise ValueError(f"{found.problem()}: give the base that it was made for (--model)")
    content = convert(pipeline, file)
    state = {name: tensor for name, tensor in content.state.items() if name in found.used}
    metadata = content.metadata or {}
    updates: dict[str, dict[str, Factors]] = {}
    for component in pipeline._lora_loadable_modules:
        module = getattr(pipeline, component, None)
        own = {name.removeprefix(f"{component}."): t for name, t in state.items() if name.startswith(f"{component}.")}
        if isinstance(module, nn.Module) and own:
            config = {
                key.removeprefix(f"{component}."): value
                for key, value in metadata.items()
                if key.startswith(f"{component}.")
            }
            updates[component] = _layers(module, own, config)
    return updates


def trained_alpha(pipeline: DiffusionPipeline, file: Path) -> float | None:
    """Return the alpha that a LoRA was trained with, as its header says; None if it says nothing.

    Exports of this package have alpha / rank in their weights, and a header of their own.
    """
    with safe_open(file, "pt") as opened:
        own = (opened.metadata() or {}).get("diffalign.trained_alpha")
    try:
        if own is not None and float(own) > 0:
            return float(own)
    except ValueError:
        pass
    denoiser = "unet" if "unet" in pipeline.components else "transformer"
    alpha = (convert(pipeline, file).metadata or {}).get(f"{denoiser}.lora_alpha")
    return float(alpha) if isinstance(alpha, int | float) and alpha > 0 else None


def diffusers_state(updates: Updates) -> dict[str, Tensor]:
    """Return updates under diffusers' names, as ``pipe.load_lora_weights`` takes them."""
    return {
        f"{component}.{name}": tensor
        for component, layers in updates.items()
        for name, tensor in adapter_state(layers).items()
    }


def _layers(module: nn.Module, state: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Factors]:
    """Group the tensors of a component by layer, and fold each layer's scale into its up factor."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, (layer, part, rest) in peft_parts(module, state).items():
        parts.setdefault(layer, {})["bias" if rest == ".bias" else PARTS[part]] = state[name].float()
    found = {}
    for layer, own in parts.items():
        scale = _scale(layer, len(own["down"]), config)
        found[layer] = Factors(**(own | {part: own[part] * scale for part in own if part in SCALED and scale != 1}))
    return found


def _scale(layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """Return alpha / rank of a layer, by peft's rules; 1 if the file says nothing of it."""
    if not config:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), layer), config.get("lora_alpha", rank))
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
