"""Choose the attention backend of the denoiser and compile its blocks; checkpoint the VAE's decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, EfficientViTBlock, ResBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.utils.checkpoint import checkpoint

from diffalign.models import DiffusionModel
from diffalign.models.attention import NATIVE, choose_attention, set_attention
from diffalign.models.compiling import compile_blocks

LAYERS = (ResnetBlock2D, Upsample2D, ResBlock, EfficientViTBlock, DCUpBlock2d)
PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_performance(model: DiffusionModel, attention: str, mixed_precision: str, compile: bool) -> None:
    """Set the attention backend of a trainable model that is on its device, and compile its blocks.

    Sampling and training share both, so that a replayed step computes what the rollout computed.

    Args:
        model: The model; its denoiser is changed in place.
        attention: ``auto``, ``native``, or another backend of diffusers' attention dispatcher.
        mixed_precision: ``no``, ``fp16`` or ``bf16``: the precision that attention will run in.
        compile: Whether to compile the denoiser's blocks.

    Raises:
        ValueError: The backend does not run on this device or in this precision.
    """
    backend = choose_attention(attention, model.device, PRECISION.get(mixed_precision, model.dtype))
    if backend != NATIVE:
        set_attention(model.raw_denoiser, backend)
    if compile:
        compile_blocks(model.raw_denoiser)


def checkpoint_decoder(vae: Any) -> bool:
    """Recompute the activations of the decoder in the backward pass, layer by layer.

    diffusers recomputes whole blocks, of which the last has all of its layers at the size of the image, and not in
    every VAE.

    Returns:
        Whether the decoder has layers that can be recomputed: those of Qwen-Image keep a state between calls.
    """
    layers = [layer for layer in vae.decoder.modules() if isinstance(layer, LAYERS)]
    for layer in layers:
        if not isinstance(layer.forward, partial):
            layer.forward = partial(_checkpointed, layer.forward)
    return bool(layers)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
