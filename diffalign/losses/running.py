"""A running mean that lives on the device and in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RunningMean:
    """Exponential moving average of finite values, corrected for its start at 0; float32.

    decay: in [0, 1). ValueError outside. Values that are not finite are left out, so that one diverged batch cannot
    spoil it. Nothing waits for the device until ``state_dict``.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}: 0.99 averages over about 100 values")
        self.decay = decay
        self.total = torch.zeros(())
        self.weight = torch.zeros(())

    def update(self, value: Tensor) -> Tensor:
        """Update with a value, (), and return the mean, (), on its device."""
        value = value.detach().float()
        taken = value.isfinite().to(value) * (1 - self.decay)
        kept = 1 - taken
        self.total = kept * self.total.to(value) + taken * value.nan_to_num(0.0, 0.0, 0.0)
        self.weight = kept * self.weight.to(value) + taken
        return self.mean

    @property
    def mean(self) -> Tensor:
        """The mean, (); 0 before the first value."""
        return self.total / torch.where(self.weight > 0, self.weight, 1)

    def state_dict(self) -> dict[str, float]:
        """Return two numbers."""
        return {"total": float(self.total), "weight": float(self.weight)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what ``state_dict`` returned, to the last bit."""
        self.total, self.weight = (torch.tensor(state[name]) for name in ("total", "weight"))
