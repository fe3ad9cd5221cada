"""LeapAlign (arXiv 2604.15311): weight samples by the distance of two leaps from their trajectory.

Distances are mean absolute differences, bounded below by tau = 0.1 before they are summed, and alpha = 0.3 of the
gradient passes through the second call's input: the paper's constants for HPSv2.1, with a hinge at 0.55, as in FlowBP's
reproduction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gap_weights(gaps: Sequence[Tensor], floor: float) -> Tensor:
    """Compute 1 / sum over leaps of max(d, floor), d the distance of a leap's end from the trajectory's state: (B,).

    gaps: per leap (B,), constants, in units of the latents. floor: the paper's tau, positive; it bounds the weight of a
    sample whose leaps end on the trajectory.
    """
    return 1 / torch.stack(list(gaps)).clamp(min=floor).sum(0)
