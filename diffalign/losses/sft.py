"""Best-of-n fine-tuning (RAFT, arXiv 2304.06767): train on liked images only."""

from __future__ import annotations

from torch import Tensor

from diffalign.losses.errors import Denoised
from diffalign.losses.registry import preference_loss


@preference_loss(
    "sft",
    idea="ordinary training on the best images",
    source="2304.06767",
    paired=False,
    reference=False,
    liked_only=True,
)
def sft(denoised: Denoised, liked: Tensor) -> Tensor:
    """L for liked samples, 0 for the others: (B,). liked: (B,), bool. There is no reference and no beta.

    Departures from the paper:
    1. The mean runs over the batch, including disliked samples; pass liked ones alone for the paper's.
    """
    return denoised.error * liked.to(denoised.error)
