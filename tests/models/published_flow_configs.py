"""The public configurations of FLUX.1, Qwen-Image, SANA and Z-Image, and what others counted in them.

Source of the settings: the ``config.json`` of each part, as published with the weights on the hub, in
black-forest-labs/FLUX.1-dev and FLUX.1-schnell, Qwen/Qwen-Image, Efficient-Large-Model/Sana_1600M_1024px_diffusers and
Tongyi-MAI/Z-Image-Turbo. Read from copies in loaders and tests on GitHub: Tenstorrent's (FLUX.1), ostris' ai-toolkit
and SimpleTuner (Qwen-Image), diffusers' conversion script (SANA) and several ports to MLX (Z-Image). Some equal
defaults of the class.

Source of the counts, which are not ours: a comment in a trainer of FLUX ControlNets (FLUX.1-dev), the catalogue of
Unsloth Studio (FLUX.1-schnell, Qwen-Image, Z-Image-Turbo), and the hub's own figures of Qwen2.5-VL-7B, Qwen3-4B and
gemma-2-2b, as many model tables repeat them. T5 and CLIP as in ``published.py``. Of SANA's transformer and autoencoder
nobody's exact count was found.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.models.published_configs import CLIP_L, T5_XXL, VAE

FLUX_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SCHNELL_SCHEDULER = FLUX_SCHEDULER | {"shift": 1.0, "use_dynamic_shifting": False}
QWEN_SCHEDULER = FLUX_SCHEDULER | {
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}
SANA_SCHEDULER = {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
Z_IMAGE_SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}

FLUX_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
FLUX_VAE = VAE | {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
QWEN_TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
QWEN_VAE = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    # Its latents_mean and latents_std are the class's defaults.
}
QWEN_VL_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
}
QWEN_VL_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
SANA_TRANSFORMER = {
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 20,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "sample_size": 32,
}
SANA_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SANA_VAE = {
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": SANA_BLOCKS,
    "decoder_block_types": SANA_BLOCKS,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
GEMMA_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
}
Z_IMAGE_TRANSFORMER = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def flow_scheduler(settings: dict) -> FlowMatchEulerDiscreteScheduler:
    with torch.device("cpu"):  # a scheduler computes with its tensors when it is built
        return FlowMatchEulerDiscreteScheduler.from_config(settings)


def _flux(guidance: bool, scheduler: dict) -> FluxPipeline:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**FLUX_TRANSFORMER | {"guidance_embeds": guidance}),
        vae=AutoencoderKL(**FLUX_VAE, sample_size=1024),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        text_encoder_2=T5EncoderModel(T5Config(**T5_XXL)),
        tokenizer=None,
        tokenizer_2=None,
        scheduler=flow_scheduler(scheduler),
    )


def flux_dev() -> FluxPipeline:
    return _flux(True, FLUX_SCHEDULER)


def flux_schnell() -> FluxPipeline:
    return _flux(False, SCHNELL_SCHEDULER)


def qwen_image() -> QwenImagePipeline:
    # Its tables of rotations are no buffers and are computed with when they are built.
    with torch.device("cpu"):
        tables = QwenImageTransformer2DModel(**QWEN_TRANSFORMER | {"num_layers": 0}).pos_embed
    transformer = QwenImageTransformer2DModel(**QWEN_TRANSFORMER)
    transformer.pos_embed = tables
    return QwenImagePipeline(
        transformer=transformer,
        vae=AutoencoderKLQwenImage(**QWEN_VAE),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=QWEN_VL_TEXT, vision_config=QWEN_VL_VISION)
        ),
        tokenizer=None,
        scheduler=flow_scheduler(QWEN_SCHEDULER),
    )


def sana() -> SanaPipeline:
    with torch.device("cpu"):
        scheduler = DPMSolverMultistepScheduler.from_config(SANA_SCHEDULER)
    return SanaPipeline(
        transformer=SanaTransformer2DModel(**SANA_TRANSFORMER),
        vae=AutoencoderDC(**SANA_VAE),
        text_encoder=Gemma2Model(Gemma2Config(**GEMMA_2B)),
        tokenizer=None,
        scheduler=scheduler,
    )


def z_image() -> ZImagePipeline:
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(**Z_IMAGE_TRANSFORMER),
        vae=AutoencoderKL(**FLUX_VAE, sample_size=1024),
        text_encoder=Qwen3Model(Qwen3Config(**QWEN3_4B)),
        tokenizer=None,
        scheduler=flow_scheduler(Z_IMAGE_SCHEDULER),
    )


FLOW_PIPELINES = {
    "flux_dev": flux_dev,
    "flux_schnell": flux_schnell,
    "qwen_image": qwen_image,
    "sana": sana,
    "z_image": z_image,
}

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
    "z_image": {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096, "vae": 83_819_683},
}
