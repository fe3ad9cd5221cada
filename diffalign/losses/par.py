"""PAR, proximal advantage regression: fit the ELBO's log-ratio to the advantage."""

from __future__ import annotations

from torch import Tensor

from diffalign.losses.epg import SOURCE
from diffalign.losses.forward import ForwardStep, log_ratio, ratio_metrics
from diffalign.losses.registry import forward_objective


@forward_objective("par", idea="regression of the log-ratio on the advantage", source=SOURCE, old=True)
def par(step: ForwardStep, *, ratio: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """1/2 sg(rho) (A - (E - E_old))^2 with rho = exp(E - E_old): the loss per sample (B,), and metrics.

    Its gradient, -rho (A - log rho) grad E, is that of ``pepg``; the two differ in the value that is logged.

    Args:
        step: With ``old``.
        ratio: Exponent of rho as a factor; 0 leaves it out.
    """
    log_rho = log_ratio(step)
    rho = (ratio * log_rho.detach()).exp()
    return 0.5 * rho * (step.advantage.to(log_rho) - log_rho).square(), ratio_metrics(log_rho)
