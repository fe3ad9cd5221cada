"""The optimizer of a run: AdamW (arXiv 1711.05101), or the same with its moments in 8 bits (arXiv 2110.02861)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.runtime.settings import TrainingConfig


def _eight_bit() -> type[torch.optim.Optimizer]:
    try:
        return importlib.import_module("bitsandbytes.optim").AdamW8bit
    except ImportError as error:
        hint = "pip install diffalign[quantise], or set optimizer: adamw"
        raise ValueError(f"optimizer adamw_8bit needs bitsandbytes ({error}): {hint}") from error


KINDS: dict[str, Callable[[], type[torch.optim.Optimizer]]] = {
    "adamw": lambda: torch.optim.AdamW,
    "adamw_8bit": _eight_bit,
}


def make_optimizer(parameters: Sequence[Tensor], args: TrainingConfig) -> torch.optim.Optimizer:
    """ValueError: an unknown optimizer, or one that needs a package that is not there."""
    if args.optimizer not in KINDS:
        raise ValueError(f"unknown optimizer {args.optimizer!r}; known: {', '.join(KINDS)}")
    return KINDS[args.optimizer]()(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
