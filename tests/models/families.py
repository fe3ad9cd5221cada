"""Test cases of every model family: a tiny pipeline, and the equivalent diffusers call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from diffalign.models import DiffusionModel
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.structures import Guidance
from tests.models import tiny_flow_pipelines as tiny_flow
from tests.models import tiny_unet_pipelines as tiny
from tests.models.plain_diffusers import STEPS, TEXTS

ATTENTION = "attention_kwargs"
PACKED = {"height": 16, "width": 16, "max_sequence_length": 24}


@dataclass(frozen=True)
class Family:
    """A family's tiny pipeline and how to call it.

    Attributes:
        build: Builds the pipeline; None for the shipped one.
        options: Options of ``load_model``.
        call: Equivalent arguments of ``pipe(...)`` without guidance.
        guided: (scale, batch size) -> arguments that add classifier-free guidance; None: the pipeline has none.
        scale: Pipeline argument with the LoRA's scale.
        solver: Solver of ODE rows that fits the scheduler.
        stochastic: Solver of SDE rows that fits the scheduler.
        negative: Whether a negative prompt can be trained.
        lora: Whether diffusers loads LoRAs into the pipeline.
        slow: Whether all but the comparison with the pipeline's images is left to the slow tests.
    """

    build: Callable[[], DiffusionPipeline] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    guided: Callable[[float, int], Mapping[str, Any]] | None = lambda scale, count: {"guidance_scale": scale}
    scale: str = "joint_attention_kwargs"
    solver: str = "ode"
    stochastic: str = "flow_sde"
    negative: bool = True
    lora: bool = True
    slow: bool = False


def _unet(build: Callable[[], DiffusionPipeline]) -> Family:
    return Family(build, scale="cross_attention_kwargs", stochastic="ddim")


def _true_cfg(negative: str) -> Callable[[float, int], Mapping[str, Any]]:
    return lambda scale, count: {"true_cfg_scale": scale, "negative_prompt": [negative] * count}


SHORT = {"max_sequence_length": 24, "resolution": 16}
FAMILIES: dict[str, Family] = {
    "sd15": _unet(tiny.sd15),
    "sd2": _unet(tiny.sd2),
    "sdxl": _unet(tiny.sdxl),
    "sd3": Family(None, {"max_sequence_length": 16}, {"guidance_scale": 1.0, "max_sequence_length": 16}),
    "sd35_medium": Family(
        tiny_flow.sd35_medium,
        {"max_sequence_length": 16},
        {"guidance_scale": 1.0, "max_sequence_length": 16},
        slow=True,
    ),
    "flux_dev": Family(tiny_flow.flux_dev, SHORT, PACKED, _true_cfg("")),
    "flux_schnell": Family(tiny_flow.flux_schnell, SHORT, PACKED, _true_cfg("")),
    "qwen_image": Family(
        tiny_flow.qwen_image, SHORT, PACKED | {"true_cfg_scale": 1.0}, _true_cfg(" "), "attention_kwargs"
    ),
    "sana": Family(
        tiny_flow.sana,
        {"max_sequence_length": 24, "resolution": 32},
        {"height": 32, "width": 32, "max_sequence_length": 24, "use_resolution_binning": False, "guidance_scale": 1.0},
        scale="attention_kwargs",
        solver="dpmpp_2m",
    ),
    "z_image": Family(
        tiny_flow.z_image,
        SHORT,
        PACKED | {"guidance_scale": 0.0},
        lambda scale, count: {"guidance_scale": scale},
    ),
    "pixart_sigma": Family(
        tiny.pixart_sigma,
        {"max_sequence_length": 24, "resolution": 16},
        PACKED | {"use_resolution_binning": False, "guidance_scale": 1.0},
        stochastic="ddim",
        lora=False,
        slow=True,
    ),
    "lumina2": Family(
        tiny_flow.lumina2,
        {"max_sequence_length": 48, "resolution": 32},
        {"height": 32, "width": 32, "max_sequence_length": 48, "guidance_scale": 1.0},
        scale=ATTENTION,
        slow=True,
    ),
    "chroma": Family(tiny_flow.chroma, SHORT, PACKED | {"guidance_scale": 1.0}, slow=True),
    "cogview4": Family(
        tiny_flow.cogview4, SHORT, PACKED | {"guidance_scale": 1.0}, scale=ATTENTION, negative=False, slow=True
    ),
    "flux2_dev": Family(
        tiny_flow.flux2_dev,
        SHORT | {"max_sequence_length": 48},
        PACKED | {"guidance_scale": 4.0, "max_sequence_length": 48},
        None,
        scale=ATTENTION,
        slow=True,
    ),
    "flux2_klein": Family(tiny_flow.flux2_klein, SHORT, PACKED | {"guidance_scale": 1.0}, scale=ATTENTION, slow=True),
}


def _params(names: Iterable[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if FAMILIES[name].slow else name for name in names]


NAMES = _params(FAMILIES)
LORA = _params(name for name, family in FAMILIES.items() if family.lora)
GUIDED = _params(name for name, family in FAMILIES.items() if family.guided)
NEGATIVE = _params(name for name, family in FAMILIES.items() if family.guided and family.negative)


def noise_of(model: DiffusionModel, count: int) -> torch.Tensor:
    return torch.randn(count, *model.latent_shape(), generator=torch.Generator().manual_seed(0))


def packed(pipe: DiffusionPipeline, noise: torch.Tensor) -> torch.Tensor:
    """Pack latents as the pipeline takes them; FLUX.2's packs them itself."""
    outside = hasattr(pipe, "_pack_latents") and len(signature(pipe._pack_latents).parameters) > 1
    return pipe._pack_latents(noise, *noise.shape) if outside else noise


def images_of(
    family: Family, model: DiffusionModel, noise: torch.Tensor, texts=TEXTS, steps: int = STEPS, scale: float = 1.0
) -> torch.Tensor:
    """Sample the model's images from ``noise``."""
    guidance = Guidance(scale, model.unconditional()) if scale != 1 else None
    route = SamplingPlan(ode_plan(steps, family.solver), model.levels(steps), guidance)
    with torch.no_grad():
        return model.decode(sample(model, route, model.encode(texts), noise))
