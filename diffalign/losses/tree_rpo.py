"""Dynamic-TreeRPO with LayerTuning-RL (arXiv 2509.23352): a clip range that grows with the reward, and the best path.

    e = clip_range (1 + growth |A|),    L = surrogate + weight ||v - v_best||^2 on the best path of each tree

with A the advantage of a transition, and v_best the velocity whose step ends, without noise, in the path's next state.

Departures from the paper: no code and no constants are published, so that growth and weight are options, 0 by default,
and no reproduction is claimed. Its clip bounds (eq. 11) depend on rewards; here on their advantages, in the same way on
both sides. Its tree and the noise over it are ``plan.preset: tree_rpo``.
"""

from __future__ import annotations

from torch import Tensor

from diffalign.device import mean_float64, to_float64
from diffalign.diffusion.parameterization import widen


def reward_clip_range(advantage: Tensor, clip_range: float, growth: float) -> Tensor:
    """clip_range (1 + growth |A|): (B,), float64 where the device has it. growth: 0 or more."""
    return clip_range * (1 + growth * to_float64(advantage.detach()).abs())


def best_path_error(mean: Tensor, x_next: Tensor, output_scale: Tensor) -> Tensor:
    """||v - v_best||^2, the mean over a sample's dimensions: (B,), with the gradient of the mean.

    Args:
        mean: (B, C, *spatial), of the step under the policy.
        x_next: (B, C, *spatial), the next state of the best path.
        output_scale: (), the derivative of the mean by the velocity.
    """
    error = mean_float64((widen(mean) - x_next.detach()).square().flatten(1))
    return error / output_scale.square().to(error)
