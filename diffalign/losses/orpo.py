"""ORPO (arXiv 2403.07691): fine-tuning on winners with a small preference term; no reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss


@preference_loss("orpo", idea="the winner's loss and a weak preference", source="2403.07691", beta=0.1, reference=False)
def orpo(pair: DenoisedPair, *, beta: float | Tensor) -> Tensor:
    """L_w - beta log sigma(L_l - L_w): (B,).

    beta: the paper's lambda, the weight of the preference term; published 0.1.

    Departures from the paper:
    1. The log-odds ratio is the difference of errors. The paper's log(1 - P) has no meaning here: P is a density.
    2. The example scripts of diffusers have L_w - L_l under the sigmoid, which rewards a winner that is worse than the
       loser. This is the sign of the paper.
    """
    return pair.winner.error - beta * F.logsigmoid(pair.gap)
