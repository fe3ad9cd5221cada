"""Sections that configurations of several commands share: the adapter, and rewards as they are named.

They import nothing heavy, so that ``--help`` and errors of configurations need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.config import option


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the denoiser (arXiv 2106.09685): W + alpha / rank * B A, with B starting at 0."""

    bare_field: ClassVar[str] = "rank"

    rank: int = option(32, "rank of the update; 0 trains all weights of the denoiser instead", le=65_536)
    alpha: float | None = option(None, "scale of the update times rank, multiplied into B on export; default: the rank")
    targets: tuple[str, ...] | None = option(None, "names (or endings) of the layers; default: the family's attention")

    def __post_init__(self) -> None:
        """ValueError for a negative rank or an alpha without a sign."""
        if self.rank < 0:
            raise ValueError(f"lora.rank must be 0 (full fine-tuning) or more, got {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha must be positive, got {self.alpha}: leave it out for alpha = rank")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One reward of a run: ``pickscore: 1.0``, or

    look: {reward: pickscore, weight: 0.5, options: {path: my/weights, precision: bf16}}
    """

    numbers_checked: ClassVar[bool] = True

    weight: float = option(1.0, "what its score, or its advantage, is multiplied by")
    reward: str = option("", "registered name, module:function or file.py:function; default: the name of the entry")
    options: dict[str, Any] = option(
        {}, "what the reward takes: path, revision, precision, offload, quantize ...", infinite=True
    )


PASSED = "passed from Python"  # stands in a configuration for a reward that no file can name
RewardTable = Mapping[str, float | RewardConfig]
