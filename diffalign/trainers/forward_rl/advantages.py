"""Advantages as a method uses them: all, of one sign, or their signs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda a: a,
    "positive": lambda a: a.clamp(min=0),
    "negative": lambda a: a.clamp(max=0),
    "one": lambda a: (a > 0).to(a),
    "binary": torch.sign,
}


def transformed(advantage: Tensor, mode: str, scale: float) -> Tensor:
    """Apply a mode of ``MODES`` and a factor to advantages (N,)."""
    return MODES[mode](advantage) * scale
