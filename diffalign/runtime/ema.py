"""The exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class EMA:
    """Moving average shadow <- decay_t * shadow + (1 - decay_t) * parameters, in float32 for any dtype of parameters.

    The shadow starts at the parameters and never shares memory with them.

    Args:
        parameters: The parameters to average.
        decay: In [0, 1).
        warmup: Whether decay_t = min(decay, (1 + k) / (10 + k)) after k updates, so that the initial weights do not
            dominate the average of a short run.

    Raises:
        ValueError: A decay outside the range, or no parameters.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay lies in [0, 1), got {decay}; 0.999 is a common value")
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("EMA of no parameters: mark some as trainable first")
        self.decay, self.warmup = decay, warmup
        self.updates = 0
        # copy=True: .float() of a float32 CPU parameter is the parameter itself.
        self.shadow = [parameter.detach().to(torch.float32, copy=True) for parameter in self.parameters]

    def update(self, decay: float | None = None) -> None:
        """Move the shadow towards the parameters; call it once after each optimizer step.

        Args:
            decay: decay_t of this update; default: see the class.
        """
        if decay is None:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        targets = [p.detach().to(s) for p, s in zip(self.parameters, self.shadow, strict=True)]
        torch._foreach_lerp_(self.shadow, targets, 1 - decay)
        self.updates += 1
