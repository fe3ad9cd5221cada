"""Diffusion-SDPO (arXiv 2511.03317): scale the loser's gradient so that the winner's error still falls."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffalign.diffusion.parameterization import expand, widen
from diffalign.losses.errors import DenoisedPair


def loser_scale(pair: DenoisedPair, mu: float) -> Tensor:
    """lambda = min(1, (1 - mu) |g_w|^2 / (g_w . g_l)) where g_w . g_l > 0, else 1: (B,), a constant.

    g_w and g_l are the derivatives of the two errors by the outputs. A step along g_w - lambda g_l, taken for a step of
    a common output, then lowers the winner's error by mu |g_w|^2 at least, to first order.

    Departures from the paper:
    1. lambda belongs to a pair; the released code has one for the batch, so that one pair can slow all others.
    """
    winner, loser = pair.winner.error_gradient, pair.loser.error_gradient
    aligned = (winner * loser).flatten(1).sum(1)
    bound = (1 - mu) * winner.square().flatten(1).sum(1) / aligned
    return torch.where(aligned > 0, bound, 1).clamp(max=1)


def preserve_winner(pair: DenoisedPair, *, mu: float) -> DenoisedPair:
    """Scale the gradient of a pair's loser by ``loser_scale``, for any pair loss; values do not change.

    mu: in [0, 1], how much of the winner's descent is kept; published 0.9 for Diffusion-DPO and DMPO on SD 1.5, 0.6 on
    SDXL, 0.2 for DSPO. ValueError outside.
    """
    if not 0 <= mu <= 1:
        raise ValueError(f"mu must be in [0, 1], got {mu}: it is the share of the winner's descent to keep")
    output = widen(pair.loser.output)
    value = output.detach()
    # The difference is exactly 0, so that only the gradient changes.
    scaled = value + expand(loser_scale(pair, mu), value) * (output - value)
    return replace(pair, loser=replace(pair.loser, output=scaled))
