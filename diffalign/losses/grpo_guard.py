"""GRPO-Guard (arXiv 2510.22319): a ratio whose mean is 1 and whose spread is alike at every step, so clipping works."""

from __future__ import annotations

from torch import Tensor

from diffalign.device import to_float64
from diffalign.diffusion.parameterization import expand
from diffalign.losses.flow_grpo import clipped_surrogate
from diffalign.losses.policy import PolicyStep, gaussian_kl, surrogate
from diffalign.losses.registry import policy_objective
from diffalign.structures import Level


def guarded_log_ratio(log_prob: Tensor, old_log_prob: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """c [log_prob - old_log_prob + mean_d (mean - old_mean)^2 / (2 c^2)] with c = std: (B,).

    For a sample drawn as old_mean + c eps this is mean_d eps (mean - old_mean): centred, and free of 1 / c. In float64,
    as the clip range of 2e-6 is close to the rounding of float32 at 1.
    log_prob, old_log_prob: (B,). mean, old_mean: (B, ...). std: () or (B,), positive, the true one of the step.
    """
    change = to_float64(log_prob) - to_float64(old_log_prob.detach())
    log_ratio = change + gaussian_kl(mean, old_mean, std).to(change.device)
    return log_ratio * expand(std, log_ratio)


def grpo_guard(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: Tensor,
    advantage: Tensor,
    clip_range: float,
    level: Level,
    next_level: Level,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(A r, A clip(r, 1 - e, 1 + e)) / (-dt), log r = ``guarded_log_ratio``: loss per sample (B,), and metrics.

    advantage: (B,). clip_range: e > 0, published 2e-6. level, next_level: the step's, sigma - sigma' = -dt > 0.
    Other arguments as in ``guarded_log_ratio``; metrics as in ``clipped_surrogate``, of the guarded ratio.

    Departures from the paper's released code:
    1. The bias (mean - old_mean)^2 is averaged over a sample's dimensions, not over the batch.
    """
    log_ratio = guarded_log_ratio(log_prob, old_log_prob, mean, old_mean, std)
    loss, metrics = clipped_surrogate(log_ratio, log_ratio.new_zeros(()), advantage, clip_range)
    return loss * expand(1 / (level.sigma - next_level.sigma), loss), metrics


@policy_objective(
    "grpo_guard", idea="clipped surrogate of a centred ratio", source="2510.22319", means=True, regions=True
)
def guarded_surrogate(step: PolicyStep, *, clip_range: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``grpo_guard`` of a step in its trust region: losses (B,) and metrics. ValueError without ``old_mean``."""
    if step.old_mean is None:
        raise ValueError("grpo_guard compares means: give PolicyStep the mean as it was sampled")
    log_ratio = guarded_log_ratio(step.log_prob, step.old_log_prob, step.mean, step.old_mean, step.std)
    loss, metrics = surrogate(step, log_ratio, clip_range)
    return loss * expand(1 / (step.level.sigma - step.next_level.sigma), loss), metrics
