"""PEPG, the proximal ELBO policy gradient: EPG with a pull towards the lagged weights."""

from __future__ import annotations

from torch import Tensor

from diffalign.losses.epg import SOURCE
from diffalign.losses.forward import ForwardStep, log_ratio, ratio_metrics
from diffalign.losses.registry import forward_objective


@forward_objective("pepg", idea="EPG with a proximal term", source=SOURCE, old=True)
def pepg(step: ForwardStep, *, ratio: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg(rho (A - log rho)) E with rho = exp(E - E_old): the loss per sample (B,), and metrics.

    The term log rho is the gradient of a KL to the lagged weights. ``par`` has the same gradient.

    Args:
        step: With ``old``.
        ratio: Exponent of rho as a factor; 0 leaves it out, and keeps log rho.
    """
    log_rho = log_ratio(step)
    constant = log_rho.detach()
    weight = (ratio * constant).exp() * (step.advantage.to(log_rho) - constant)
    return -weight * step.log_p.double(), ratio_metrics(log_rho)
