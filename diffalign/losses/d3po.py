"""D3PO (arXiv 2311.13231): the steps of two whole sampling paths, labelled by their images.

    loss = -log sigma(beta log clip(rho_w, 1 - c, 1 + c) - beta log clip(rho_l, 1 - c, 1 + c))

with rho = p_theta(x_(t-1) | x_t) / p_ref(x_(t-1) | x_t) of one step of each path, where the two x_t differ. So a step
of the loser can have a gradient of the wrong sign, which siblings (``spo``, ``tailorpo``) rule out.

Departures from the paper: the clip, with c = 0.1, and beta = 0.1 are those of the released code.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss
from diffalign.losses.spo import clipped_gap


@preference_loss("d3po", idea="steps of two whole paths, clipped ratios", source="2311.13231", beta=0.1, steps=True)
def d3po(pair: DenoisedPair, *, beta: float | Tensor, clip: float = 0.1) -> Tensor:
    """-log sigma(beta ``clipped_gap``): (B,). beta: per nat per dimension."""
    return -F.logsigmoid(beta * clipped_gap(pair, clip))
