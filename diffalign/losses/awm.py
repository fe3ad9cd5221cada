"""Advantage weighted matching, AWM (arXiv 2509.25050): a policy gradient whose log-likelihood is the training loss."""

from __future__ import annotations

from torch import Tensor

from diffalign.losses.fdfo import quadratic_surrogate
from diffalign.losses.forward import ForwardStep, log_ratio, ratio_metrics
from diffalign.losses.registry import forward_objective


def clipped(
    log_rho: Tensor, advantage: Tensor, clip_range: float, quadratic: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)): the loss per sample (B,), and metrics with the share that is clipped.

    With ``quadratic`` not 0 it is ``fdfo.quadratic_surrogate``, the same trust region with a smooth edge.
    """
    if quadratic:
        loss, metrics = quadratic_surrogate(log_rho, advantage, clip_range, None)
        return loss, {**ratio_metrics(log_rho), "clip_share": metrics["clip_share"]}
    rho, advantage = log_rho.exp(), advantage.to(log_rho)
    plain, bounded = -advantage * rho, -advantage * rho.clamp(1 - clip_range, 1 + clip_range)
    share = (bounded > plain).double().mean()
    return plain.maximum(bounded), {**ratio_metrics(log_rho), "clip_share": share}


@forward_objective("awm", idea="policy gradient of the training loss", source="2509.25050", old=True, linear=True)
def awm(step: ForwardStep, *, clip_range: float = 1.0, quadratic: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)) with rho = exp(E - E_old): the loss per sample (B,), and metrics.

    On policy, rho = 1 and the gradient is -A grad E: fine-tuning on the images, weighted by advantages of either sign.

    Args:
        step: With ``old``, the weights that sampled.
        clip_range: c; the published 1 clips only ratios above 2.
        quadratic: 1 for a quadratic penalty instead of the clip.

    Departures from the released code:
    1. E_old belongs to the same noise and time as E, not to a stored pass.
    2. A ratio per time; the release may also average log p over the times of an image first.
    """
    return clipped(log_ratio(step), step.advantage, clip_range, quadratic)
