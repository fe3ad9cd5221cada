"""Pipelines of the published flow models on the meta device, and what others counted in them.

Source of the counts, which are not ours: a comment in a trainer of FLUX ControlNets (FLUX.1-dev), the catalogue of
Unsloth Studio (FLUX.1-schnell, Qwen-Image, Z-Image-Turbo), and the hub's own figures of Qwen2.5-VL-7B, Qwen3-4B and
gemma-2-2b, as many model tables repeat them. Of SANA's transformer and autoencoder nobody's exact count was found.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.models.published_configs import pipeline, settings

HUB = {
    "flux_dev": "black-forest-labs/FLUX.1-dev",
    "flux_schnell": "black-forest-labs/FLUX.1-schnell",
    "qwen_image": "Qwen/Qwen-Image",
    "sana": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "z_image": "Tongyi-MAI/Z-Image-Turbo",
    "flux2_dev": "black-forest-labs/FLUX.2-dev",
    "flux2_klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0",
    "chroma": "lodestones/Chroma1-HD",
    "cogview4": "THUDM/CogView4-6B",
}
SCHEDULERS = {name: settings(hub, "scheduler") for name, hub in HUB.items()}
FLUX_SCHEDULER, SCHNELL_SCHEDULER, QWEN_SCHEDULER, SANA_SCHEDULER, Z_IMAGE_SCHEDULER = (
    SCHEDULERS[name] for name in ("flux_dev", "flux_schnell", "qwen_image", "sana", "z_image")
)
FLUX_TRANSFORMER, FLUX_VAE, T5_XXL = (
    settings(HUB["flux_dev"], part) for part in ("transformer", "vae", "text_encoder_2")
)
QWEN_TRANSFORMER, QWEN_VAE = (settings(HUB["qwen_image"], part) for part in ("transformer", "vae"))
QWEN_VL_TEXT, QWEN_VL_VISION = (
    settings(HUB["qwen_image"], "text_encoder")[part] for part in ("text_config", "vision_config")
)
SANA_TRANSFORMER, SANA_VAE, GEMMA_2B = (settings(HUB["sana"], part) for part in ("transformer", "vae", "text_encoder"))
Z_IMAGE_TRANSFORMER, QWEN3_4B = (settings(HUB["z_image"], part) for part in ("transformer", "text_encoder"))


def flow_scheduler(settings: dict) -> FlowMatchEulerDiscreteScheduler:
    with torch.device("cpu"):  # a scheduler computes with its tensors when it is built
        return FlowMatchEulerDiscreteScheduler.from_config(settings)


FLOW_PIPELINES = {name: partial(pipeline, hub) for name, hub in HUB.items()}
flux_dev = FLOW_PIPELINES["flux_dev"]

FLOW_COUNTED = {
    "flux_dev": {
        "transformer": 11_901_408_320,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "vae": 83_819_683,
    },
    "flux_schnell": {
        "transformer": 11_891_178_560,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "vae": 83_819_683,
    },
    "qwen_image": {"transformer": 20_430_401_088, "text_encoder": 8_292_166_656},
    "sana": {"text_encoder": 2_614_341_888},
    "flux2_dev": {"text_encoder": 24_011_361_280},
    "flux2_klein": {"text_encoder": 4_022_468_096},
    "lumina2": {"text_encoder": 2_614_341_888, "vae": 83_819_683},
    "chroma": {"text_encoder": 4_762_310_656, "vae": 83_819_683},
    "cogview4": {"text_encoder": 9_399_951_360 - 151_552 * 4096},  # without the output layer
    "z_image": {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096, "vae": 83_819_683},
}
