"""Lagged copies of the weights, by role: what samples, what the objective compares with, what anchors the policy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from diffalign.models.weights import POLICY, WeightSets
from diffalign.runtime.ema import EMA
from diffalign.runtime.state import indexed, restore
from diffalign.trainers.forward_rl.lag import Lag

ROLES = {"sample": "sample_lag", "old": "old_lag", "ema": "ema_lag"}


def weight_sets(lags: Mapping[str, Lag], updates: int) -> dict[str, str]:
    """Return the weight set of each role; roles with the same lag share one.

    Args:
        lags: Role -> lag, of the roles that a run has.
        updates: Optimizer steps per iteration.
    """
    owner: dict[Lag, str] = {}
    return {
        role: POLICY if lag.follows(updates) else owner.setdefault(lag, f"lagged_{role}") for role, lag in lags.items()
    }


class LaggedCopies:
    """The copies of a run; they are weight sets of the model.

    Args:
        weights: Weight sets of the model, to which the copies are added.
        lags: Role -> lag, of the roles that the run has.
        updates: Optimizer steps per iteration.

    Attributes:
        sets: Role -> weight set.
    """

    def __init__(self, weights: WeightSets, lags: Mapping[str, Lag], updates: int) -> None:
        self.sets = weight_sets(lags, updates)
        self.lags = {name: lags[role] for role, name in reversed(self.sets.items()) if name != POLICY}
        self.copies = {name: EMA(weights.trainable, 0.0, warmup=False) for name in self.lags}
        for name, copy in self.copies.items():
            weights.add(name, copy.shadow)

    def update(self, step: int, iteration_ends: bool) -> dict[str, float]:
        """Move the copies after optimizer step ``step`` (from 1); return the decay of those that moved."""
        moved = {}
        for name, lag in self.lags.items():
            if lag.every == "step" or iteration_ends:
                moved[name] = lag.decay(step)
                self.copies[name].update(moved[name])
        return moved

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live tensors of all copies."""
        return {
            f"{name}.{key}": tensor
            for name, copy in self.copies.items()
            for key, tensor in indexed(copy.shadow).items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        for name, copy in self.copies.items():
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            restore(copy.shadow, own)
