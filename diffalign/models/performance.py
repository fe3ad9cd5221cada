"""Choose the attention backend of the denoiser and compile its blocks."""

from __future__ import annotations

import torch

from diffalign.models import DiffusionModel
from diffalign.models.attention import NATIVE, choose_attention, set_attention
from diffalign.models.compiling import compile_blocks

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
