"""Linear-DPO (arXiv 2605.21123): a pair keeps a gradient, with a weight that falls linearly with its margin."""

from __future__ import annotations

from torch import Tensor

from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss

SLOPE = 0.2


@preference_loss("linear_dpo", idea="weights linear in the margin; averaged reference", source="2605.21123", beta=100.0)
def linear_dpo(pair: DenoisedPair, *, beta: float | Tensor, eta: float = 1e-3) -> Tensor:
    """u (L_w - L_l) with the constant u = clamp(1/2 - 0.2 beta margin, eta, 1 - eta): (B,).

    beta: in the units of the errors; published 100 (SD 1.5) and 500 (SDXL), with learning rates of ordinary
    fine-tuning. eta: in [0, 0.5), the smallest weight; published 1e-3 and 0. ValueError outside.
    The reference is meant to follow the policy as an average of its weights, decay 0.99 to 0.995.
    """
    if not 0 <= eta < 0.5:
        raise ValueError(f"eta must be in [0, 0.5), got {eta}: it bounds the weight of a pair from both sides")
    utility = (0.5 - SLOPE * beta * pair.margin.detach()).clamp(eta, 1 - eta)
    return -utility * pair.gap
