"""Small random pipelines in the layouts of SD 1.5, SD 2, SDXL and PixArt-Sigma, with their published schedulers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.conftest import PIPELINE
from tests.models.published_configs import SD15_SCHEDULER, SD21_SCHEDULER, SDXL_SCHEDULER, settings


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")


def clip(kind: type, hidden: int, act: str = "quick_gelu"):
    words = tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            projection_dim=hidden,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_act=act,
            max_position_embeddings=words.model_max_length,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
    )


def unet(**changes) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(settings | changes))


def sd15() -> StableDiffusionPipeline:
    return _sd(unet(), clip(CLIPTextModel, 24), PNDMScheduler.from_config(SD15_SCHEDULER))


def sd2() -> StableDiffusionPipeline:
    wide = unet(attention_head_dim=[2, 4], use_linear_projection=True)
    return _sd(wide, clip(CLIPTextModel, 24, "gelu"), DDIMScheduler.from_config(SD21_SCHEDULER))


def _sd(network, text_encoder, scheduler) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        unet=network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(force_zeros: bool = True) -> StableDiffusionXLPipeline:
    network = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[2, 4],
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        cross_attention_dim=24 + 16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(CLIPTextModel, 24),
        text_encoder_2=clip(CLIPTextModelWithProjection, 16, "gelu"),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=network,
        scheduler=EulerDiscreteScheduler.from_config(SDXL_SCHEDULER),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    words = T5TokenizerFast.from_pretrained(PIPELINE / "tokenizer_3")
    text = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(words)}
    small = {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 24,
    }
    hub = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
    return PixArtSigmaPipeline(
        tokenizer=words,
        text_encoder=T5EncoderModel(T5Config(**settings(hub, "text_encoder") | text)),
        vae=vae(),
        transformer=PixArtTransformer2DModel(**settings(hub, "transformer") | small),
        scheduler=DPMSolverMultistepScheduler.from_config(settings(hub, "scheduler")),
    )


FAMILIES = {"sd15": sd15, "sd2": sd2, "sdxl": sdxl}


def write(make: Callable[[], DiffusionPipeline], folder) -> None:
    """Writes a pipeline, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        make().save_pretrained(folder)


def build(name: str, folder) -> None:
    """Writes a family's pipeline."""
    write(FAMILIES[name], folder)
