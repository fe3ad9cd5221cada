"""How the denoiser computes: its attention, and whether its blocks are compiled."""

from __future__ import annotations

import torch

from diffalign.models import DiffusionModel
from diffalign.models.attention import NATIVE, choose_attention, set_attention
from diffalign.models.compiling import compile_blocks
from diffalign.trainers.settings import TrainerConfig

PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_speed(model: DiffusionModel, args: TrainerConfig) -> None:
    """Once the model is on its device and trainable. ValueError: what ``args`` ask for does not run here.

    Sampling and training share all of it, so that a replayed step is the one that was sampled.
    """
    dtype = PRECISION.get(args.mixed_precision, model.dtype)
    attention = choose_attention(args.attention, model.device, dtype)
    if attention != NATIVE:
        set_attention(model.raw_denoiser, attention)
    if args.compile:
        compile_blocks(model.raw_denoiser)
