"""Input of policy objectives: a stored transition of a sampler under the current weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffalign.structures import Level


@dataclass(frozen=True)
class PolicyStep:
    """One trained step of B samples, replayed under the current weights.

    log_prob: (B,), nats per dimension, with the policy's gradient. old_log_prob: (B,), under the sampling weights.
    advantage: (B,). mean: (B, C, *spatial), with the gradient. std: () or (B,), positive, the true one of the step.
    level, next_level: where the step begins and ends. old_mean: (B, C, *spatial), under the sampling weights; None
        for objectives registered without ``means``.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    mean: Tensor
    std: Tensor
    level: Level
    next_level: Level
    old_mean: Tensor | None = None
