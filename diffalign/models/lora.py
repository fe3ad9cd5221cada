"""Inject a LoRA, export it in diffusers' layout, and check that the export is not all zero."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.atomic import replacing
from diffalign.config.sections import LoraConfig
from diffalign.lora_source import WEIGHTS_NAME as WEIGHTS_NAME
from diffalign.models.lora_factors import Factors, Updates, adapter_config, save_arguments
from diffalign.models.lora_layers import namesakes, select_layers

NESTED = "trained_text_encoders"  # submodule of a denoiser with text encoders, whose adapters have files of their own


def inject(
    module: nn.Module, config: LoraConfig, targets: tuple[str, ...], seed: int, idle: tuple[str, ...] = ()
) -> None:
    """Add a trainable float32 adapter to ``module`` and freeze the rest.

    Args:
        module: The denoiser, or a model of transformers, changed in place.
        config: Rank, alpha, layers and variants.
        targets: Default targets: layer names or their ends.
        seed: Seed of the adapter's initial weights.
        idle: Full names of layers to leave out.

    Raises:
        ValueError: A target or pattern matches no layer.
    """
    adapted, excluded = select_layers(module, config, targets, idle)
    add_adapter(
        module,
        seed,
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        target_modules=adapted,
        exclude_modules=excluded or None,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )


def inject_initial(module: ModelMixin, layers: Mapping[str, Factors], alpha: float | None) -> None:
    """Add a trainable float32 adapter with given weights to ``module`` and freeze the rest.

    Args:
        module: The denoiser, changed in place.
        layers: Layer -> factors.
        alpha: The adapter's own alpha, which scales its gradient; None for the rank of each layer.
    """
    settings = adapter_config(layers)
    if alpha is not None and not settings["rank_pattern"]:
        settings["lora_alpha"] = alpha
    add_adapter(module, 0, **settings, exclude_modules=namesakes(module, tuple(layers)) or None)
    with torch.no_grad():
        for name, own in layers.items():
            layer: Any = module.get_submodule(name)
            scale = layer.scaling["default"]
            layer.lora_A["default"].weight.copy_(own.down)
            layer.lora_B["default"].weight.copy_(own.up / scale)
            if own.bias is not None:
                layer.lora_B["default"].bias.copy_(own.bias / scale)
            if own.magnitude is not None:
                weight = layer.lora_magnitude_vector["default"].weight
                weight.copy_(own.magnitude.reshape(weight.shape))


def add_adapter(module: Any, seed: int, **settings: Any) -> None:
    """Add a trainable float32 adapter with settings of peft, and freeze the rest."""
    module.requires_grad_(False)
    # peft uses the global generator: fork it, so that the weights depend on the seed alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = PeftLoraConfig(init_lora_weights="gaussian", **settings)
        if isinstance(module, ModelMixin):
            module.add_adapter(own)
        else:  # transformers' own method asks for newer versions of peft than its other parts
            inject_adapter_in_model(own, module, "default")
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def export(
    pipeline: DiffusionPipeline,
    component: str,
    directory: Path,
    about: Mapping[str, str] | None = None,
    whole: Mapping[str, Tensor] | None = None,
    beside: Updates | None = None,
) -> Path:
    """Write ``pytorch_lora_weights.safetensors``: float32, with alpha / rank multiplied into B.

    The header says alpha = rank, so that readers that ignore it get the same update. The module keeps its own alpha.

    Args:
        pipeline: Defines the layout of the file.
        component: Name of the module with the adapter, "unet" or "transformer".
        directory: Folder of the file.
        about: Further header entries, such as the base model.
        whole: Gathered adapter weights by name, for a sharded module.
        beside: Updates of text encoders, to write into the same file.
    """
    module = getattr(pipeline, component)
    trained = get_peft_model_state_dict(module, state_dict=whole)
    own = {name: tensor for name, tensor in trained.items() if not name.startswith(f"{NESTED}.")}
    layers = {name: t.detach().float().cpu().clone() for name, t in own.items()}
    metadata = module.peft_config["default"].to_dict()
    fold_scale(module, layers, metadata)
    metadata["target_modules"] = sorted(metadata["target_modules"])  # sort the set, so that files are reproducible
    if metadata["exclude_modules"]:
        # Loaders warn of missing excluded layers, and of name ends that match layers not in the file.
        metadata["exclude_modules"] = None
        metadata["target_modules"] = sorted({name.rsplit(".lora_", 1)[0] for name in layers})
    named: dict[str, Any] = {f"{component}_lora_layers": layers, f"{component}_lora_adapter_metadata": metadata}
    named |= save_arguments(beside or {})
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
