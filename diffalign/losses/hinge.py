"""The hinge loss of SLiC-HF (arXiv 2305.10425): pairs with a large enough margin have no gradient."""

from __future__ import annotations

from torch import Tensor

from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss


@preference_loss("hinge", idea="linear up to a margin", source="2305.10425", beta=2500.0, margin=True)
def hinge(pair: DenoisedPair, *, beta: float | Tensor) -> Tensor:
    """max(0, 1 - beta margin): (B,), flat where the margin has reached 1 / beta.

    beta: in the units of the errors.

    Departures from the paper:
    1. Likelihoods are compared with the reference's, so that a policy starts at margin 0; the paper compares the
       policy's own, and regularises it with other samples; here the winner and anchor terms do that.
    """
    return (1 - beta * pair.margin).clamp(min=0)
