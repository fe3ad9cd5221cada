"""TempFlow-GRPO (arXiv 2508.04324): steps that explore more weigh more."""

from __future__ import annotations

import torch
from torch import Tensor


def noise_aware_weights(stds: Tensor) -> Tensor:
    """w_t = std_t / mean over the trained steps of std: (T,), dtype of ``stds``, mean weight 1.

    stds: (T,), positive, the true standard deviations of the trained steps, s_t sqrt(-dt). ValueError otherwise.

    Departures from the paper:
    1. The mean is that of the schedule at hand; the released code fixes the factor 2.25, which is right for ten steps
       of SD3 at noise level 0.7 only.
    """
    if stds.ndim != 1 or len(stds) == 0 or not torch.all(stds > 0):
        raise ValueError(f"stds must be a non-empty row of positive numbers, got {stds.tolist()}")
    return stds / stds.mean()
