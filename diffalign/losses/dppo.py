"""Flow-DPPO (arXiv 2606.11025): no clip of the ratio; steps whose divergence is too large and grows are left out.

    L = -A r, and 0 where kappa >= tau and (r > 1 and A > 0, or r < 1 and A < 0)

with kappa = ||mu_theta - mu_old||^2 / (2 std^2), the KL of the step's Gaussians (eq. 14, 18), and tau = ``clip_range``.

Departures from the paper:
1. kappa and tau are per dimension, as in the released code, whose tau is 1e-5; ``clip_unit: joint`` is the paper's sum.
2. std is the true one of the step. The released code clamps sigma at 0.99 under its root, where this package follows
   Flow-GRPO: see ``diffusion.steps``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffalign.device import to_float64
from diffalign.losses.flow_grpo import bounded_ratio, ratio_metrics
from diffalign.losses.policy import PolicyStep, surrogate, trust_region
from diffalign.losses.registry import policy_objective


@trust_region("dppo", means=True)
def divergence_mask(
    log_ratio: Tensor, advantage: Tensor, bound: float | Tensor, divergence: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A r, without gradient where the divergence has reached the bound and A moves it further: (B,), and metrics."""
    assert divergence is not None
    ratio = bounded_ratio(log_ratio)
    advantage, kappa = advantage.detach().to(ratio), to_float64(divergence.detach()).to(ratio.device)
    away = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
    outside = away & (kappa >= bound)
    loss = -advantage * torch.where(outside, ratio.detach(), ratio)
    figures = {"divergence": kappa.mean(), "divergence_max": kappa.max()}
    return torch.where(outside, 0.0, loss), ratio_metrics(ratio, outside) | figures


@policy_objective("dppo", idea="steps of large divergence are left out", source="2606.11025", means=True)
def dppo(step: PolicyStep, *, clip_range: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``divergence_mask`` of a step: losses (B,) and metrics."""
    log_ratio = to_float64(step.log_prob) - to_float64(step.old_log_prob.detach())
    return surrogate(replace(step, trust_region="dppo"), log_ratio, clip_range)


@trust_region("kl", means=True)
def divergence_penalty(
    log_ratio: Tensor, advantage: Tensor, bound: float | Tensor, divergence: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A r + |A| kappa / bound: PPO's KL penalty (arXiv 1707.06347, eq. 8) on the same divergence: (B,), and metrics.

    The loss of one sample, moved along its own noise, is least at log r = bound, as that of ``quadratic_surrogate`` is:
    its advantage scales penalty and gain alike.
    """
    assert divergence is not None
    ratio = bounded_ratio(log_ratio)
    advantage, kappa = advantage.detach().to(ratio), to_float64(divergence).to(ratio.device)
    loss = -advantage * ratio + advantage.abs() * kappa / bound
    figures = {"divergence": kappa.detach().mean(), "divergence_max": kappa.detach().max()}
    return loss, ratio_metrics(ratio, kappa.detach() >= bound) | figures
