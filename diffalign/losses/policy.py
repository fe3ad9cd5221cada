"""Input of policy objectives, a stored transition under the current weights, and the trust regions of their ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffalign.diffusion.parameterization import expand, widen
from diffalign.structures import Level


@dataclass(frozen=True)
class PolicyStep:
    """One trained step of B samples, replayed under the current weights.

    log_prob: (B,), nats per dimension, with the policy's gradient. old_log_prob: (B,), under the sampling weights.
    advantage: (B,). mean: (B, C, *spatial), with the gradient. std: () or (B,), positive, the true one of the step.
    level, next_level: where the step begins and ends. old_mean: (B, C, *spatial), under the sampling weights; None
        for objectives and trust regions registered without ``means``.
    trust_region: a key of ``TRUST_REGIONS``.
    direction: (B, C, *spatial), half the difference of the sample's final latent from its partner's; None for
        objectives registered without ``partners``. output_scale: (), derivative of the mean by the denoiser's output.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    mean: Tensor
    std: Tensor
    level: Level
    next_level: Level
    old_mean: Tensor | None = None
    trust_region: str = "clip"
    direction: Tensor | None = None
    output_scale: Tensor | None = None


Surrogate = Callable[[Tensor, Tensor, "float | Tensor", "Tensor | None"], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class TrustRegion:
    """How far a surrogate lets a policy move from the sampling weights.

    Attributes:
        function: Maps (log-ratio (B,), advantage (B,), bound > 0, divergence (B,) or None) to losses (B,) and metrics.
        means: Whether it needs the divergence, the KL to the sampling policy in nats per dimension, with the gradient.
    """

    function: Surrogate
    means: bool = False


TRUST_REGIONS: dict[str, TrustRegion] = {}


def trust_region(name: str, *, means: bool = False) -> Callable[[Surrogate], Surrogate]:
    """Register a trust region; arguments as the fields of ``TrustRegion``. ValueError: the name is taken."""

    def register(function: Surrogate) -> Surrogate:
        if name in TRUST_REGIONS:
            raise ValueError(f"trust region {name!r} is registered already: choose another name")
        TRUST_REGIONS[name] = TrustRegion(function, means)
        return function

    return register


def surrogate(step: PolicyStep, log_ratio: Tensor, bound: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss per sample (B,) of a log-ratio in the step's trust region, and metrics.

    log_ratio: (B,), with the gradient. bound: > 0, of the ratio or, for "dppo" and "kl", of the divergence.
    ValueError: an unknown trust region, or one that needs means, without them.
    """

    def divergence() -> Tensor:
        if step.old_mean is None:
            raise ValueError(f"trust_region {step.trust_region!r} compares means: give PolicyStep the mean as sampled")
        return gaussian_kl(step.mean, step.old_mean, step.std)

    return region_loss(step.trust_region, log_ratio, step.advantage, bound, divergence)


def region_loss(
    name: str, log_ratio: Tensor, advantage: Tensor, bound: float | Tensor, divergence: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss per sample (B,) of a log-ratio in a trust region, and metrics.

    Args:
        name: A key of ``TRUST_REGIONS``.
        log_ratio: (B,), with the gradient.
        advantage: (B,).
        bound: > 0, of the ratio or, for "dppo" and "kl", of the divergence.
        divergence: Computes the divergence from the sampling policy, (B,), if the region needs it.

    Raises:
        ValueError: An unknown trust region.
    """
    if name not in TRUST_REGIONS:
        raise ValueError(f"unknown trust region {name!r}; known: {', '.join(TRUST_REGIONS)}")
    region = TRUST_REGIONS[name]
    return region.function(log_ratio, advantage, bound, divergence() if region.means else None)


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(reference_mean, std^2)) per dimension: mean_d (mean - reference_mean)^2 / (2 std^2).

    mean, reference_mean: (B, ...), the latter a constant. std: () or (B,), positive, the true one of the step.
    Returns (B,), float32 or wider, in nats per dimension.
    """
    mean = widen(mean)
    standardised = (mean - reference_mean.detach()) * expand(1 / std, mean)
    return standardised.square().reshape(len(mean), -1).mean(1) / 2
