"""DGPO, direct group preference optimisation (arXiv 2510.08425): DPO's sigmoid over whole groups of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffalign.losses.forward import ForwardStep
from diffalign.losses.registry import forward_objective


def group_statistic(
    step: ForwardStep, *, beta: float = 100.0, clip_range: float = math.inf, lagged_reference: float = 0.0
) -> Tensor:
    """A beta (l - l_ref), whose mean over a group is S: (B, 1). l = -E."""
    advantage = step.advantage.double()
    reference = step.old_log_p if lagged_reference else step.reference_log_p
    return (advantage * beta * (reference.double() - step.log_p.detach().double()))[:, None]


@forward_objective(
    "dgpo",
    idea="a sigmoid of the group's advantage-weighted gain",
    source="2510.08425",
    old=lambda options: math.isfinite(options["clip_range"]),
    linear=True,
    statistic=group_statistic,
    statistic_old=lambda options: bool(options["lagged_reference"]),
    statistic_reference=lambda options: not options["lagged_reference"],
)
def dgpo(
    step: ForwardStep, *, beta: float = 100.0, clip_range: float = math.inf, lagged_reference: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """sg(sigmoid(S)) A l with l = -E and S = mean over the group of A beta (l - l_ref): (B,), and metrics.

    At the start l = l_ref, S = 0 and the gradient is half of AWM's. The sigmoid falls as the group improves.

    Args:
        step: With ``group_mean`` of ``group_statistic``, and ``old`` where ``clip_range`` is finite.
        beta: Published 10 to 100 against the base model, 2000 to 5000 against lagged weights.
        clip_range: c. With rho = exp(l_old - l), l has no gradient where A > 0 and rho > 1 + c, or A <= 0 and
            rho < 1 - c. Infinite: no clipping, and no lagged pass.
        lagged_reference: 1: l_ref is that of the lagged weights (the release's ``use_ema_ref``); 0: of the base model.

    Departures from the released code:
    1. S is taken over the group's images in the optimizer step, at the same index of their times.
    2. Clipping leaves the KL to the reference as it is (the release's ``clip_dsm``).
    3. l_ref is without guidance, also where the KL is to a guided reference.

    Raises:
        ValueError: ``group_mean`` is missing, ``lagged_reference`` is neither 0 nor 1, or ``clip_range`` not positive.
    """
    if lagged_reference not in (0, 1):
        raise ValueError(f"objective_options.lagged_reference must be 0 or 1, got {lagged_reference:g}")
    if not clip_range > 0:
        raise ValueError(f"objective_options.clip_range must be positive, got {clip_range:g}: .inf disables it")
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
