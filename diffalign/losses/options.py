"""Options of preference losses: a bound of the margin, additional terms, automatic beta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from diffalign.losses.errors import DenoisedPair
from diffalign.losses.running import RunningMean


def clamp_margin(pair: DenoisedPair, limit: float) -> DenoisedPair:
    """Bound the margin of a pair at ``limit`` > 0, in the units of the errors. ValueError for another limit.

    For losses that are functions of the margin (``PreferenceLoss.margin``): a pair that has reached the limit has no
    gradient left. Margins to self-generated losers can grow without bound, which ruins the sampler.
    """
    if not limit > 0:
        raise ValueError(f"the largest margin must be positive, got {limit}: a policy starts at margin 0")
    return replace(pair, max_margin=limit)


def winner_term(pair: DenoisedPair) -> Tensor:
    """L_w: (B,), ordinary fine-tuning on the preferred images."""
    return pair.winner.error


def anchor_term(pair: DenoisedPair) -> Tensor:
    """Half the sum of both sides' squared distances from the reference's output: (B,). Needs a reference."""
    return (pair.winner.drift + pair.loser.drift) / 2


def margin_size(pair: DenoisedPair) -> Tensor:
    """Compute the batch mean of |margin|, a constant: (). ``AutoBeta`` takes its mean over processes."""
    return replace(pair, max_margin=math.inf).margin.detach().abs().mean()


class AutoBeta:
    """beta = -2 logit(target) / m, within [low, high], with m a running mean of |margin|.

    With it a pair whose margin is +m has the gradient factor sigma(-beta m / 2) = target, whatever the units of the
    errors. target: in (0, 0.5). low, high: positive, in the units of the errors. decay: of m. ValueError outside.

    Update it once per optimizer step, so that the micro-batches of a step share one beta. Margins of 0, those of an
    untrained policy, give ``high``.
    """

    def __init__(self, *, low: float, high: float, target: float = 0.2, decay: float = 0.99) -> None:
        if not 0 < target < 0.5:
            raise ValueError(f"target must be in (0, 0.5), got {target}: it is the gradient factor of a usual pair")
        if not 0 < low <= high:
            raise ValueError(f"got low {low}, high {high}: give two positive bounds, the lower one first")
        self.numerator = 2 * math.log((1 - target) / target)
        self.low, self.high = low, high
        self.size = RunningMean(decay)

    def update(self, size: Tensor) -> Tensor:
        """Update with ``margin_size``, averaged over processes; return beta, ()."""
        self.size.update(size)
        return self.beta

    @property
    def beta(self) -> Tensor:
        """The current beta, (), float32; ``high`` before the first update."""
        return (self.numerator / self.size.mean).clamp(self.low, self.high)

    def state_dict(self) -> dict[str, float]:
        """Return plain numbers."""
        return self.size.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what ``state_dict`` returned, to the last bit."""
        self.size.load_state_dict(state)
