"""Models for ``gpu.py``: from public configurations with random weights, or small ones."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig

from diffalign import DiffusionModel
from diffalign.models import get_family, load_model
from diffalign.models.quantise import quantisation

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
TINY = 32  # pixels


@dataclass(frozen=True)
class Case:
    """A model and the options of its run. size: name -> builder of its pipeline, as module:function."""

    size: Mapping[str, str]
    resolution: int
    batch: int
    guidance: float = 1.0
    plan: Mapping[str, Any] = field(default_factory=dict)


SD35 = {"published": "tests.models.published_configs:sd35_medium", "tiny": "tests.conftest:PIPELINE"}
SDXL = {"published": "tests.models.published_configs:sdxl", "tiny": "tests.models.tiny_unet_pipelines:sdxl"}
FLUX = {
    "published": "tests.models.published_flow_configs:flux_dev",
    "tiny": "tests.models.tiny_flow_pipelines:flux_dev",
}
CASES = {
    "sd35_medium_512": Case(SD35, 512, 8, 4.5),
    "sd35_medium_1024": Case(SD35, 1024, 4, 4.5),
    "sdxl_1024": Case(SDXL, 1024, 4, 5.0, {"solver": "ddim"}),
    "flux1_dev_512": Case(FLUX, 512, 4),
}
# Tokens of a prompt and where the denoiser's configuration has their width.
SPOKEN = {
    "StableDiffusion3Pipeline": (77 + 256, "joint_attention_dim"),
    "StableDiffusionXLPipeline": (77, "cross_attention_dim"),
    "FluxPipeline": (512, "joint_attention_dim"),
}


def build(case: Case, size: str, quantise: str = "no") -> DiffusionModel:
    """Build the pipeline in ``DTYPE``; published sizes with random weights. ValueError: it cannot be quantised here."""
    module, name = case.size[size].split(":")
    source = getattr(importlib.import_module(module), name)
    if isinstance(source, Path):
        return load_model(source, max_sequence_length=16, quantise=quantise)
    pipeline = source() if size == "tiny" else published(source)
    family = get_family(type(pipeline).__name__)
    options = {"resolution": TINY if size == "tiny" else case.resolution}
    config = getattr(pipeline, family.denoiser_name).config
    if quantise != "no":
        quantised = quantisation(quantise, family.denoiser_name)  # refuses before gigabytes are written
        pipeline = reloaded(pipeline, quantised)
    model = family(pipeline, **options)
    if size != "tiny":
        silence(pipeline, config)
    return model


def reloaded(pipeline: Any, config: PipelineQuantizationConfig) -> Any:
    """Reload the pipeline with diffusers, which quantises weights while it loads."""
    kind, absent = type(pipeline), {name: None for name, part in pipeline.components.items() if part is None}
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        for name in pipeline.components:
            object.__setattr__(pipeline, name, None)  # its memory is free before it is read again
        found = kind.from_pretrained(folder, torch_dtype=DTYPE, quantization_config=config, **absent)
    found.vae.to(torch.float32)
    return found


def published(source: Callable[[], Any]) -> Any:
    """Build a pipeline of random weights, without text encoders."""
    with torch.device("meta"):
        pipeline = source()
    denoiser = getattr(pipeline, get_family(type(pipeline).__name__).denoiser_name)
    for part, dtype in ((denoiser, DTYPE), (pipeline.vae, torch.float32)):
        part.to(dtype).to_empty(device=DEVICE)
        fill(part)
    pipeline.register_modules(**{name: None for name in pipeline.components if name.startswith("text_encoder")})
    return pipeline


@torch.no_grad()
def fill(part: torch.nn.Module) -> None:
    """Fill weights with random numbers that are small enough for a deep network to stay finite."""
    for tensor in [*part.parameters(), *part.buffers()]:
        tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor.zero_()


def silence(pipeline: Any, config: Any) -> None:
    """Replace text encoders: prompts become random embeddings of the same shape."""
    kind = type(pipeline).__name__
    length, width = SPOKEN[kind]
    pooled_width = config.get("pooled_projection_dim")
    if pooled_width is None:
        pooled_width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def encode_prompt(prompt: str | list[str], *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        count = 1 if isinstance(prompt, str) else len(prompt)
        embeds, pooled = torch.randn(count, length, config[width]), torch.randn(count, pooled_width)
        return (embeds, pooled, torch.zeros(length, 3)) if kind == "FluxPipeline" else (embeds, embeds, pooled, pooled)

    for name in pipeline.components:
        if name.startswith("text_encoder"):
            object.__setattr__(pipeline, name, SimpleNamespace(device=torch.device("cpu")))
    pipeline.encode_prompt = encode_prompt
