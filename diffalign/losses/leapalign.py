"""LeapAlign (arXiv 2604.15311): samples count by how far two leaps over their sampling miss it.

Distances are means of absolute differences, each is bounded by tau = 0.1 before they are added, and alpha = 0.3 of the
gradient passes through the second call's input: the paper's constants for HPSv2.1, with a hinge at 0.55, which FlowBP's
reproduction has too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gap_weights(gaps: Sequence[Tensor], floor: float) -> Tensor:
    """1 / sum over leaps of max(d, floor), with d the distance of a leap's end from the sampling's state: (B,).

    gaps: per leap (B,), constants, in units of the latents. floor: the paper's tau, positive; it bounds the weight of a
    sample whose leaps meet the sampling.
    """
    return 1 / torch.stack(list(gaps)).clamp(min=floor).sum(0)
