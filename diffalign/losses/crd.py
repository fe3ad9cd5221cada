"""CRD, centred reward distillation (arXiv 2603.14128): fit centred implicit rewards to centred rewards of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.losses.forward import ForwardStep, log_ratio
from diffalign.losses.registry import forward_objective


def group_statistic(step: ForwardStep, *, beta: float = 1.0) -> Tensor:
    """Return (r, A), whose means over a group centre both: (B, 2), float64."""
    return torch.stack([log_ratio(step).detach(), step.advantage.double()], 1)


@forward_objective(
    "crd",
    idea="regression of centred implicit rewards",
    source="2603.14128",
    old=True,
    statistic=group_statistic,
    statistic_old=True,
)
def crd(step: ForwardStep, *, beta: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """(beta (r - sg(mean r)) - (A - mean A))^2 with r = E - E_old and means over the group: (B,), and metrics.

    The paper's r has the estimator ``adaptive_output``.

    Args:
        step: With ``old``, and with ``group_mean`` of ``group_statistic``.
        beta: Units of the implicit reward r.

    Departures from the paper:
    1. The group's means are uniform: its softmax weights (``weight_temp``) and its cross-entropy form are left out.
    """
    if step.group_mean is None:
        raise ValueError("crd needs means over groups: give ForwardStep the mean of group_statistic")
    r, mean = log_ratio(step), step.group_mean.double()
    residual = beta * (r - mean[:, 0]) - (step.advantage.double() - mean[:, 1])
    return residual.square(), {"implicit_reward": r.detach().abs().mean()}
