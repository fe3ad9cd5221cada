"""Optimizer and learning rate schedule: AdamW (arXiv 1711.05101), optionally with 8-bit moments (arXiv 2110.02861)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.runtime.config import TrainingConfig


def _eight_bit() -> type[torch.optim.AdamW]:
    try:
        return importlib.import_module("bitsandbytes.optim").AdamW8bit
    except ImportError as error:
        hint = "pip install diffalign[quantise], or set optimizer: adamw"
        raise ValueError(f"optimizer adamw_8bit needs bitsandbytes ({error}): {hint}") from error


KINDS: dict[str, Callable[[], type[torch.optim.AdamW]]] = {
    "adamw": lambda: torch.optim.AdamW,
    "adamw_8bit": _eight_bit,
}


def make_optimizer(parameters: Sequence[Tensor], args: TrainingConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a configuration. Raises ValueError if it needs a package that is missing."""
    return KINDS[args.optimizer]()(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def lr_factor(name: str, step: int, warmup: int, total: int) -> float:
    """Return the factor of the peak learning rate for optimizer step ``step`` (from 0) of ``total``.

    It rises over ``warmup`` steps, from above 0, because an update that changes nothing would be wasted; then it is
    constant, or falls to 0 after the last step ("linear", "cosine").
    """
    done = max(0, step - warmup) / max(1, total - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return min(1.0, (step + 1) / (warmup + 1)) * shape[name]
