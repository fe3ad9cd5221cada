"""EPG, a policy gradient with the ELBO as likelihood, as in the code "rethinking-diffusion-rl"."""

from __future__ import annotations

from torch import Tensor

from diffalign.losses.forward import ForwardStep, log_ratio, ratio_metrics
from diffalign.losses.registry import forward_objective

SOURCE = "jaemoo-choi/rethinking-diffusion-rl"


@forward_objective("epg", idea="policy gradient of the ELBO", source=SOURCE, old=True, linear=True)
def epg(step: ForwardStep, *, ratio: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """-sg(rho) A E with rho = exp(E - E_old): the loss per sample (B,), and metrics.

    At rho = 1 the gradient is that of on-policy GRPO, -A grad E.

    Args:
        step: With ``old``.
        ratio: Exponent of rho; 1 corrects for the lagged weights, 0 does not (the release's "noratio").
    """
    log_rho = log_ratio(step)
    weight = (ratio * log_rho.detach()).exp() * step.advantage.to(log_rho)
    return -weight * step.log_p.double(), ratio_metrics(log_rho)
