"""TailorPO (arXiv 2502.01667): the preferred of two siblings, judged by their predicted clean images, at every step.

    loss = -log sigma(beta [log rho_w - log rho_l]),   rho = p_theta(x_(t-1) | x_t) / p_ref(x_(t-1) | x_t)

with the same x_t in both, so that raising the winner's density lowers the loser's. It is DPO of one step.

Departures from the paper: no code is published, and its beta is not stated; 10 is that of SPO.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss


@preference_loss(
    "tailorpo",
    idea="logistic in the log-ratios of two siblings",
    source="2502.01667",
    beta=10.0,
    margin=True,
    steps=True,
)
def tailorpo(pair: DenoisedPair, *, beta: float | Tensor, label: float | Tensor = 1.0) -> Tensor:
    """-p log sigma(z) - (1 - p) log sigma(-z), z = beta margin: (B,). label: p, as in ``diffusion_dpo``."""
    logit = beta * pair.margin
    preferred = label.to(logit) if isinstance(label, Tensor) else label
    return -preferred * F.logsigmoid(logit) - (1 - preferred) * F.logsigmoid(-logit)
