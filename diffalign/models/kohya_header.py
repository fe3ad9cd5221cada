"""Header of a kohya LoRA file: ModelSpec keys (github.com/Stability-AI/ModelSpec) and ``ss_`` keys.

The values are those of kohya-ss/sd-scripts (library/sai_model_spec.py at 48d368f) and kohya-ss/musubi-tuner
(utils/sai_model_spec.py, dataset/architectures.py at 30c658c); web UIs sort LoRAs by them.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline


def header(pipeline: DiffusionPipeline, rank: int) -> dict[str, str]:
    """Return the entries with the base model's architecture and the LoRA's rank."""
    kind = _kind(pipeline)
    architecture, implementation, resolution, version, module = KINDS[kind]
    known = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "ss_network_module": module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_base_model_version": version,
    }
    if "unet" in pipeline.components:
        known["ss_v2"] = str(kind.startswith("sd2"))
        known["modelspec.prediction_type"] = "v" if _predicts_v(pipeline) else "epsilon"
    return known


STABILITY = "https://github.com/Stability-AI/generative-models"
QWEN = "https://github.com/QwenLM/Qwen-Image"
BFL = "https://github.com/black-forest-labs/flux"
BFL_2 = "https://github.com/black-forest-labs/flux2"
LUMINA = "https://github.com/Alpha-VLLM/Lumina-Image-2.0"
# Kind -> architecture, implementation, resolution, ss_base_model_version, ss_network_module.
KINDS = {
    "sd1": ("stable-diffusion-v1", "diffusers", 512, "sd_v1", "networks.lora"),
    "sd2": ("stable-diffusion-v2-512", "diffusers", 512, "sd_v2", "networks.lora"),
    "sd2_v": ("stable-diffusion-v2-768-v", "diffusers", 768, "sd_v2_v", "networks.lora"),
    "sdxl": ("stable-diffusion-xl-v1-base", STABILITY, 1024, "sdxl_base_v1-0", "networks.lora"),
    "sd3": ("stable-diffusion-3-m", "diffusers", 1024, "m", "networks.lora_sd3"),
    "sd3_medium": ("stable-diffusion-3-5-medium", "diffusers", 1024, "5-medium", "networks.lora_sd3"),
    "sd3_large": ("stable-diffusion-3-5-large", "diffusers", 1024, "5-large", "networks.lora_sd3"),
    "flux_dev": ("flux-1-dev", BFL, 1024, "flux1", "networks.lora_flux"),
    "flux_schnell": ("flux-1-schnell", BFL, 1024, "flux1", "networks.lora_flux"),
    "chroma": ("chroma", "https://huggingface.co/lodestones/Chroma", 1024, "chroma", "networks.lora_flux"),
    "flux2_dev": ("Flux.2-dev", BFL_2, 1024, "flux_2_dev", "networks.lora_flux_2"),
    "flux2_klein_4b": ("Flux.2-klein-4b", BFL_2, 1024, "flux_2_klein_4b", "networks.lora_flux_2"),
    "flux2_klein_9b": ("Flux.2-klein-9b", BFL_2, 1024, "flux_2_klein_9b", "networks.lora_flux_2"),
    "lumina2": ("lumina-2", LUMINA, 1024, "lumina2", "networks.lora_lumina"),
    "qwen_image": ("Qwen-Image", QWEN, 1328, "qwen_image", "networks.lora_qwen_image"),
    "qwen_image_edit": ("Qwen-Image-Edit", QWEN, 1024, "qwen_image_edit", "networks.lora_qwen_image"),
    "z_image": ("Z-Image", "https://github.com/Tongyi-MAI/Z-Image", 1024, "z_image", "networks.lora_zimage"),
}
KLEIN_4B_HEADS = 24
# Denoisers of one kind each.
OTHERS = {
    "ChromaTransformer2DModel": "chroma",
    "Lumina2Transformer2DModel": "lumina2",
    "QwenImageTransformer2DModel": "qwen_image",
    "ZImageTransformer2DModel": "z_image",
}


def _kind(pipeline: DiffusionPipeline) -> str:
    denoiser: Any = pipeline.components.get("unet") or pipeline.components["transformer"]
    config, name = denoiser.config, type(denoiser).__name__.removeprefix("FSDP")
    if name == "UNet2DConditionModel":
        if config.get("addition_embed_type") == "text_time":
            return "sdxl"
        # Stable Diffusion 2 is conditioned on OpenCLIP's features, and its projections are linear layers.
        return "sd1" if not config.get("use_linear_projection") else "sd2_v" if _predicts_v(pipeline) else "sd2"
    if name == "SD3Transformer2DModel":
        if config.get("dual_attention_layers"):
            return "sd3_medium"
        return "sd3_large" if config.get("qk_norm") else "sd3"
    if name == "FluxTransformer2DModel":
        return "flux_dev" if config.get("guidance_embeds") else "flux_schnell"
    if name == "Flux2Transformer2DModel":
        if config.get("guidance_embeds", True):
            return "flux2_dev"
        return "flux2_klein_9b" if config.num_attention_heads > KLEIN_4B_HEADS else "flux2_klein_4b"
    if name == "QwenImageTransformer2DModel" and "Edit" in type(pipeline).__name__:
        return "qwen_image_edit"
    return OTHERS[name]


def _predicts_v(pipeline: DiffusionPipeline) -> bool:
    return bool(pipeline.scheduler.config.get("prediction_type") == "v_prediction")
