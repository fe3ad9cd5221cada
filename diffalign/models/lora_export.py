"""Write LoRAs as diffusers, kohya's tools and peft read them, and merge them into a pipeline."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save, save_file
from torch import Tensor

from diffalign.atomic import replacing, replacing_folder, write_text
from diffalign.lora_source import PEFT_CONFIG, PEFT_WEIGHTS, TEXT_ENCODERS, WEIGHTS_NAME
from diffalign.models.base import DiffusionModel
from diffalign.models.kohya import to_kohya
from diffalign.models.kohya_header import header
from diffalign.models.lora_factors import Factors, Updates, adapter_config, adapter_state, merge, save_arguments
from diffalign.models.lora_reading import diffusers_state
from diffalign.models.quiet import quiet_libraries

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_diffusers(pipeline: DiffusionPipeline, updates: Updates, folder: Path, dtype: torch.dtype) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights``."""
    named = save_arguments(updates)
    for component in updates:
        named[f"{component}_lora_layers"] = _cast(named[f"{component}_lora_layers"], dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_NAME) as staged:
        pipeline.save_lora_weights(save_directory=folder, weight_name=staged.name, **named)
    return folder / WEIGHTS_NAME


def write_kohya(
    pipeline: DiffusionPipeline, updates: Updates, folder: Path, dtype: torch.dtype, about: Mapping[str, str]
) -> Path:
    """Write ``<folder's name>.safetensors`` for ComfyUI, kohya's tools and web UIs.

    Args:
        pipeline: The base model.
        updates: One or more components'.
        folder: Folder of the file.
        dtype: Of the factors.
        about: Header entries to add: ``ss_`` and ``modelspec.`` keys.
    """
    named = to_kohya(pipeline, updates)
    # alpha stays float32, because bfloat16 has no odd integers above 256.
    tensors = _cast(named, dtype) | {name: t for name, t in named.items() if name.endswith(".alpha")}
    rank = max(len(tensor) for name, tensor in named.items() if name.endswith(".lora_down.weight"))
    known = {key: str(value) for key, value in {**header(pipeline, rank), **about}.items()}
    known = {"modelspec.title": folder.name, "ss_output_name": folder.name, **known}
    training = {key: value for key, value in known.items() if key.startswith("ss_")}
    # The hashes by which web UIs identify a file: of its tensors, and of a slice of the whole.
    content = save(tensors, training)
    known["sshs_model_hash"] = hashlib.sha256(content[int.from_bytes(content[:8], "little") + 8 :]).hexdigest()
    known["sshs_legacy_hash"] = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{folder.name}.safetensors"
    with replacing(path) as staged:
        save_file(tensors, staged, {**known, "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    return path


def write_peft(updates: Updates, folder: Path, dtype: torch.dtype, base: str) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``PeftModel.from_pretrained``.

    The denoiser's are in ``folder``, a text encoder's in a folder of its name inside.
    """
    for name in TEXT_ENCODERS:  # those of an earlier export would be read with these
        if name not in updates:
            (folder / name / PEFT_WEIGHTS).unlink(missing_ok=True)
    for component, layers in updates.items():
        own = folder / component if component.startswith("text_encoder") else folder
        own.mkdir(parents=True, exist_ok=True)
        settings = PeftLoraConfig(**adapter_config(layers), base_model_name_or_path=base, inference_mode=True).to_dict()
        settings["target_modules"] = sorted(layers)
        state = {f"base_model.model.{name}": tensor for name, tensor in adapter_state(layers).items()}
        with replacing(own / PEFT_WEIGHTS) as staged:
            save_file(_cast(state, dtype), staged, {"format": "pt"})
        write_text(own / PEFT_CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return folder


def write_merged(model: DiffusionModel, updates: Updates, folder: Path, dtype: torch.dtype) -> Path:
    """Merge updates into the pipeline's weights, in place, and save all of it in diffusers' layout.

    Args:
        model: The base; components with updates in float32, so that their sum is rounded once.
        updates: One or more components'.
        folder: Folder of the pipeline, which is replaced.
        dtype: Of all its weights.
    """
    pipeline = model.pipeline
    plain: dict[str, dict[str, Factors]] = {component: {} for component in updates}
    other: dict[str, dict[str, Factors]] = {}
    for component, layers in updates.items():
        for name, own in layers.items():
            simple = own.magnitude is None and own.bias is None
            (plain if simple else other).setdefault(component, {})[name] = own
    merge(pipeline, plain)
    if other:
        with quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of DoRA on CPUs
            pipeline.load_lora_weights(diffusers_state(other))
            pipeline.fuse_lora(components=list(other), safe_fusing=True)
            pipeline.unload_lora_weights()
    return save_pipeline(pipeline, folder, dtype)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, dtype: torch.dtype) -> Path:
    """Save a pipeline in a dtype, as a folder that ``from_pretrained`` loads. ValueError: a weight overflows."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
            if broken := next((key for key, t in part.state_dict().items() if not t.isfinite().all()), None):
                raise ValueError(f"{name}.{broken} is not finite in {dtype}: choose --dtype bf16 or fp32")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as staged, quiet_libraries():
        pipeline.save_pretrained(staged, safe_serialization=True)
    return folder


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast to ``dtype``. ValueError: a value overflows."""
    found = {name: tensor.to(dtype).contiguous().clone() for name, tensor in state.items()}
    if broken := next((name for name, tensor in found.items() if not tensor.isfinite().all()), None):
        raise ValueError(f"{broken} is not finite in {dtype}: choose --dtype bf16 or fp32")
    return found
