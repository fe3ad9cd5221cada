"""Models for ``gpu.py``: from public configurations with random weights, or small ones."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig

from diffalign import DiffusionModel
from diffalign.models import get_family, load_model
from diffalign.models.meta_device import model_on_meta
from diffalign.models.quantise import quantisation
from diffalign.models.quiet import quiet_libraries

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32


@dataclass(frozen=True)
class Case:
    """A model, and how runs use it.

    Attributes:
        hub: Id of the published model, or a folder; only its configuration files are read.
        tiny: A small pipeline of the same family, as module:name of a folder or of a function that builds it.
        resolution: Of the published model, in pixels.
        batch: Images per pass.
        guidance: Guidance scale of rollouts.
        plan: Fields of the sampling plan.
        tiny_options: Configuration fields of the small model.
    """

    hub: str
    tiny: str
    resolution: int
    batch: int
    guidance: float = 1.0
    plan: Mapping[str, Any] = field(default_factory=dict)
    tiny_options: Mapping[str, Any] = field(default_factory=lambda: {"resolution": 32})

    def options(self, size: str) -> dict[str, Any]:
        """Return the fields of a configuration that describe the model."""
        if size == "tiny":
            return {"model": str(small_pipeline(self.tiny)), **self.tiny_options}
        return {"model": self.hub, "resolution": self.resolution}


SD35, SD35_TINY = "stabilityai/stable-diffusion-3.5-medium", "tests.conftest:PIPELINE"
SHORT = {"max_sequence_length": 16}
CASES = {
    "sd35_medium_512": Case(SD35, SD35_TINY, 512, 8, 4.5, tiny_options=SHORT),
    "sd35_medium_1024": Case(SD35, SD35_TINY, 1024, 4, 4.5, tiny_options=SHORT),
    "sdxl_1024": Case(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "tests.models.tiny_unet_pipelines:sdxl",
        *(1024, 4, 5.0, {"solver": "ddim"}),
    ),
    "flux1_dev_512": Case(
        "black-forest-labs/FLUX.1-dev",
        "tests.models.tiny_flow_pipelines:flux_dev",
        *(512, 4),
        tiny_options=SHORT | {"resolution": 32},
    ),
}
# Tokens of a prompt and where the denoiser's configuration has their width.
SPOKEN = {
    "StableDiffusion3Pipeline": (77 + 256, "joint_attention_dim"),
    "StableDiffusionXLPipeline": (77, "cross_attention_dim"),
    "FluxPipeline": (512, "joint_attention_dim"),
}


@cache
def small_pipeline(source: str) -> Path:
    """Return the folder of a small pipeline, which is built and written once per process."""
    module, name = source.split(":")
    found = getattr(importlib.import_module(module), name)
    if isinstance(found, Path):
        return found
    _FOLDERS.append(tempfile.TemporaryDirectory())
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(7)
        found().save_pretrained(_FOLDERS[-1].name)
    return Path(_FOLDERS[-1].name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def build(case: Case, size: str, quantise: str = "no") -> DiffusionModel:
    """Build the model in ``DTYPE``; published sizes with random weights. ValueError: it cannot be quantised here."""
    if size == "tiny":
        options = case.options(size)
        return load_model(options.pop("model"), quantise=quantise, **options)
    pipeline = published(case.hub)
    family = get_family(type(pipeline).__name__)
    config = getattr(pipeline, family.denoiser_name).config
    if quantise != "no":
        quantised = quantisation(quantise, family.denoiser_name)  # refuses before gigabytes are written
        pipeline = reloaded(pipeline, quantised)
    model = family(pipeline, resolution=case.resolution)
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


def published(hub: str) -> Any:
    """Build a pipeline of random weights, without text encoders."""
    pipeline = model_on_meta(hub).pipeline
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
