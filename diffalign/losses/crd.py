"""CRD, centred reward distillation (arXiv 2603.14128): fit centred implicit rewards to centred rewards of a group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from diffalign.losses.forward import ForwardStep, log_ratio
from diffalign.losses.registry import forward_objective

MAX_EXPONENT = 300.0  # of a group weight; sums of its exponential stay finite in float64


def group_statistic(step: ForwardStep, *, weight_temp: float = -1.0, **options: float) -> Tensor:
    """Return what the centres of a group are made of, by means over it: (B, 2) or (B, 8), float64.

    (r, A) for uniform weights; with others also (w, w r, w A) for the weights towards the best samples, and for those
    towards the worst.
    """
    values = torch.stack([log_ratio(step).detach(), step.advantage.double()], 1)
    if weight_temp < 0:
        return values
    weights = group_weights(step.advantage.double(), weight_temp)
    return torch.cat([values, *(torch.cat([w[:, None], w[:, None] * values], 1) for w in weights)], 1)


def group_weights(advantage: Tensor, weight_temp: float) -> tuple[Tensor, Tensor]:
    """Return unnormalised weights (B,) towards the best and the worst samples of a group.

    exp(A / T) and exp(-A / T); at T = 0 exp(A) of the samples with A > 0, and exp(A) of those with A < 0.
    """
    if weight_temp == 0:
        weight = advantage.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
        return weight * (advantage > 0), weight * (advantage < 0)
    scaled = (advantage / weight_temp).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return scaled.exp(), (-scaled).exp()


def centres(mean: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the centres (r, A), each (B,), of the means of ``group_statistic``: one pair, or two.

    Where all weights of a group are zero, as at T = 0 without a sample of that sign, its centre is the plain mean.
    """
    plain = mean[:, :2]
    if mean.shape[1] == 2:
        return [(plain[:, 0], plain[:, 1])]
    found = []
    for first in (2, 5):
        weight = mean[:, first : first + 1]
        own = torch.where(weight > 0, mean[:, first + 1 : first + 3] / weight.clamp(min=1e-300), plain)
        found.append((own[:, 0], own[:, 1]))
    return found


@forward_objective(
    "crd",
    idea="regression of centred implicit rewards",
    source="2603.14128",
    old=True,
    statistic=group_statistic,
    statistic_old=True,
)
def crd(
    step: ForwardStep, *, beta: float = 1.0, weight_temp: float = -1.0, bce: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """scale (beta (r - sg(mean r)) - (A - mean A))^2, r = E - E_old, means over the group: (B,), and metrics.

    The paper's r has the estimator ``adaptive_output``. In the code of Flow-Factory A is clip(A / 10 + 1/2, 0, 1), the
    advantage scaled by 0.1 but for a constant, and scale is 5 / beta, 5 being the bound of advantages.

    Args:
        step: With ``old``, and with ``group_mean`` of ``group_statistic``.
        beta: Units of the implicit reward r.
        weight_temp: T of the group's weights softmax(A / T) and softmax(-A / T), whose two losses are averaged; 0: the
            samples of each sign of A alone; negative: uniform weights, and one loss.
        bce: 1: the cross-entropy of sigmoid(A - mean A) and sigmoid(beta (r - mean r)) instead of the square; 0: not.
        scale: Factor of the loss, which weighs it against anchors.

    Raises:
        ValueError: ``group_mean`` is missing, or ``bce`` is neither 0 nor 1.
    """
    if step.group_mean is None:
        raise ValueError("crd needs means over groups: give ForwardStep the mean of group_statistic")
    if bce not in (0, 1):
        raise ValueError(f"objective_options.bce must be 0 (squares) or 1 (cross-entropy), got {bce:g}")
    r, losses = log_ratio(step), []
    for centre, mean in centres(step.group_mean.double()):
        implicit, wanted = beta * (r - centre), step.advantage.double() - mean
        if bce:
            losses.append(binary_cross_entropy_with_logits(implicit, wanted.sigmoid(), reduction="none"))
        else:
            losses.append((implicit - wanted).square())
    return scale * torch.stack(losses).mean(0), {"implicit_reward": r.detach().abs().mean()}
