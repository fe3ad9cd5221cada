"""LoRAs on CLIP text encoders, trained together with the denoiser's.

The encoders become submodules of the denoiser, so that optimizer, weight sets, averages, checkpoints and processes
treat their adapters like its own. A conditioning holds token ids instead of embeddings, and every evaluation encodes
them: a few percent of a UNet's work. Loss, sampling and caches stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config.sections import LoraConfig
from diffalign.models import lora
from diffalign.models.lora_factors import Factors, Updates

ATTRIBUTE = lora.NESTED
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
ZERO = -1  # token ids of a prompt whose embedding is zero


def attach(
    denoiser: nn.Module,
    encoders: Mapping[str, nn.Module],
    unused: Mapping[str, int],
    config: LoraConfig,
    seed: int,
    initial: Mapping[str, Mapping[str, Factors]],
    alpha: float | None,
) -> None:
    """Add trainable adapters to text encoders, and make them submodules of the denoiser.

    Args:
        denoiser: Changed in place.
        encoders: Component -> text encoder, changed in place.
        unused: Component -> number of its last layers whose output the pipeline does not read; they stay frozen.
        config: Rank, alpha and variants; its layers are those of the denoiser alone.
        seed: Seed of the initial weights.
        initial: Factors to go on from, of some of the encoders.
        alpha: Their own alpha; None for the rank of each layer.
    """
    for name, encoder in encoders.items():
        module: Any = encoder
        idle = idle_layers(module, unused.get(name, 0))
        if name in initial:
            lora.inject_initial(module, {n: own for n, own in initial[name].items() if n not in idle}, alpha)
            continue
        lora.add_adapter(
            module,
            seed,
            r=config.rank,
            lora_alpha=config.alpha or config.rank,
            target_modules=list(TARGETS),
            exclude_modules=[layer for layer in idle if layer.endswith(TARGETS)] or None,
            use_rslora=config.use_rslora,
        )
    denoiser.add_module(ATTRIBUTE, nn.ModuleDict(dict(encoders)))


def idle_layers(encoder: Any, unused: int) -> list[str]:
    """List the layers of the last blocks of a text encoder, whose output the pipeline does not read."""
    last = encoder.config.num_hidden_layers - unused
    numbers = {name: [int(part) for part in name.split(".") if part.isdigit()] for name, _ in encoder.named_modules()}
    return [name for name, found in numbers.items() if found and found[0] >= last]


def trains_text(denoiser: nn.Module) -> bool:
    """Return whether text encoders train with a denoiser."""
    return hasattr(denoiser, ATTRIBUTE)


def trained_updates(denoiser: nn.Module) -> Updates:
    """Return the current factors of the trained text encoders."""
    found: dict[str, dict[str, Factors]] = {}
    for component, encoder in getattr(denoiser, ATTRIBUTE, nn.ModuleDict()).items():
        for name, module in encoder.named_modules():
            layer: Any = module
            if "default" in getattr(layer, "lora_A", ()):
                down, up = (part["default"].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
                found.setdefault(component, {})[name] = Factors(down.clone(), up * layer.scaling["default"])
    return found


def hidden(encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Any]:
    """Encode token ids: (first output, all hidden states)."""
    output = encoder(ids.clamp_min(0), output_hidden_states=True)
    return output[0], output.hidden_states


def without_zeros(ids: Tensor, embedding: Tensor) -> Tensor:
    """Set the embeddings of rows that are ``ZERO`` to zero."""
    kept = (ids[:, 0] != ZERO).reshape(-1, *[1] * (embedding.ndim - 1))
    return torch.where(kept, embedding, torch.zeros_like(embedding))
