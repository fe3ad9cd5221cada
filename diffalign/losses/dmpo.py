"""DMPO (arXiv 2507.07510): the reverse KL between the policy's preference and the label, so a margin has an optimum."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.diffusion_dpo import dpo_logit
from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss


@preference_loss("dmpo", idea="reverse KL to the label", source="2507.07510", beta=2000.0, margin=True)
def dmpo(pair: DenoisedPair, *, beta: float | Tensor, alpha: float = 0.01) -> Tensor:
    """KL(Bernoulli(sigma(z)) || Bernoulli(1 - alpha)), z = ``dpo_logit``: (B,), 0 where sigma(z) = 1 - alpha.

    beta: in the units of the errors; published 2000. alpha: in (0, 0.5), the assumed probability of a wrong label.
    ValueError: alpha outside.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must be in (0, 0.5), got {alpha}: at 0 the divergence is infinite")
    logit = dpo_logit(pair, beta)
    preferred = logit.sigmoid() * (F.logsigmoid(logit) - math.log1p(-alpha))
    return preferred + (-logit).sigmoid() * (F.logsigmoid(-logit) - math.log(alpha))
