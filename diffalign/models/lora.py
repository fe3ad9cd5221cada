"""Inject a LoRA, export it in diffusers' layout, and check that the export is not all zero."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.atomic import replacing
from diffalign.config.sections import LoraConfig
from diffalign.lora_source import WEIGHTS_NAME as WEIGHTS_NAME


def inject(
    module: ModelMixin, config: LoraConfig, targets: tuple[str, ...], seed: int, idle: tuple[str, ...] = ()
) -> None:
    """Add a trainable float32 adapter to ``module`` and freeze the rest.

    Args:
        module: The denoiser, changed in place.
        config: Rank, alpha and targets.
        targets: Default targets: layer names or their ends.
        seed: Seed of the adapter's initial weights.
        idle: Full names of layers to leave out.

    Raises:
        ValueError: A target matches no layer.
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
    # peft uses the global generator: fork it, so that the weights depend on the seed alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.add_adapter(peft_config)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _named(layer: str, target: str) -> bool:
    """Tell whether ``target`` is a layer's name or its end."""
    return layer == target or layer.endswith("." + target)


def export(
    pipeline: DiffusionPipeline,
    component: str,
    directory: Path,
    about: Mapping[str, str] | None = None,
    whole: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write ``pytorch_lora_weights.safetensors``: float32, with alpha / rank multiplied into B.

    The header says alpha = rank, so that readers that ignore it get the same update. The module keeps its own alpha.

    Args:
        pipeline: Defines the layout of the file.
        component: Name of the module with the adapter, "unet" or "transformer".
        directory: Folder of the file.
        about: Further header entries, such as the base model.
        whole: Gathered adapter weights by name, for a sharded module.
    """
    module = getattr(pipeline, component)
    trained = get_peft_model_state_dict(module, state_dict=whole)
    layers = {name: t.detach().float().cpu().clone() for name, t in trained.items()}
    metadata = module.peft_config["default"].to_dict()
    fold_scale(module, layers, metadata)
    metadata["target_modules"] = sorted(metadata["target_modules"])  # sort the set, so that files are reproducible
    if metadata["exclude_modules"]:
        # Loaders warn of missing excluded layers, and of name ends that match layers not in the file.
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


def fold_scale(module: ModelMixin, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Multiply each layer's scale, usually alpha / rank, into its B, and set alpha = rank in the metadata, in place."""
    for name, tensor in layers.items():
        layer, _, part = name.rpartition(".lora_")
        if part.startswith("B."):
            tensor *= module.get_submodule(layer).scaling["default"]
    metadata["lora_alpha"] = metadata["r"]
    metadata["alpha_pattern"] = dict(metadata.get("rank_pattern") or {})
    metadata["use_rslora"] = False


def learned_nothing(path: Path) -> bool:
    """Warn and return True if every B matrix of an exported LoRA is zero."""
    weights = load_file(path)
    idle = not any(bool(t.any()) for name, t in weights.items() if ".lora_B." in name)
    if idle:
        warnings.warn(f"{path}: every update is zero, this LoRA changes nothing (did training run?)", stacklevel=2)
    return idle
