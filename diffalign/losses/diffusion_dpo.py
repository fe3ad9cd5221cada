"""Diffusion-DPO (arXiv 2311.12908): winners denoised better than by the reference, losers worse; labels may be soft."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.errors import REDUCTIONS, DenoisedPair
from diffalign.losses.registry import preference_loss


def dpo_logit(pair: DenoisedPair, beta: float | Tensor) -> Tensor:
    """beta margin / 2: (B,), the log-odds by which the policy, against its reference, prefers the winner."""
    return 0.5 * beta * pair.margin


@preference_loss(
    "dpo", idea="logistic in the margin; soft labels, smoothing", source="2311.12908", beta=2000.0, margin=True
)
def diffusion_dpo(
    pair: DenoisedPair, *, beta: float | Tensor, label: float | Tensor = 1.0, smoothing: float = 0.0
) -> Tensor:
    """-p log sigma(z) - (1 - p) log sigma(-z) with z = ``dpo_logit``, p = label (1 - s) + (1 - label) s: (B,).

    beta: in the units of the errors, see ``convert_beta``; published 2000 to 5000 for the reduction "mean".
    label: the probability that the winner is preferred, () or (B,), in [0, 1]; 0.5 is a tie. Soft labels
        from reward differences are those of SmPO (arXiv 2506.02698).
    smoothing: s in [0, 0.5), the assumed fraction of wrong labels (cDPO). ValueError outside.

    Departures from the paper:
    1. Its weight T omega(lambda_t) is part of beta and the same at all levels, as in the released code.
    2. z = beta margin / 2, with the factor of the released code; the paper's objective has none.
    """
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"smoothing must be in [0, 0.5), got {smoothing}: it is the share of wrong labels")
    logit = dpo_logit(pair, beta)
    if isinstance(label, Tensor):
        label = label.to(logit)
    preferred = label + smoothing * (1 - 2 * label)
    return -preferred * F.logsigmoid(logit) - (1 - preferred) * F.logsigmoid(-logit)


def convert_beta(beta: float, given: str, wanted: str, num_dimensions: int) -> float:
    """Convert a beta for errors of one reduction to the beta that gives the same loss with the other.

    A sum over D = ``num_dimensions`` = C h w is D times the mean, so beta_sum = beta_mean / D: 5000 for the mean over
    4 x 64 x 64 is 0.305 for the sum. Under a mask D is C times the mask's weight, of each sample.
    ValueError: an unknown reduction.
    """
    sizes = {"mean": 1.0, "sum": float(num_dimensions)}
    for reduction in (given, wanted):
        if reduction not in sizes:
            raise ValueError(f"unknown reduction {reduction!r}; use one of {', '.join(REDUCTIONS)}")
    return beta * sizes[given] / sizes[wanted]
