"""IPO (arXiv 2310.12036): regress the margin to a finite value."""

from __future__ import annotations

from torch import Tensor

from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss


@preference_loss("ipo", idea="squared distance from a margin", source="2310.12036", beta=2500.0, margin=True)
def ipo(pair: DenoisedPair, *, beta: float | Tensor) -> Tensor:
    """(margin - 1 / (2 beta))^2: (B,).

    beta: the paper's tau, in the units of the errors. The loss is about 1 / (4 beta^2) at first, and its gradient 1 /
    beta times that of the margin: an optimizer that is not scale-free needs its learning rate raised with beta.

    Departures from the paper:
    1. The log-likelihood ratios are gains, the differences of denoising errors.
    """
    return (pair.margin - 1 / (2 * beta)).square()
