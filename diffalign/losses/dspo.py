"""DSPO (ICLR 2025, openreview xyfb9HHvMe): score matching to the distribution of preferred images."""

from __future__ import annotations

from torch import Tensor

from diffalign.diffusion.parameterization import expand
from diffalign.losses.diffusion_dpo import dpo_logit
from diffalign.losses.errors import DenoisedPair
from diffalign.losses.registry import preference_loss


@preference_loss("dspo", idea="score matching to preferred images", source="openreview xyfb9HHvMe", beta=0.001)
def dspo(pair: DenoisedPair, *, beta: float | Tensor, weight: float = 1.0) -> Tensor:
    """||(output - target) - weight beta sigma(-z) (output - reference)||^2 of the winner, z = ``dpo_logit``: (B,).

    The loser enters through z alone. beta: of z, and of the pull beyond the target; published 0.001, with which the
    loss is nearly that of learning the winner. weight: the paper's lambda. At weight beta > 2 the policy is pushed
    away from the target at first.

    Departures from the paper:
    1. The released code for SDXL has another loss, sigma(-z)^2, at times times the squared distance from the
       reference, by the mean of that distance over the batch. It is not offered.
    """
    winner = pair.winner
    strength = weight * beta * (-dpo_logit(pair, beta)).sigmoid()
    return winner.reduce((winner.residual - expand(strength, winner.residual) * winner.shift).square())
