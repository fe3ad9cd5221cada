"""SPO, step-by-step preference optimisation (arXiv 2406.04314): two children of one state at each sampling step.

Two states that were sampled from the same x_t are compared. With log rho = log p_theta(x_(t-1) | x_t) -
log p_ref(x_(t-1) | x_t) of each, which ``Denoised.gain`` is for sampled steps (see
``trainers.diffusion_dpo.step_pairs``),

    loss = -log sigma(beta log clip(rho_w, 1 - c, 1 + c) - beta log clip(rho_l, 1 - c, 1 + c)).

Departures from the paper:
1. Its text has no clip; this is the released code, with its c = 0.1 and beta = 10.
2. log rho is a mean over the latent's dimensions, as in the released code, in nats per dimension.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss


def clipped_gap(pair: DenoisedPair, clip: float) -> Tensor:
    """log clip(rho_w, 1 - c, 1 + c) - log clip(rho_l, 1 - c, 1 + c): (B,); a side out of range has no gradient.

    clip: c in (0, 1). ValueError outside.
    """
    if not 0 < clip < 1:
        raise ValueError(f"clip must be in (0, 1), got {clip}: it bounds the ratio to 1 +- clip")
    low, high = math.log1p(-clip), math.log1p(clip)
    return pair.winner.gain.clamp(low, high) - pair.loser.gain.clamp(low, high)


@preference_loss("spo", idea="siblings of each step, clipped ratios", source="2406.04314", beta=10.0, steps=True)
def spo(pair: DenoisedPair, *, beta: float | Tensor, clip: float = 0.1) -> Tensor:
    """-log sigma(beta ``clipped_gap``): (B,). beta: per nat per dimension."""
    return -F.logsigmoid(beta * clipped_gap(pair, clip))
