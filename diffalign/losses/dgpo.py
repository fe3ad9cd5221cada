"""DGPO, direct group preference optimisation (arXiv 2510.08425): DPO's sigmoid over whole groups of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffalign.losses.forward import ForwardStep
from diffalign.losses.registry import forward_objective


def group_statistic(step: ForwardStep, *, beta: float = 100.0, clip_range: float = math.inf) -> Tensor:
    """A beta (l - l_ref), whose mean over a group is S: (B, 1). l = -E."""
    advantage = step.advantage.double()
    return (advantage * beta * (step.reference_log_p.double() - step.log_p.detach().double()))[:, None]


@forward_objective(
    "dgpo",
    idea="a sigmoid of the group's advantage-weighted gain",
    source="2510.08425",
    old=lambda options: math.isfinite(options["clip_range"]),
    linear=True,
    statistic=group_statistic,
    statistic_reference=True,
)
def dgpo(step: ForwardStep, *, beta: float = 100.0, clip_range: float = math.inf) -> tuple[Tensor, dict[str, Tensor]]:
    """sg(sigmoid(S)) A l with l = -E and S = mean over the group of A beta (l - l_ref): (B,), and metrics.

    At the start l = l_ref, S = 0 and the gradient is half of AWM's. The sigmoid falls as the group improves.

    Args:
        step: With ``group_mean`` of ``group_statistic``, and ``old`` where ``clip_range`` is finite.
        beta: Published 10 to 100 against the base model.
        clip_range: c. With rho = exp(l_old - l), l has no gradient where A > 0 and rho > 1 + c, or A <= 0 and
            rho < 1 - c. Infinite: no clipping, and no lagged pass.

    Departures from the released code:
    1. S is taken over the group's images in the optimizer step, at the same index of their times.
    2. Clipping leaves the KL to the reference as it is (the release's ``clip_dsm``).
    """
    if step.group_mean is None:
        raise ValueError("dgpo needs sums over groups: give ForwardStep the mean of group_statistic")
    loss, advantage = -step.log_p.double(), step.advantage.double()
    weight = step.group_mean[:, 0].double().sigmoid()
    metrics = {"sigmoid": weight.mean()}
    if math.isfinite(clip_range):
        rho = (-loss.detach() - step.old_log_p.double()).exp()
        stopped = torch.where(advantage > 0, rho > 1 + clip_range, rho < 1 - clip_range)
        loss = torch.where(stopped, loss.detach(), loss)
        metrics["clip_share"] = stopped.double().mean()
    return weight * advantage * loss, metrics
