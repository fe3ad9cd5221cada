"""Image files of one model with their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffalign.files import read_bytes
from diffalign.media import decode


@dataclass(frozen=True)
class ScoredImages:
    """N images of one model, sorted by prompt and sample.

    Attributes:
        prompt: (N,) int64, index in the prompt list.
        scores: Reward -> (N,) float32, NaN where the reward failed.
        files: N image files.
    """

    prompt: Tensor
    scores: dict[str, Tensor]
    files: list[Path]

    def images(self, rows: Sequence[int] | None = None) -> Tensor:
        """Load all images, or those of ``rows``, as (N, 3, H, W) float32 in [0, 1]."""
        files = self.files if rows is None else [self.files[row] for row in rows]
        pixels = [np.array(decode(read_bytes(file))) for file in files]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
