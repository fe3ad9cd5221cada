"""CPO (arXiv 2401.08417): DPO under a uniform reference, which then drops out, and the winner's own loss beside it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss


# No diffusion model's beta is published: errors of two images that differ by 0.02 have the logit 1.
@preference_loss(
    "cpo", idea="logistic in the errors beside the winner's loss", source="2401.08417", beta=100.0, reference=False
)
def cpo(pair: DenoisedPair, *, beta: float | Tensor) -> Tensor:
    """-log sigma(beta (L_l - L_w) / 2) + L_w: (B,).

    beta: in the units of the errors. It needs to be far below that of DPO: errors of two images differ by much more
    than those of policy and reference.

    Departures from the paper:
    1. Log-likelihoods are negated denoising errors, halved in the logit as in Diffusion-DPO.
    """
    return pair.winner.error - F.logsigmoid(0.5 * beta * pair.gap)
