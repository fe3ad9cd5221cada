"""Check a LoRA file against a pipeline before loading any of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.lora_source import PEFT_CONFIG, PEFT_WEIGHTS
from diffalign.models.kohya import from_kohya
from diffalign.models.quiet import quiet_libraries

SHOWN = 4  # names in a message
# Names of low-rank update tensors in diffusers' and kohya's formats.
PART = re.compile(
    r"lora_[AB]\b|lora_(up|down)\b|lora_linear_layer\.(up|down)|_lora\.(up|down)|lora_magnitude_vector|alpha$"
)
PEFT_PART = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)(?=\.|$)")
# Prefixes of pipeline components in kohya's format.
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_")
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Content:
    """The tensors of a LoRA file under diffusers' names.

    Attributes:
        state: Component and layer, such as ``transformer.<layer>.lora_A.weight`` -> tensor.
        metadata: Settings of peft by ``<component>.<key>``, of which alpha counts; None: alpha is the rank.
        converted_here: Whether the file is of a format that is converted by this package.
        dropped: Tensors that the conversion left out without an error.
    """

    state: dict[str, Tensor]
    metadata: Mapping[str, Any] | None
    converted_here: bool = False
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as diffusers reads it for one pipeline.

    Attributes:
        path: The file.
        used: Names in the converted state dict that match layers of the pipeline.
        unused: Reason for each other tensor, by its name in the converted state dict or in the file.
    """

    path: Path
    used: frozenset[str]
    unused: Mapping[str, str]

    def problem(self) -> str:
        """Describe the unused tensors, naming a few; empty if all are used."""
        if not self.unused:
            return ""
        first = list(self.unused.items())[:SHOWN]
        named = "; ".join(f"{name[:120]}: {reason}" for name, reason in first)
        more = f"; and {len(self.unused) - SHOWN} more" if len(self.unused) > SHOWN else ""
        total = len(self.used) + len(self.unused)
        return f"{self.path}: {len(self.unused)} of {total} tensors do not fit this model ({named}{more})"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file. ValueError: it is damaged, empty, or has non-finite values."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file ({str(error)[:200]}): copy it again") from error
    if not tensors:
        raise ValueError(f"{path} holds no weights: was it written to its end?")
    if broken := [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]:
        raise ValueError(f"{path}: {_few(broken)} hold values that are not finite: use an earlier checkpoint")
    return tensors


def read_lora(pipeline: DiffusionPipeline, path: Path) -> LoraFile:
    """Match the tensors of a LoRA file to layers of the pipeline, without changing the pipeline.

    Raises:
        ValueError: The file cannot be read, or diffusers cannot convert it for this pipeline.
    """
    raw = read_tensors(path)
    foreign = {name: "no part of a LoRA that diffusers loads" for name in raw if not PART.search(_part_of(name))}
    content = convert(pipeline, path)
    state = content.state
    foreign |= dict.fromkeys(content.dropped, "a module that this model lacks")
    misplaced = _misplaced(pipeline, state)
    unused = {**foreign, **{name: reason for name, reason in misplaced.items() if name not in foreign}}
    return LoraFile(path, frozenset(state.keys() - unused.keys()), unused)


def _misplaced(pipeline: DiffusionPipeline, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the reason for each tensor, under diffusers' names, that fits no layer of the pipeline."""
    found: dict[str, str] = {}
    parts = {name: getattr(pipeline, name, None) for name in pipeline._lora_loadable_modules}
    for prefix, component in parts.items():
        own = {name: t for name, t in state.items() if name.startswith(prefix + ".")}
        if not isinstance(component, nn.Module):
            found |= dict.fromkeys(own, f"this pipeline has no {prefix}")
            continue
        bad = _unfit(component, {name.removeprefix(prefix + "."): t for name, t in own.items()})
        found |= {f"{prefix}.{name}": reason for name, reason in bad.items()}
    elsewhere = (name for name in state if not name.startswith(tuple(f"{prefix}." for prefix in parts)))
    return found | dict.fromkeys(elsewhere, f"it belongs to none of {', '.join(parts)}")


def convert(pipeline: DiffusionPipeline, path: Path) -> Content:
    """Read a LoRA file under diffusers' names: kohya's and peft's formats here, others by diffusers.

    diffusers converts kohya files of some models only, of some sizes or layers only, and drops what it does not know.

    Raises:
        ValueError: The file cannot be read or converted, or diffusers loads no LoRA into the pipeline.
    """
    if not getattr(pipeline, "_lora_loadable_modules", ()):
        kind = type(pipeline).__name__
        raise ValueError(
            f"{path}: diffusers loads no LoRA into a {kind}; give full weights, of a run with lora.rank: 0"
        )
    raw = read_tensors(path)
    if any(name.startswith(PEFT_PREFIX) for name in raw):
        return _from_peft(pipeline, path, raw)
    kohya = any(name.startswith(KOHYA) for name in raw) and not any("dora_scale" in name for name in raw)
    read: dict[str, Tensor] = {}
    if kohya:
        with suppress(ValueError):  # no names are published
            read = from_kohya(pipeline, raw)
    rest = tuple(name for name in read if name.startswith(KOHYA))
    if read and not rest:
        return Content(read, None, converted_here=True)
    try:
        state, metadata = _as_diffusers(pipeline, path)
    except Exception as error:  # diffusers' converters raise various types on unknown formats
        kind = type(pipeline).__name__
        raise ValueError(f"{path} is no LoRA for a {kind}: {str(error)[:300]}") from error
    # diffusers reads no more than was read here, so it drops the rest.
    dropped = rest if len(state) <= len(read) - len(rest) else ()
    return Content(state, metadata, dropped=dropped)


def _from_peft(pipeline: DiffusionPipeline, path: Path, raw: Mapping[str, Tensor]) -> Content:
    """Add the component's name to peft's, and read ``adapter_config.json``, which tells alpha.

    Adapters of text encoders are in folders of their names beside it, as ``write_peft`` writes them.
    """
    layers = {name: name.removeprefix(PEFT_PREFIX).rsplit(".lora_", 1)[0] for name in raw}
    parts = {name: getattr(pipeline, name, None) for name in pipeline._lora_loadable_modules}
    known = {name: {layer for layer, _ in part.named_modules()} for name, part in parts.items() if part is not None}
    # The component that has most of the layers.
    component = max(known, key=lambda name: sum(layer in known[name] for layer in layers.values()))
    adapters = {component: (path, raw)}
    for name in known:
        if name != component and (beside := path.parent / name / PEFT_WEIGHTS).is_file():
            adapters[name] = beside, read_tensors(beside)
    state: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for name, (file, tensors) in adapters.items():
        state |= {f"{name}.{key.removeprefix(PEFT_PREFIX)}": tensor for key, tensor in tensors.items()}
        metadata |= {f"{name}.{key}": value for key, value in _peft_config(file).items()}
    return Content(state, metadata, converted_here=True)


def _peft_config(weights: Path) -> dict[str, Any]:
    """Read the settings beside a file of peft. ValueError: they cannot be read."""
    file = weights.parent / PEFT_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{weights} is a LoRA of peft, and {file} cannot be read: copy it beside the weights"
        ) from error
    return config


def fold_alphas(state: Mapping[str, Tensor], rest: Sequence[Any]) -> tuple[dict[str, Tensor], list[Any]]:
    """Multiply each layer's alpha / rank into its B if diffusers returns alphas separately.

    diffusers passes peft one alpha for all layers of a UNet, and drops those of layers with another one.

    Args:
        state: Converted tensors.
        rest: Further results of ``lora_state_dict``: alphas by name or None, and metadata.
    """
    folded = dict(state)
    if not rest or not rest[0] or not all(name.endswith("alpha") for name in rest[0]):
        return folded, list(rest)
    for name, alpha in rest[0].items():
        stem = name.removesuffix(".alpha").removesuffix(".lora_A.weight").removesuffix(".down.weight")
        for down, up in ((".lora_A.weight", ".lora_B.weight"), (".down.weight", ".up.weight")):
            if stem + down in folded and stem + up in folded:
                folded[stem + up] = folded[stem + up] * (float(alpha) / len(folded[stem + down]))
    return folded, [None, *rest[1:]]


def _part_of(name: str) -> str:
    """Strip kohya's prefix, which contains "lora" for any tensor."""
    return next((name.removeprefix(prefix) for prefix in KOHYA if name.startswith(prefix)), name)


def _as_diffusers(pipeline: DiffusionPipeline, path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    options: dict[str, Any] = {"weight_name": path.name, "return_lora_metadata": True, "use_safetensors": True}
    if "unet" in pipeline.components:
        options["unet_config"] = pipeline.unet.config
    with quiet_libraries():
        state, *rest = pipeline.lora_state_dict(path.parent, **options)
    state, rest = fold_alphas(state, rest)
    return state, next((found for found in rest[::-1] if isinstance(found, dict)), None)


def _unfit(component: nn.Module, state: dict[str, Tensor]) -> dict[str, str]:
    """Return the reason for each tensor of ``state`` that fits no layer of ``component``, by name."""
    try:
        renamed = _peft_names(component, state)
    except (ValueError, KeyError) as error:  # diffusers guesses the layout from a few names
        return dict.fromkeys(state, f"diffusers cannot convert it ({str(error)[:80]})")
    layers = dict(component.named_modules())
    parts: dict[str, set[str]] = {}
    for name in renamed.values():
        layer, part, _ = _split(name)
        parts.setdefault(layer, set()).add(part)
    found = {}
    for name, peft_name in renamed.items():
        layer, part, rest = _split(peft_name)
        if layer not in layers:
            found[name] = "no such layer"
        elif not {"lora_A", "lora_B"} <= parts[layer]:
            found[name] = "half of a pair"
        elif rest != ".bias" and (shape := _misfit(layers[layer], part, state[name])):
            found[name] = shape
    return found


def _split(name: str) -> tuple[str, str, str]:
    """Split a name such as ``attn.to_q.lora_A.weight`` into (layer, part, rest); part is empty if it has none."""
    match = PEFT_PART.search(name)
    return (name[: match.start()], match[1], name[match.end() :]) if match else (name, "", "")


def peft_parts(component: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[str, str, str]]:
    """Return the (layer, part, rest) of each tensor of a component, as diffusers names it on loading."""
    return {name: _split(renamed) for name, renamed in _peft_names(component, state).items()}


def _peft_names(component: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names that diffusers gives these tensors on loading."""
    if not state:
        return {}
    marked: dict[str, Any] = {name: name for name in state}
    if hasattr(component, "load_lora_adapter"):
        peft = marked if "lora_A" in next(iter(marked)) else convert_unet_state_dict_to_peft(marked)
    else:
        peft = convert_state_dict_to_peft(convert_state_dict_to_diffusers(marked))
        if not hasattr(component, "text_model"):
            peft = {name.removeprefix("text_model."): value for name, value in peft.items()}
    return {value: name for name, value in peft.items()}


def _misfit(layer: nn.Module, part: str, tensor: Tensor) -> str:
    """Describe a shape mismatch between a tensor and ``layer``; empty if it fits."""
    weight = getattr(layer, "weight", None)
    if weight is None or part == "lora_magnitude_vector" or not hasattr(layer, "in_features"):
        ends = (getattr(layer, "in_channels", None), getattr(layer, "out_channels", None))
    else:
        ends = (layer.in_features, layer.out_features)
    wanted, axis = (ends[0], 1) if part == "lora_A" else (ends[1], 0)
    if part not in ("lora_A", "lora_B") or wanted is None:
        return ""
    if tensor.ndim < 2 or tensor.shape[axis] != wanted:
        return f"{'input' if part == 'lora_A' else 'output'} is {wanted} wide here, shape {tuple(tensor.shape)} there"
    kernel = tuple(getattr(layer, "kernel_size", ())) if part == "lora_A" else (1,) * (getattr(weight, "ndim", 2) - 2)
    if tuple(tensor.shape[2:]) != kernel:
        kind = f"a convolution of {list(kernel)}" if kernel else "a linear layer"
        return f"{kind} here, shape {tuple(tensor.shape)} there"
    return ""


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:120] for name in names[:SHOWN]) + more
