"""DiffusionNFT (arXiv 2509.16117): an implicit positive and an implicit negative policy, weighted by optimality."""

from __future__ import annotations

from torch import Tensor

from diffalign.diffusion.parameterization import expand, widen
from diffalign.losses.forward import ForwardStep, mean_abs, mean_square, required
from diffalign.losses.registry import forward_objective


def optimality(advantage: Tensor, advantage_max: float) -> Tensor:
    """r = clip(A / (2 A_max) + 1/2, 0, 1): the probability that an image is optimal."""
    return (advantage / (2 * advantage_max) + 0.5).clamp(0, 1)


@forward_objective(
    "nft", idea="implicit positive and negative policies", source="2509.16117", old=True, estimator=False
)
def nft(step: ForwardStep, *, beta: float = 1.0, advantage_max: float = 5.0) -> tuple[Tensor, dict[str, Tensor]]:
    """A_max [r |x0+ - x0|^2 / (beta w+) + (1 - r) |x0- - x0|^2 / (beta w-)]: the loss per sample (B,), and metrics.

        v+ = (1 - beta) v_old + beta v,   v- = (1 + beta) v_old - beta v,   r = clip(A / (2 A_max) + 1/2, 0, 1),

    x0+- predicted by v+-, and w+- = sg(mean |x0+- - x0|), at least 1e-5. At v = v_old and |A| <= A_max the gradient is
    A times that of |x0_hat - x0|^2 / w, for every beta: 2 r - 1 = A / A_max.

    Args:
        step: With ``old``.
        beta: Positive; published 1, and 0.1 for text rendering and several rewards.
        advantage_max: A_max, the bound of advantages.

    Departures from the released code:
    1. w is computed in the precision of the errors, float32 or wider, not in float64.
    2. Epsilon and v models are covered: x0+- is predicted by their own parameterization.
    """
    if not (beta > 0 and advantage_max > 0):
        raise ValueError(f"objective_options: beta and advantage_max must be positive, got {beta:g}, {advantage_max:g}")
    v, v_old = widen(step.output), widen(required(step.old, "old").detach())
    v_plus = (1 - beta) * v_old + beta * v
    v_minus = (1 + beta) * v_old - beta * v
    positive, negative = step.x0_error(v_plus), step.x0_error(v_minus)
    r = expand(optimality(step.advantage, advantage_max), v).flatten()

    loss_plus = mean_square(positive) / (beta * mean_abs(positive))
    loss_minus = mean_square(negative) / (beta * mean_abs(negative))
    metrics = {"drift": mean_square(v.detach() - v_old).mean(), "optimality": r.mean()}
    return advantage_max * (r * loss_plus + (1 - r) * loss_minus), metrics
