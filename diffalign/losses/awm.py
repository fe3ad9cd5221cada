"""Advantage weighted matching, AWM (arXiv 2509.25050): a policy gradient whose log-likelihood is the training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffalign.diffusion.parameterization import widen
from diffalign.losses.forward import ForwardStep, log_ratio, mean_square, required
from diffalign.losses.policy import region_loss
from diffalign.losses.registry import Options, forward_objective


def wants_mean(options: Options) -> bool:
    """Return whether the ratio is one per image: ``sum_first``."""
    return bool(options["sum_first"])


def mean_log_ratio(step: ForwardStep, **options: float) -> Tensor:
    """Return log rho, whose mean over the times of an image is that of ``sum_first``: (B, 1), a constant."""
    return log_ratio(step).detach()[:, None]


def surrogate(
    step: ForwardStep, advantage: Tensor, clip_range: float, sum_first: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss (B,) of the ratio in the step's trust region, and metrics.

    The divergence of ``dppo`` and ``kl`` is |v - v_old|^2, which the estimator ``uniform`` loses in expectation if
    v_old is the mean of the target.

    Args:
        step: With ``old``; with ``sum_first`` also ``group_mean``, the image's mean of ``mean_log_ratio``.
        advantage: (B,).
        clip_range: Bound of the region.
        sum_first: 1 for the ratio of an image's mean log-likelihood; 0 for one per time.

    Raises:
        ValueError: ``sum_first`` is neither 0 nor 1, ``clip_range`` not positive, or ``group_mean`` missing.
    """
    if sum_first not in (0, 1):
        raise ValueError(f"objective_options.sum_first must be 0 (ratio per time) or 1 (per image), got {sum_first:g}")
    if not clip_range > 0:
        raise ValueError(f"objective_options.clip_range must be positive, got {clip_range:g}: .inf disables it")
    log_rho = log_ratio(step)
    if sum_first:
        if step.group_mean is None:
            raise ValueError("sum_first needs means over times: give ForwardStep the mean of mean_log_ratio")
        # The value of the mean, with the gradient of each of its terms: the loss is averaged over times.
        log_rho = step.group_mean[:, 0].double() + log_rho - log_rho.detach()

    def divergence() -> Tensor:
        return mean_square(widen(step.output) - widen(required(step.old, "old").detach()))

    return region_loss(step.trust_region, log_rho, advantage, clip_range, divergence)


# What an objective of ``surrogate`` needs.
NEEDS: Mapping[str, Any] = {
    "old": True,
    "linear": True,
    "regions": True,
    "statistic": mean_log_ratio,
    "statistic_over": "image",
    "statistic_wanted": wants_mean,
    "statistic_old": True,
}


@forward_objective(
    "awm",
    idea="policy gradient of the training loss",
    source="2509.25050",
    **NEEDS,
)
def awm(step: ForwardStep, *, clip_range: float = 1.0, sum_first: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)) with rho = exp(E - E_old): the loss per sample (B,), and metrics.

    On policy, rho = 1 and the gradient is -A grad E: fine-tuning on the images, weighted by advantages of either sign.

    Args:
        step: With ``old``, the weights that sampled.
        clip_range: c; the published 1 clips only ratios above 2. For other trust regions, see ``surrogate``.
        sum_first: 1: E is the mean over an image's times, so that they share a ratio; published 0.

    Departures from the released code:
    1. E_old belongs to the same noise and time as E, not to a stored pass.
    """
    return surrogate(step, step.advantage, clip_range, sum_first)
