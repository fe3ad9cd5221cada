"""Add the weights of a PEFT adapter to the network that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "base_model.model."
# Settings of PEFT under which the update is not alpha / r B A.
OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")


@torch.no_grad()
def merge_lora(network: nn.Module, tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: str) -> None:
    """Add alpha / r B A to each linear layer of ``network`` that the adapter targets, computed in float32 or wider.

    Args:
        network: with the layer names that the adapter was saved with.
        tensors: the adapter's weights.
        config: its ``adapter_config.json``.
        path: shown in errors.

    Raises:
        ValueError: an adapter of another kind, or that has weights too many or too few for the network.
    """
    if other := [name for name in OTHER_KINDS if config.get(name)]:
        raise ValueError(f"{path} is an adapter with {', '.join(other)}, which cannot be merged: use a plain LoRA")
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    wanted = {
        f"{PREFIX}{name}.lora_{part}.weight"
        for name in layers
        if _targeted(name, config["target_modules"]) and not _targeted(name, config.get("exclude_modules") or ())
        for part in "AB"
    }
    if wrong := sorted(wanted ^ tensors.keys()):
        raise ValueError(
            f"{path} does not fit the network: {len(wrong)} weights are missing or unexpected, such as {wrong[:3]}; "
            "check the base model"
        )

    for name, layer in layers.items():
        down, up = (tensors.get(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB")
        if down is not None and up is not None:
            if up.shape[0] != layer.out_features or down.shape[1] != layer.in_features or len(down) != config["r"]:
                raise ValueError(f"{path} does not fit the network: {name} has another shape; check the base model")
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            update = config["lora_alpha"] / config["r"] * (up.to(dtype) @ down.to(dtype))
            layer.weight.copy_(layer.weight.to(dtype) + update)


def _targeted(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a layer's name is among ``targets``, or ends with one of them after a dot, as PEFT matches."""
    known = [targets] if isinstance(targets, str) else targets
    return any(name == target or name.endswith(f".{target}") for target in known)
