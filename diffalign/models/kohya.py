"""Convert LoRAs to and from the format of kohya's tools, which ComfyUI and Stable Diffusion web UIs read.

A module has ``<name>.lora_down.weight``, ``<name>.lora_up.weight`` and ``<name>.alpha``. Modules that fuse several
layers of diffusers, such as q, k and v, get their factors block by block, so that the update is exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffalign.models.kohya_names import FUSED, SAME, SWAPPED, UNREAD, Table, sgm_name
from diffalign.models.lora_factors import Factors, Updates, refuse_dora

DENOISER = "lora_unet_"  # of UNets and transformers alike
# Text encoders in the order of the pipeline; one alone has no number.
TEXT_ENCODERS = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@dataclass(frozen=True)
class Module:
    """A module of the original model.

    Attributes:
        name: As the file has it, such as ``lora_unet_double_blocks_0_img_attn_qkv``.
        component: Component of the pipeline.
        layers: Layers that it fuses, in the order of its rows.
        rows: Output features of each.
        swapped: Whether its two halves are in the other order.
    """

    name: str
    component: str
    layers: tuple[str, ...]
    rows: tuple[int, ...]
    swapped: bool = False


def kohya_modules(pipeline: DiffusionPipeline) -> list[Module]:
    """List the modules of a pipeline that a LoRA file of kohya's format can name.

    Raises:
        ValueError: No names are published for the class of its denoiser.
    """
    denoiser = "unet" if "unet" in pipeline.components else "transformer"
    modules = _of_denoiser(denoiser, getattr(pipeline, denoiser))
    encoders = [name for name in TEXT_ENCODERS if isinstance(getattr(pipeline, name, None), nn.Module)]
    for name in encoders:
        prefix = "lora_te_" if encoders == ["text_encoder"] and denoiser == "unet" else TEXT_ENCODERS[name]
        if _class_name(getattr(pipeline, name)).startswith("CLIP"):  # others have no names that all readers know
            modules += _of_text_encoder(name, getattr(pipeline, name), prefix)
    return modules


def _of_denoiser(component: str, network: Any) -> list[Module]:
    kind, layers = _class_name(network), _trainable(network)
    if kind in FUSED:
        return _fused(component, network, layers, FUSED[kind])
    if kind not in SAME:
        why = (
            "ComfyUI and kohya's tools load no LoRA" if kind in UNREAD else "no names of kohya's format are known here"
        )
        raise ValueError(f"{why} for a {kind}: use --format diffusers (or peft, or merged)")
    if getattr(network.config, "addition_embed_type", None) == "text_time":
        blocks = tuple("CrossAttn" in block for block in network.config.up_block_types)
        names = {name: sgm_name(name, network.config.layers_per_block, blocks) for name in layers}
    else:
        names = {name: name for name in layers}
    return [Module(_flat(DENOISER, names[name]), component, (name,), (rows,)) for name, rows in layers.items()]


def _class_name(network: nn.Module) -> str:
    """Return the class name; FSDP puts its own in front of it."""
    return type(network).__name__.removeprefix("FSDP")


def _trainable(network: nn.Module) -> dict[str, int]:
    """Return the output features of each linear layer and convolution."""
    return {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _fused(component: str, network: nn.Module, layers: Mapping[str, int], table: Table) -> list[Module]:
    found = []
    for theirs, ours in table.items():
        first = re.compile(re.escape(ours[0]).replace(r"\{\}", r"(\d+)"))
        for name in layers:
            if (match := first.fullmatch(name)) is None:
                continue
            parts = tuple(one.format(*match.groups()) for one in ours)
            swapped = type(network.get_submodule(name.rpartition(".")[0])).__name__ == SWAPPED
            rows = tuple(layers[part] for part in parts)
            found.append(Module(_flat(DENOISER, theirs.format(*match.groups())), component, parts, rows, swapped))
    return found


def _of_text_encoder(component: str, network: nn.Module, prefix: str) -> list[Module]:
    inside = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    return [
        Module(_flat(prefix, f"text_model.{name.removeprefix('text_model.')}"), component, (name,), (rows,))
        for name, rows in _trainable(network).items()
        if name.endswith(inside)
    ]


def _flat(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_")


def to_kohya(pipeline: DiffusionPipeline, updates: Updates) -> dict[str, Tensor]:
    """Return updates as tensors of a kohya file; each module's alpha is its rank, with a UNet the highest of all.

    diffusers applies one alpha to all layers of a UNet, so that alphas that differ would be misread.

    Raises:
        ValueError: A layer has no published name, or there is a DoRA or a bias, which the format lacks.
    """
    refuse_dora(updates, "written in kohya's format, whose readers scale weights by another norm")
    modules = kohya_modules(pipeline)
    known = {(module.component, layer) for module in modules for layer in module.layers}
    named = [(component, layer) for component, layers in updates.items() for layer in layers]
    if missing := [".".join(one) for one in named if one not in known]:
        raise ValueError(
            f"{len(missing)} layers have no name in kohya's format ({', '.join(missing[:4])}): leave them out of "
            "lora.targets, or use --format diffusers"
        )
    if any(own.bias is not None for layers in updates.values() for own in layers.values()):
        raise ValueError("kohya's format has no LoRA biases: use --format diffusers")
    parts = {m.name: [updates.get(m.component, {}).get(layer) for layer in m.layers] for m in modules}
    joined = {module.name: _joined(module, parts[module.name]) for module in modules if any(parts[module.name])}
    highest = max(own.rank for own in joined.values())
    tensors: dict[str, Tensor] = {}
    for name, own in joined.items():
        alpha = highest if "unet" in pipeline.components else own.rank
        tensors[f"{name}.lora_down.weight"] = own.down
        tensors[f"{name}.lora_up.weight"] = own.up * (own.rank / alpha)
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _joined(module: Module, parts: Sequence[Factors | None]) -> Factors:
    """Stack the factors of fused layers: ups on the diagonal, or above each other if they share one down."""
    present = [own for own in parts if own is not None]
    shared = all(torch.equal(own.down, present[0].down) for own in present)
    down = present[0].down if shared else torch.cat([own.down for own in present])
    up = torch.zeros(sum(module.rows), len(down), *present[0].up.shape[2:])
    row = column = 0
    for rows, own in zip(module.rows, parts, strict=True):
        if own is not None:
            up[row : row + rows, column : column + own.rank] = own.up
            column += 0 if shared else own.rank
        row += rows
    return Factors(down, _swap(up) if module.swapped else up)


def _swap(up: Tensor) -> Tensor:
    return torch.cat(up.chunk(2)[::-1])


def from_kohya(pipeline: DiffusionPipeline, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a kohya file under diffusers' names, alpha / rank multiplied into B.

    Tensors of modules that the pipeline lacks keep their names.
    """
    rest, state = dict(tensors), {}
    for module in kohya_modules(pipeline):
        names = [f"{module.name}.{part}" for part in ("lora_down.weight", "lora_up.weight")]
        if not rest.keys() >= set(names) or len(rest[names[1]]) != sum(module.rows):
            continue
        down, up = (rest.pop(name) for name in names)
        alpha = rest.pop(f"{module.name}.alpha", None)
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        up = _swap(up) if module.swapped else up
        for layer, own in zip(module.layers, up.split(module.rows), strict=True):
            used = own.flatten(1).any(dim=0)  # other columns belong to other layers
            if len(module.layers) > 1 and not used.any():
                continue
            kept = used if len(module.layers) > 1 else torch.ones_like(used)
            state[f"{module.component}.{layer}.lora_A.weight"] = down[kept].contiguous()
            state[f"{module.component}.{layer}.lora_B.weight"] = (own[:, kept] * scale).contiguous()
    return {**state, **rest}
