"""ReFL (arXiv 2304.05977) and its relatives: losses of a reward that carries a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.device import to_float64
from diffalign.diffusion.parameterization import widen
from diffalign.losses.registry import reward_loss

# Rewards that differ by so many units in their last place are equal.
TIED = 4


@reward_loss("hinge", idea="linear up to a threshold: ReFL", source="2304.05977")
def reward_hinge(reward: Tensor, *, threshold: float) -> Tensor:
    """relu(c - r): ReFL. No gradient beyond the threshold, where reward hacking is likely."""
    return F.relu(threshold - widen(reward))


@reward_loss("negative", idea="the reward itself: DRaFT", source="2309.17400")
def negative_reward(reward: Tensor) -> Tensor:
    """-r: DRaFT (arXiv 2309.17400)."""
    return -widen(reward)


@reward_loss("distance", idea="distance from a value: AlignProp", source="2310.03739")
def reward_distance(reward: Tensor, *, threshold: float) -> Tensor:
    """|r - c|: AlignProp (arXiv 2310.03739)."""
    return (widen(reward) - threshold).abs()


@reward_loss("group", idea="the reward, standardised within its group", source="this package")
def group_advantage(reward: Tensor, *, groups: Tensor) -> Tensor:
    """Return -(r - mean) / std, both of the reward's group and constants, so that easy prompts weigh no more.

    groups: (B,) integers; a group whose rewards are equal up to their rounding is divided by 1. A reward that is not
    finite does not count in its group, and its loss is not finite. std is the population deviation, in two passes in
    float64: E[r^2] - E[r]^2 in float32 has no digit left where rewards of 22 differ by .02.
    """
    reward = widen(reward)
    scored = reward.detach().isfinite()
    same = to_float64((groups[:, None] == groups[None]) & scored)
    share = same / same.sum(1, keepdim=True).clamp(min=1)
    fixed = to_float64(torch.where(scored, reward.detach(), 0))

    mean = share @ fixed
    std = (share * (fixed - mean[:, None]).square()).sum(1).sqrt()
    rounding = TIED * torch.finfo(reward.dtype).eps * (same * fixed.abs()).amax(1)
    return -(reward - mean.to(reward)) / torch.where(std > rounding, std, 1).to(reward)


def squared_distance(output: Tensor, goal: Tensor) -> Tensor:
    """mean_d (output - goal)^2, with ``goal`` a constant: (B,), float32 or wider; a regulariser.

    goal: (B, ...), the target of training on real images, or the reference's output for the same input.
    """
    return (widen(output) - widen(goal.detach())).square().flatten(1).mean(1)


# Of the hinge, as published: ImageReward's by ReFL, HPSv2.1's by LeapAlign, and by FlowBP for all that it compares. In
# the units of the registered rewards.
PUBLISHED_THRESHOLDS: dict[str, float] = {"image_reward": 2.0, "hpsv2.1": 0.55}
