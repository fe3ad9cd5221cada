"""V-GRPO (arXiv 2604.23380): GRPO on a variational stand-in for the likelihood, with noise shared in the group."""

from __future__ import annotations

from torch import Tensor

from diffalign.losses.awm import NEEDS, surrogate
from diffalign.losses.forward import ForwardStep
from diffalign.losses.registry import forward_objective


@forward_objective(
    "v_grpo",
    idea="clipped surrogate of the ELBO's ratio",
    source="2604.23380",
    **NEEDS,
)
def v_grpo(
    step: ForwardStep, *, clip_range: float = 0.03, eta: float = 0.0, sum_first: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)) with rho = exp(E - E_old): the loss per sample (B,), and metrics.

    The method draws times and noise once per group and lays the times in strata; both are options of the trainer.

    Args:
        step: With ``old``, the weights that sampled.
        clip_range: c, published 0.03; infinite where ``eta`` bounds the advantage instead. For other trust regions,
            see ``awm.surrogate``.
        eta: Replace A by eta tanh(A / eta), published 3 to 5; 0: leave A as it is.
        sum_first: 1: E is the mean over an image's times, so that they share a ratio; 0: a ratio per time.

    Departures:
    1. Written from a summary of the paper; the authors' code was not at hand.
    """
    advantage = eta * (step.advantage / eta).tanh() if eta else step.advantage
    return surrogate(step, advantage, clip_range, sum_first)
