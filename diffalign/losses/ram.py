"""RAM, reinforce adjoint matching (arXiv 2605.10759): regress on the reference, shifted by the advantage."""

from __future__ import annotations

from torch import Tensor

from diffalign.diffusion.parameterization import expand, widen
from diffalign.losses.forward import ForwardStep, mean_square, required
from diffalign.losses.registry import forward_objective


@forward_objective(
    "ram", idea="regression on a shifted reference", source="2605.10759", old=True, reference=True, estimator=False
)
def ram(step: ForwardStep, *, multiplier: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """|v - sg(v_ref + m A (u - v_old))|^2: the loss per sample (B,), and metrics.

    In expectation v settles at v_ref + m E[A (u - v_old)], so that the reference anchors it without a KL. At
    v = v_ref = v_old the gradient is m A grad |v - u|^2, the direction of AWM's.

    Args:
        step: With ``old`` and ``reference``.
        multiplier: m, the strength of the reward.

    Departures:
    1. Written from a second-hand formula; the published m and lag are not known.
    """
    v_ref, v_old = widen(required(step.reference, "reference").detach()), widen(required(step.old, "old").detach())
    v, u = widen(step.output), widen(step.target.detach())
    target = v_ref + expand(multiplier * step.advantage, v) * (u - v_old)
    return mean_square(v - target), {"drift": mean_square(v.detach() - v_ref).mean()}
