"""The public configurations of SD 1.5, SD 2.1, SDXL and SD3.5-medium, and what others counted in them.

Source of the settings: the ``config.json`` of each part, as published with the weights on the hub, in
stable-diffusion-v1-5/stable-diffusion-v1-5, and in stabilityai's stable-diffusion-2-1, stable-diffusion-xl-base-1.0 and
stable-diffusion-3.5-medium. Read from copies on GitHub: HDRJ-One/runwayml-stable-diffusion-v1-5,
Vikas-2025/Hugging_face_sta_dif_2.1, DeveloperRadleighPompei/sdxl, and for the gated SD3.5 the loaders of Tenstorrent
and FastVideo. Settings that equal the default of the class are left out.

Source of the counts, which are not ours: printed parameter counts of SD 1.5's three parts; of SDXL's UNet and of its
LoRA at rank 4, in the log of a diffusers DreamBooth run; of SD3.5-medium's parts, in comments of flow_grpo forks.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SD15_SCHEDULER = BETAS | {
    "clip_sample": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SD21_SCHEDULER = SD15_SCHEDULER | {"prediction_type": "v_prediction"}
SDXL_SCHEDULER = SD15_SCHEDULER | {"timestep_spacing": "leading", "interpolation_type": "linear"}
SD35_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0}

SD15_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SDXL_UNET = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SD35_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD35_VAE = VAE | {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


def _clip(kind: type, settings: dict):
    return kind(CLIPTextConfig(**settings))


def _scheduler(kind: type, settings: dict):
    with torch.device("cpu"):  # a scheduler computes with its tensors when it is built
        return kind.from_config(settings)


def sd15() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**SD15_UNET),
        vae=AutoencoderKL(**VAE, sample_size=512, scaling_factor=0.18215),
        text_encoder=_clip(CLIPTextModel, CLIP_L),
        tokenizer=None,
        scheduler=_scheduler(PNDMScheduler, SD15_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**SDXL_UNET),
        vae=AutoencoderKL(**VAE, sample_size=1024, scaling_factor=0.13025),
        text_encoder=_clip(CLIPTextModel, CLIP_L),
        text_encoder_2=_clip(CLIPTextModelWithProjection, CLIP_G),
        tokenizer=None,
        tokenizer_2=None,
        scheduler=_scheduler(EulerDiscreteScheduler, SDXL_SCHEDULER),
    )


def sd35_medium() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**SD35_TRANSFORMER),
        vae=AutoencoderKL(**SD35_VAE, sample_size=1024),
        text_encoder=_clip(CLIPTextModelWithProjection, CLIP_L),
        text_encoder_2=_clip(CLIPTextModelWithProjection, CLIP_G),
        text_encoder_3=T5EncoderModel(T5Config(**T5_XXL)),
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
        scheduler=_scheduler(FlowMatchEulerDiscreteScheduler, SD35_SCHEDULER),
    )


PIPELINES = {"sd15": sd15, "sdxl": sdxl, "sd35_medium": sd35_medium}

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
    with torch.device("meta"):
        return PIPELINES[name]()
