"""DRO, direct reward optimization (DSO, arXiv 2503.22677): learn winners and unlearn losers, without a bound."""

from __future__ import annotations

from torch import Tensor

from diffalign.losses.errors import Denoised, DenoisedPair
from diffalign.losses.registry import preference_loss


@preference_loss("dro", idea="learn winners, unlearn losers", source="2503.22677", reference=False)
def dro(pair: DenoisedPair) -> Tensor:
    """L_w - L_l: (B,). There is no reference, no beta and no bound: the loser's error grows as long as it trains.

    Departures from the paper:
    1. Its weight T w(t) is 1, as in the released code, which takes pairs too.
    """
    return -pair.gap


@preference_loss(
    "dro_unpaired", idea="learn liked images, unlearn others", source="2503.22677", paired=False, reference=False
)
def dro_unpaired(denoised: Denoised, liked: Tensor) -> Tensor:
    """L for liked samples, -L for the others: (B,), the paper's own form. liked: (B,), bool. See ``dro``."""
    error = denoised.error
    return (2 * liked.to(error) - 1) * error
