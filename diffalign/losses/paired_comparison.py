"""Paired comparisons with ties: Bradley and Terry (1952), Rao and Kupper (1967), Davidson (1970).

Each is a likelihood of a margin m = s_first - s_second and a label y, the probability that the first is preferred. A
label between a tie and a choice counts in part as either: with w = |2 y - 1|,

    loss = -w log P(the preferred one wins) - (1 - w) log P(tie).

Under Bradley-Terry, which has no event "tie", loss = -y log P(first) - (1 - y) log P(second): the soft labels of
PickScore (arXiv 2305.01569).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.diffusion.parameterization import widen


def bradley_terry(margin: Tensor, label: Tensor) -> Tensor:
    """Return -y log sigma(m) - (1 - y) log sigma(-m): (B,), float32 or wider.

    Args:
        margin: (B,).
        label: (B,), in [0, 1].
    """
    margin = widen(margin)
    label = label.to(margin)
    return -label * F.logsigmoid(margin) - (1 - label) * F.logsigmoid(-margin)


def rao_kupper(margin: Tensor, tie: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of (first, tie, second), with the threshold log theta = softplus(tie):

        P(first) = sigma(m - log theta),  P(tie) = (theta^2 - 1) P(first) P(second).

    Args:
        margin: (B,).
        tie: 0-dim; the more, the more ties.
    """
    margin = widen(margin)
    threshold = F.softplus(tie.to(margin))
    first, second = F.logsigmoid(margin - threshold), F.logsigmoid(-margin - threshold)
    return first, torch.expm1(2 * threshold).log() + first + second, second


def davidson(margin: Tensor, tie: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of (first, tie, second), in the ratio e^(m/2) : nu : e^(-m/2) with log nu = tie.

    Args:
        margin: (B,).
        tie: 0-dim; the more, the more ties.
    """
    half = widen(margin) / 2
    terms = torch.stack([half, tie.to(half).expand_as(half), -half])
    first, neither, second = terms - terms.logsumexp(0)
    return first, neither, second


TIE_MODELS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "rao_kupper": rao_kupper,
    "davidson": davidson,
}


def comparison_loss(margin: Tensor, label: Tensor, model: str = "soft", tie: Tensor | None = None) -> Tensor:
    """Return the negative log-likelihood of labels: (B,), float32 or wider.

    Args:
        margin: (B,), score of the first minus that of the second.
        label: (B,), in [0, 1]; 0.5 is a tie.
        model: "soft", Bradley-Terry with soft labels, or a key of ``TIE_MODELS``.
        tie: 0-dim, the learned parameter of a model of ``TIE_MODELS``.
    """
    if model == "soft":
        return bradley_terry(margin, label)
    assert tie is not None
    first, neither, second = TIE_MODELS[model](margin, tie)
    label = label.to(first)
    chosen = (2 * label - 1).abs()
    return -chosen * torch.where(label > 0.5, first, second) - (1 - chosen) * neither


def preference(margin: Tensor) -> Tensor:
    """Return sigma(m), the probability that the first is preferred if there is no tie: (B,).

    Under Davidson this is exact; under Rao-Kupper it is for theta = 1.
    """
    return widen(margin).sigmoid()
