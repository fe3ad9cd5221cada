"""Sections that configurations of several commands share: the adapter, and rewards by name.

This module imports nothing heavy, so that ``--help`` and configuration errors need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffalign.config import Checked, option


@dataclass(frozen=True)
class LoraConfig(Checked):
    """Low-rank adapters on the denoiser (arXiv 2106.09685): W + alpha / rank * B A, with B starting at 0."""

    bare_field: ClassVar[str] = "rank"

    rank: int = option(32, "rank of the adapter; 0 trains all weights of the denoiser instead", ge=0, le=65_536)
    alpha: float | None = option(
        None,
        "numerator of the adapter's scale alpha / rank; default: the rank",
        gt=0,
        hint="leave it out for alpha = rank",
    )
    targets: tuple[str, ...] | None = option(
        None, "names (or endings) of the adapted layers; default: the family's attention layers"
    )


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Checked):
    """One reward of a run: ``pickscore: 1.0``, or

    look: {reward: pickscore, weight: 0.5, options: {path: my/weights, precision: bf16}}
    """

    weight: float = option(1.0, "factor of the reward's score, or of its advantage", section="rewards", infinite=False)
    reward: str = option(
        "",
        "registered name, module:function or file.py:function; default: the name of the entry",
        section="rewards",
    )
    options: dict[str, Any] = option(
        {},
        "arguments of the reward, such as path, revision, precision, offload or quantize",
        section="rewards",
        infinite=True,
    )


PASSED = "passed from Python"  # recorded for a reward object, which no file can name
RewardTable = Mapping[str, float | RewardConfig]
