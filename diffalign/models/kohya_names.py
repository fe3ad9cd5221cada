"""Names of denoiser layers in the LoRA files of kohya's tools and ComfyUI, by diffusers' class.

Sources: kohya-ss/sd-scripts at 48d368f (networks/lora.py, lora_sd3.py, lora_flux.py, lora_lumina.py),
kohya-ss/musubi-tuner at 30c658c (lora_flux_2.py) and Comfy-Org/ComfyUI at a125cd8 and 17358c8
(``model_lora_keys_unet`` of comfy/lora.py), whose key maps the tests hold as data.

A table maps a module of the original model to the diffusers layers that it fuses, in the order of its rows; ``{}`` is a
number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Table = Mapping[str, tuple[str, ...]]


def _fused(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


QKV, ADDED_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"

FLUX: Table = {
    "double_blocks.{}.img_attn.qkv": _fused(f"{_DOUBLE}.attn", *QKV),
    "double_blocks.{}.txt_attn.qkv": _fused(f"{_DOUBLE}.attn", *ADDED_QKV),
    "double_blocks.{}.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "double_blocks.{}.img_mod.lin": (f"{_DOUBLE}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": (f"{_DOUBLE}.norm1_context.linear",),
    "double_blocks.{}.img_mlp.0": (f"{_DOUBLE}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": (f"{_DOUBLE}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": (f"{_DOUBLE}.ff_context.net.2",),
    "single_blocks.{}.linear1": (*_fused(f"{_SINGLE}.attn", *QKV), f"{_SINGLE}.proj_mlp"),
    "single_blocks.{}.linear2": (f"{_SINGLE}.proj_out",),
    "single_blocks.{}.modulation.lin": (f"{_SINGLE}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
CHROMA: Table = {
    **FLUX,
    "distilled_guidance_layer.in_proj": ("distilled_guidance_layer.in_proj",),
    "distilled_guidance_layer.out_proj": ("distilled_guidance_layer.out_proj",),
    "distilled_guidance_layer.layers.{}.in_layer": ("distilled_guidance_layer.layers.{}.linear_1",),
    "distilled_guidance_layer.layers.{}.out_layer": ("distilled_guidance_layer.layers.{}.linear_2",),
}
_EMBED = "time_guidance_embed"
FLUX_2: Table = {
    **{name: layers for name, layers in FLUX.items() if "_attn." in name},
    "double_blocks.{}.img_mlp.0": (f"{_DOUBLE}.ff.linear_in",),
    "double_blocks.{}.img_mlp.2": (f"{_DOUBLE}.ff.linear_out",),
    "double_blocks.{}.txt_mlp.0": (f"{_DOUBLE}.ff_context.linear_in",),
    "double_blocks.{}.txt_mlp.2": (f"{_DOUBLE}.ff_context.linear_out",),
    "single_blocks.{}.linear1": (f"{_SINGLE}.attn.to_qkv_mlp_proj",),
    "single_blocks.{}.linear2": (f"{_SINGLE}.attn.to_out",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": (f"{_EMBED}.timestep_embedder.linear_1",),
    "time_in.out_layer": (f"{_EMBED}.timestep_embedder.linear_2",),
    "guidance_in.in_layer": (f"{_EMBED}.guidance_embedder.linear_1",),
    "guidance_in.out_layer": (f"{_EMBED}.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SD3: Table = {
    "joint_blocks.{}.x_block.attn.qkv": _fused(f"{_DOUBLE}.attn", *QKV),
    "joint_blocks.{}.x_block.attn2.qkv": _fused(f"{_DOUBLE}.attn2", *QKV),
    "joint_blocks.{}.context_block.attn.qkv": _fused(f"{_DOUBLE}.attn", *ADDED_QKV),
    "joint_blocks.{}.x_block.attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "joint_blocks.{}.x_block.attn2.proj": (f"{_DOUBLE}.attn2.to_out.0",),
    "joint_blocks.{}.context_block.attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "joint_blocks.{}.x_block.mlp.fc1": (f"{_DOUBLE}.ff.net.0.proj",),
    "joint_blocks.{}.x_block.mlp.fc2": (f"{_DOUBLE}.ff.net.2",),
    "joint_blocks.{}.context_block.mlp.fc1": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "joint_blocks.{}.context_block.mlp.fc2": (f"{_DOUBLE}.ff_context.net.2",),
    "joint_blocks.{}.x_block.adaLN_modulation.1": (f"{_DOUBLE}.norm1.linear",),
    "joint_blocks.{}.context_block.adaLN_modulation.1": (f"{_DOUBLE}.norm1_context.linear",),
    "context_embedder": ("context_embedder",),
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


def _stacked(table: Table) -> Table:
    """Repeat the names inside a block for the three stacks of Lumina's architecture, which Z-Image shares."""
    return {
        f"{stack}.{{}}.{theirs}": _fused(f"{stack}.{{}}", *ours)
        for stack in ("layers", "noise_refiner", "context_refiner")
        for theirs, ours in table.items()
    }


Z_IMAGE: Table = {
    **_stacked(
        {
            "attention.qkv": _fused("attention", *QKV),
            "attention.out": ("attention.to_out.0",),
            "feed_forward.w1": ("feed_forward.w1",),
            "feed_forward.w2": ("feed_forward.w2",),
            "feed_forward.w3": ("feed_forward.w3",),
            "adaLN_modulation.0": ("adaLN_modulation.0",),
        }
    ),
    "x_embedder": ("all_x_embedder.2-1",),
    "t_embedder.mlp.0": ("t_embedder.mlp.0",),
    "t_embedder.mlp.2": ("t_embedder.mlp.2",),
    "cap_embedder.1": ("cap_embedder.1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}
LUMINA_2: Table = {
    **_stacked(
        {
            "attention.qkv": _fused("attn", *QKV),
            "attention.out": ("attn.to_out.0",),
            "feed_forward.w1": ("feed_forward.linear_1",),
            "feed_forward.w2": ("feed_forward.linear_2",),
            "feed_forward.w3": ("feed_forward.linear_3",),
            "adaLN_modulation.1": ("norm1.linear",),
        }
    ),
    "x_embedder": ("x_embedder",),
    "t_embedder.mlp.0": ("time_caption_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_caption_embed.timestep_embedder.linear_2",),
    "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
    "final_layer.linear": ("norm_out.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
}
FUSED: Mapping[str, Table] = {
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX_2,
    "ChromaTransformer2DModel": CHROMA,
    "Lumina2Transformer2DModel": LUMINA_2,
    "SD3Transformer2DModel": SD3,
    "ZImageTransformer2DModel": Z_IMAGE,
}
# Classes that kohya's tools train under diffusers' own names; SDXL's UNet is the exception.
SAME = ("UNet2DConditionModel", "QwenImageTransformer2DModel")
# Classes of which neither ComfyUI (17358c8) nor kohya's tools load a LoRA.
UNREAD = ("SanaTransformer2DModel", "CogView4Transformer2DModel")
# Original rows are (shift, scale), those of this class of diffusers (scale, shift).
SWAPPED = "AdaLayerNormContinuous"

# SDXL: the UNet of generative-models, whose blocks are numbered through.
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def sgm_name(layer: str, layers_per_block: int, attention_in_up: tuple[bool, ...]) -> str:
    """Return the name of an SDXL layer in the original UNet.

    Args:
        layer: Name in diffusers' UNet.
        layers_per_block: As in its configuration.
        attention_in_up: Whether each up block has attention, which shifts its upsampler's index.

    Raises:
        KeyError: The original UNet has no such layer.
    """
    if layer in _UNET:
        return _UNET[layer]
    match = re.fullmatch(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", layer)
    if match is None:
        raise KeyError(layer)
    side, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    tail = _RESNET[rest] if kind == "resnets" else rest
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{tail}"
    if kind == "downsamplers":
        return f"input_blocks.{(layers_per_block + 1) * (block + 1)}.0.op"
    if kind == "upsamplers":
        last = (layers_per_block + 1) * block + layers_per_block
        return f"output_blocks.{last}.{1 + attention_in_up[block]}.{tail}"
    place = 1 if kind == "attentions" else 0
    if side == "down_blocks":
        return f"input_blocks.{1 + (layers_per_block + 1) * block + index}.{place}.{tail}"
    return f"output_blocks.{(layers_per_block + 1) * block + index}.{place}.{tail}"
