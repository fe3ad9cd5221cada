"""Flow-GRPO (arXiv 2505.05470): the clipped surrogate on one step's density, and the KL to the reference.

Log-probabilities are means over the D dimensions of a sample (see ``StepResult``). So a log-ratio is in nats per
dimension, 1 / D of the joint one, and so are the clip range and the KL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.device import to_float64
from diffalign.diffusion.parameterization import expand
from diffalign.losses.policy import PolicyStep, gaussian_kl, surrogate, trust_region
from diffalign.losses.registry import policy_objective
from diffalign.structures import Level

# exp stays finite in float32, also when multiplied with an advantage and squared into a gradient norm's range.
MAX_LOG_RATIO = 40.0


def clipped_surrogate(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(A r, A clip(r, 1 - e, 1 + e)) with r = exp(log_prob - old_log_prob): the loss per sample (B,), and metrics.

    log_prob, old_log_prob: (B,), nats per dimension. advantage: (B,). clip_range: e > 0, () or (B,), on the ratio per
    dimension; see ``clip_range_per_dimension``. Only ``log_prob`` receives a gradient, on-policy -A grad log_prob.
    Computed in float64, because 1 +- e, with e of 1e-6 to 1e-4, has a digit or two in float32; on the CPU where the
    device has no float64.

    Metrics, detached and 0-dim: ratio_mean; log_ratio_max, the largest |log r|; clip_share, the share of samples whose
    gradient the clip removes; approx_kl = mean (log r)^2 / 2.

    Departures from the paper:
    1. clip_share counts A > 0, r > 1 + e and A < 0, r < 1 - e; a ratio off range on the other side is not clipped.
    2. log r is held within +-40, far beyond any clip range, so that a diverged sample cannot make the loss NaN.
    """
    log_ratio = to_float64(log_prob) - to_float64(old_log_prob.detach())
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantage = advantage.detach().to(log_ratio.device)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)  # type: ignore[arg-type]
    loss = -torch.minimum(advantage * ratio, advantage * clipped)
    return loss, _metrics(log_ratio.detach(), advantage, clip_range)


@policy_objective("flow_grpo", idea="clipped surrogate of a step's density", source="2505.05470", regions=True)
def flow_grpo(step: PolicyStep, *, clip_range: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the surrogate of a step's ratio in its trust region: losses (B,) and metrics."""
    return surrogate(step, to_float64(step.log_prob) - to_float64(step.old_log_prob.detach()), clip_range)


@trust_region("clip")
def clip(
    log_ratio: Tensor, advantage: Tensor, bound: float | Tensor, divergence: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``clipped_surrogate`` with ``bound`` as clip range."""
    return clipped_surrogate(log_ratio, log_ratio.new_zeros(()), advantage, bound)


def bounded_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), which is held within +-``MAX_LOG_RATIO``: (B,), float64."""
    return to_float64(log_ratio).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def ratio_metrics(ratio: Tensor, outside: Tensor) -> dict[str, Tensor]:
    """Return the metrics of ``clipped_surrogate``, where ``outside`` (B,) tells which samples the bound acts on."""
    log_ratio = ratio.detach().log()
    return {
        "ratio_mean": ratio.detach().mean(),
        "log_ratio_max": log_ratio.abs().max(),
        "clip_share": outside.to(ratio.dtype).mean(),
        "approx_kl": log_ratio.square().mean() / 2,
    }


def _metrics(log_ratio: Tensor, advantage: Tensor, clip_range: float | Tensor) -> dict[str, Tensor]:
    ratio = log_ratio.exp()
    clipped = ((advantage > 0) & (ratio > 1 + clip_range)) | ((advantage < 0) & (ratio < 1 - clip_range))
    return {
        "ratio_mean": ratio.mean(),
        "log_ratio_max": log_ratio.abs().max(),
        "clip_share": clipped.to(ratio.dtype).mean(),
        "approx_kl": log_ratio.square().mean() / 2,
    }


def published_kl(
    mean: Tensor, reference_mean: Tensor, std: Tensor, level: Level, next_level: Level, solver: str = "flow_sde"
) -> Tensor:
    """Return the KL term of the paper's released code, which weights a step of "flow_sde" by its length. (B,).

    That code divides mean_d (mean - reference_mean)^2 by twice the square of what its step function returns beside the
    mean (``std_dev_t``). For "flow_sde" this is the diffusion s, where the step's variance is s^2 (-dt), so that the
    term is ``gaussian_kl`` times -dt = sigma - sigma'. For "cps", and in the code that has "dance_sde", it is the
    step's own std, so that the term is ``gaussian_kl``; so it is here for "ddim", which that code does not have.
    Use it only to reproduce results with published coefficients. solver: of the step. Other arguments as in
    ``gaussian_kl``.
    """
    kl = gaussian_kl(mean, reference_mean, std)
    return kl * expand(level.sigma - next_level.sigma, kl) if solver == "flow_sde" else kl


def clip_range_per_dimension(value: float, unit: str, num_dimensions: int) -> float:
    """A clip range in nats per dimension, as ``clipped_surrogate`` takes it.

    unit: "per_dim", as it is (the published 1e-4, whose strength depends on the resolution), or "joint", nats of a
    sample's joint log-ratio, divided by its D = ``num_dimensions``: 6.55 joint nats are 1e-4 at D = 65536.
    ValueError: another unit, or a value that is not positive.
    """
    divisors = {"per_dim": 1, "joint": num_dimensions}
    if unit not in divisors:
        raise ValueError(f"unknown unit {unit!r} of the clip range; known: {', '.join(divisors)}")
    if not value > 0:
        raise ValueError(f"the clip range must be positive, got {value}")
    return value / divisors[unit]
