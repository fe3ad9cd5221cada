"""Metrics of preference training, which show whether margins grow by better winners or by worse losers."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.device import to_float64
from diffalign.diffusion.parameterization import widen
from diffalign.losses.errors import Denoised, DenoisedPair


@torch.no_grad()
def preference_metrics(
    pair: DenoisedPair, *, beta: float | Tensor, position: Tensor, bins: int = 5
) -> dict[str, Tensor]:
    """Compute metrics of a batch of pairs, each detached and 0-dim, without device synchronisation.

    accuracy: the share of margins above 0, where 0 counts half. margin: their mean; negative_margins: the share below
    0. winner_error, loser_error: L_w, L_l. winner_gain, loser_gain: R - L of each side; below 0 that side has become
    worse than under the reference. Both below 0 while accuracy rises is the usual failure of preference training.
    logit_size, logit_std: mean and population deviation of |z| and z = beta margin / 2. Means of several batches are
    exact for all but logit_std.
    margin_bin/k, share_bin/k: the part of the margin that comes from bin k of ``bins``, and the share of pairs in it.
    The parts add up to the margin, and margin_bin/k / share_bin/k is the bin's own mean; bins without pairs have 0.

    position: () or (B,), [0, 1], where the pairs are noised to, e.g. ``level.sigma``, or ``level.time / 1000``.
    Without a reference the margin is L_l - L_w, and there are no gains. A bound of the margin does not count here.
    ValueError: no bins.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    sides = {"winner": pair.winner, "loser": pair.loser}
    compared = all(side.reference is not None for side in sides.values())
    margin = replace(pair, max_margin=math.inf).margin if compared else pair.gap
    logit = 0.5 * beta * margin
    gains = {f"{name}_gain": side.gain.mean() for name, side in sides.items() if compared}
    return {
        "accuracy": share(margin > 0) + share(margin == 0) / 2,
        "margin": margin.mean(),
        "negative_margins": share(margin < 0),
        **{f"{name}_error": side.error.mean() for name, side in sides.items()},
        **gains,
        "logit_size": logit.abs().mean(),
        "logit_std": to_float64(logit).std(correction=0).to(logit),
        **_by_bin(margin, position, bins),
    }


@torch.no_grad()
def single_metrics(image: Denoised, liked: Tensor) -> dict[str, Tensor]:
    """Compute metrics of single images, each detached and 0-dim.

    They are errors and gains of liked and disliked images, 0 for a kind without images, and with a reference the
    accuracy: the share of images whose gain has the right sign, where 0 counts half.

    liked: (B,), bool.
    """
    compared = image.reference is not None
    values = {"error": image.error} | ({"gain": image.gain} if compared else {})
    sides = {"liked": liked, "disliked": ~liked}
    figures = {
        f"{side}_{name}": (chosen * value).sum() / chosen.sum().clamp(min=1)
        for side, chosen in sides.items()
        for name, value in values.items()
    }
    if compared:
        right = torch.where(liked, values["gain"] > 0, values["gain"] < 0)
        figures["accuracy"] = share(right) + share(values["gain"] == 0) / 2
    return figures


def share(chosen: Tensor) -> Tensor:
    """Compute the share of True: (), float32."""
    return chosen.float().mean()


def _by_bin(margin: Tensor, position: Tensor, bins: int) -> dict[str, Tensor]:
    # In the precision of the level: rounded to the latents' it could cross the edge of a bin.
    index = (widen(position) * bins).long().clamp(0, bins - 1).to(margin.device, non_blocking=True).expand(len(margin))
    inside = index == torch.arange(bins, device=margin.device)[:, None]
    parts, shares = (inside * margin).mean(1), inside.to(margin).mean(1)
    return {f"margin_bin/{k}": parts[k] for k in range(bins)} | {f"share_bin/{k}": shares[k] for k in range(bins)}
