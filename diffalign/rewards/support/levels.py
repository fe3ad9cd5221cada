"""Scores of models that rate in words: the expected value of a few tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.rewards.support.preprocess import at_least_float32


def expected_level(logits: Tensor, tokens: Sequence[int], values: Sequence[float]) -> Tensor:
    """Average values under the softmax of some tokens' logits, (B, vocabulary): (B,), float32 or wider."""
    found = at_least_float32(logits[:, list(tokens)]).softmax(-1)
    return found @ torch.tensor(values, dtype=found.dtype, device=found.device)
