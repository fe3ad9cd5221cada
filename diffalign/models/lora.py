"""The LoRA: inject it, write it in diffusers' own layout, and check that what was written is what was trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.atomic import replacing
from diffalign.config.sections import LoraConfig

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def inject(
    module: nn.Module, config: LoraConfig, targets: tuple[str, ...], seed: int, idle: tuple[str, ...] = ()
) -> None:
    """Adds a trainable float32 adapter to ``module``, freezes the rest. idle: full names of layers to leave out.

    ValueError where a target matches no layer.
    """
    wanted = config.targets or targets
    names = [name for name, _ in module.named_modules()]
    if missing := [t for t in wanted if not any(_named(n, t) for n in names)]:
        linear = sorted(
            {n.split(".", 2)[-1] for n, m in module.named_modules() if isinstance(m, nn.Linear) and "." in n}
        )
        raise ValueError(
            f"lora.targets: no layer is named {', '.join(missing)}; layers of a block: {', '.join(linear)}"
        )
    module.requires_grad_(False)
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        init_lora_weights="gaussian",
        target_modules=sorted(wanted),
        exclude_modules=[name for name in idle if any(_named(name, t) for t in wanted)] or None,
    )
    # peft draws from the global generator; a fork keeps it untouched and the draw a function of the seed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.add_adapter(peft_config)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _named(layer: str, target: str) -> bool:
    """Whether ``target`` is the name of a layer, or its end."""
    return layer == target or layer.endswith("." + target)


def export(
    pipeline: DiffusionPipeline,
    component: str,
    directory: Path,
    about: Mapping[str, str] | None = None,
    whole: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``pytorch_lora_weights.safetensors``: float32, with alpha / rank multiplied into B.

    The header says alpha = rank, so that readers that use it and readers that do not get the same update. The module
    keeps its own alpha.

    Args:
        pipeline: whose layout the file has.
        component: the pipeline's name for the module with the adapter, "unet" or "transformer".
        directory: where the file goes.
        about: what else the header of the file is to say, such as the base model.
        whole: the adapter's weights by name, where the module has shards.
    """
    module = getattr(pipeline, component)
    trained = get_peft_model_state_dict(module, state_dict=whole)
    layers = {name: t.detach().float().cpu().clone() for name, t in trained.items()}
    metadata = module.peft_config["default"].to_dict()
    fold_scale(module, layers, metadata)
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set: its order would differ between files
    if metadata["exclude_modules"]:
        # Loaders warn of excluded layers that are not there, and of ends of names that match more than the file has.
        metadata["exclude_modules"] = None
        metadata["target_modules"] = sorted({name.rsplit(".lora_", 1)[0] for name in layers})
    named = {f"{component}_lora_layers": layers, f"{component}_lora_adapter_metadata": metadata}
    path = directory / WEIGHTS_NAME
    with replacing(path) as staged:
        pipeline.save_lora_weights(save_directory=directory, weight_name=staged.name, **named)
        if about:
            with safe_open(staged, "pt") as file:
                known = file.metadata() or {}
            save_file(load_file(staged), staged, {**known, **about})
    return path


def fold_scale(module: nn.Module, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Multiply each layer's scale, alpha / rank in most, into its B, and set alpha = rank in the metadata, in place."""
    for name, tensor in layers.items():
        layer, _, part = name.rpartition(".lora_")
        if part.startswith("B."):
            tensor *= module.get_submodule(layer).scaling["default"]
    metadata["lora_alpha"] = metadata["r"]
    metadata["alpha_pattern"] = dict(metadata.get("rank_pattern") or {})
    metadata["use_rslora"] = False


def learned_nothing(path: Path) -> bool:
    """True, with a warning, when every B matrix of an exported LoRA is still zero."""
    weights = load_file(path)
    idle = not any(bool(t.any()) for name, t in weights.items() if ".lora_B." in name)
    if idle:
        warnings.warn(f"{path}: every update is zero, this LoRA changes nothing (did training run?)", stacklevel=2)
    return idle
