"""FDFO, finite-difference flow optimisation (arXiv 2603.12893): pairs from one noise, pulled towards the better image.

The two images of a prompt, x0_i and x0_j, start from one noise and differ by the little noise of their steps. With
dR = (R_i - R_j) / 2, D = (x0_i - x0_j) / 2 and g = D / (||D||^2 + 1e-6), each step (x_t, v_old) of image i has

    l = -||v - (v_old - g)||^2,  l_old = -||g||^2,  rho = exp(l - l_old),
    L = -dR rho + |dR| / (2 c) (rho - 1)^2,  c = ``clip_range``

so that at v = v_old the gradient is 2 dR <g, dv>: v is pulled along -g dR, and x0 = x_t - t v towards the better image.
||.||^2 and <.,.> are means over the latent's elements. It needs groups of two images, a flow model, and advantages
that are not divided by a standard deviation (``advantage_std: unit``), so that A = dR.

Departures from the paper:
1. Its churn gamma is ``cps`` with noise level 2 / pi arccos(1 / (1 + gamma)), which draws the same step; the extra
   churn of the initial noise is left out, as the first step draws its own.
2. The last step, which has no noise, is not trained.
3. v - v_old is read off the means of the steps.
"""

from __future__ import annotations

from torch import Tensor

from diffalign.device import mean_float64
from diffalign.diffusion.parameterization import expand, widen
from diffalign.losses.flow_grpo import bounded_ratio, ratio_metrics
from diffalign.losses.policy import PolicyStep, trust_region
from diffalign.losses.registry import policy_objective

EPSILON = 1e-6


@trust_region("quadratic")
def quadratic_surrogate(
    log_ratio: Tensor, advantage: Tensor, bound: float | Tensor, divergence: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A r + |A| / (2 bound) (r - 1)^2: (B,), smooth, without gradient at r = 1 + bound sign(A); and metrics."""
    ratio = bounded_ratio(log_ratio)
    advantage = advantage.detach().to(ratio)
    loss = -advantage * ratio + advantage.abs() / (2 * bound) * (ratio - 1).square()
    outside = (ratio.detach() - 1) * advantage.sign() > bound
    return loss, ratio_metrics(ratio, outside)


@policy_objective(
    "fdfo", idea="towards the better image of a pair, quadratic", source="2603.12893", means=True, partners=True
)
def fdfo(step: PolicyStep, *, clip_range: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a step of one image of a pair: (B,), and metrics. ValueError without means or direction."""
    if step.old_mean is None or step.direction is None or step.output_scale is None:
        raise ValueError("fdfo compares means and two images: give PolicyStep old_mean, direction and output_scale")
    moved = (widen(step.mean) - step.old_mean.detach()) * expand(1 / step.output_scale, step.mean)
    size = mean_float64(step.direction.square().flatten(1))
    along = mean_float64((moved * step.direction).flatten(1)) / (size + EPSILON)
    return quadratic_surrogate(-mean_float64(moved.square().flatten(1)) - 2 * along, step.advantage, clip_range, None)
