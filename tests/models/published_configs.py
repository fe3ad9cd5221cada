"""Pipelines of the published configurations on the meta device, and what others counted in them.

Source of the counts, which are not ours: printed parameter counts of SD 1.5's three parts and of SD 2.1's UNet; of
SDXL's UNet and of its LoRA at rank 4, in the log of a diffusers DreamBooth run; of SD3.5-medium's parts, in comments of
flow_grpo forks.
"""

from __future__ import annotations

from functools import partial

from diffalign.models.meta_device import model_on_meta
from diffalign.models.published_configs import published_config

HUB = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35_medium": "stabilityai/stable-diffusion-3.5-medium",
}


def settings(name: str, part: str) -> dict:
    """Of a part, without the names of classes."""
    found = published_config(name, part)
    return {key: value for key, value in found.items() if key not in ("_class_name", "architectures", "model_type")}


SD15_SCHEDULER, SDXL_SCHEDULER, SD35_SCHEDULER = (settings(name, "scheduler") for name in HUB.values())
SD21_SCHEDULER = settings("stabilityai/stable-diffusion-2-1", "scheduler")


def pipeline(name: str):
    """A pipeline of published shape whose weights take no memory."""
    return model_on_meta(name).pipeline


PIPELINES = {name: partial(pipeline, hub) for name, hub in HUB.items()}
sd15, sdxl, sd35_medium = PIPELINES.values()

COUNTED = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sdxl": {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 817_720_320 - 123_060_480,
        "vae": 83_653_863,
    },
    "sd35_medium": {
        "transformer": 2_243_171_520,
        "text_encoder": 123_650_304,
        "text_encoder_3": 4_762_310_656,
        "vae": 83_819_683,
    },
}
# Of a LoRA of rank 4 on the attention projections.
COUNTED_LORA = {"sd15": 797_184, "sdxl": 5_806_080}


def on_meta(name: str):
    """A pipeline of published shape whose weights take no memory."""
    return PIPELINES[name]()
