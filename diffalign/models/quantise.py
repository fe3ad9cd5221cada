"""Load a frozen base in 8 or 4 bits (arXiv 2305.14314) with diffusers' quantisation, to train a LoRA on it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig

PACKAGE = "bitsandbytes"
KINDS: dict[str, Mapping[str, Any]] = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}

# Bytes per weight, including a float32 scale per block of 64.
BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}


def quantisation(kind: str, component: str) -> PipelineQuantizationConfig:
    """Return the ``quantization_config`` of ``from_pretrained`` that quantises one component.

    Args:
        kind: "8bit" or "4bit".
        component: "transformer" or "unet".

    Raises:
        ValueError: Unknown kind, bitsandbytes is missing, or there is no GPU.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown quantisation {kind!r}; known: no, {', '.join(KINDS)}")
    if find_spec(PACKAGE) is None:
        raise ValueError(f"quantise {kind} needs {PACKAGE}: pip install diffalign[quantise], or set quantise: no")
    if not torch.cuda.is_available():
        raise ValueError(f"quantise {kind} needs a CUDA device, and there is none: set quantise: no")
    return PipelineQuantizationConfig(quant_mapping={component: BitsAndBytesConfig(**KINDS[kind])})
