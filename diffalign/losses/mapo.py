"""MaPO (arXiv 2406.06424): no reference; learn winners, and separate them from losers by a bounded score."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss

# The released code's settings, whose weight is not the paper's 1 / beta; 1000 is its number of timesteps.
RELEASED = {"beta": 1000.0, "weight": 0.1, "scale": 0.5}
SERIES_BELOW = 0.03


@preference_loss(
    "mapo", idea="bounded scores beside the winner's loss", source="2406.06424", beta=1000.0, reference=False
)
def mapo(pair: DenoisedPair, *, beta: float | Tensor, weight: float | None = None, scale: float = 1.0) -> Tensor:
    """L_w - weight log sigma(beta (phi(scale L_w) - phi(scale L_l))), phi = ``bounded_score``: (B,).

    beta: the temperature. weight: of the preference term; None is the paper's 1 / beta. Errors of the reduction "mean"
    are meant: those of "sum" have phi = 0.

    Departures from the paper:
    1. ``scale``, 1 in the paper, reproduces the released code: ``mapo(pair, **RELEASED)``.
    """
    scores = [bounded_score(scale * side.error) for side in (pair.winner, pair.loser)]
    preference = -F.logsigmoid(beta * (scores[0] - scores[1]))
    return pair.winner.error + (1 / beta if weight is None else weight) * preference


def bounded_score(error: Tensor) -> Tensor:
    """phi(x) = x / (e^x - 1): 1 for no error, falling to 0; eq. 11 without its factor beta.

    A series where the quotient's derivative would cancel, and e^-x where e^x would overflow.
    """
    small, large = error.clamp(max=SERIES_BELOW), error.clamp(min=SERIES_BELOW)
    series = 1 - small / 2 + small.square() / 12 - small.pow(4) / 720
    return torch.where(error < SERIES_BELOW, series, large * (-large).exp() / -torch.expm1(-large))
