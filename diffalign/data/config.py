"""Configuration for reading preference data; a trainer's configuration may hold it as a section."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from diffalign.data.rollouts import Pairing
from diffalign.data.validation import check_actions


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class PreferenceDataConfig:
    """Options for reading preference data and for handling unusable samples."""

    numbers_checked: ClassVar[bool] = True

    format: str = field(
        default="auto",
        metadata=_help("pick_a_pic, hpdv2, hpdv3, chosen_rejected, pairs or liked; auto: detected from the columns"),
    )
    split: str = field(default="train", metadata=_help("split of a folder or hub data set"))
    subset: str | None = field(default=None, metadata=_help("configuration of a hub data set"))
    revision: str | None = field(default=None, metadata=_help("branch, tag or commit of a hub data set"))
    image_root: Path | None = field(
        default=None, metadata=_help("where relative image paths start; default: the folder of the table")
    )
    allow_outside: bool = field(
        default=False,
        metadata=_help("read image files that lie outside the folder of the data (or image_root), also through links"),
    )
    ties: Literal["drop", "soft", "error"] = field(
        default="drop", metadata=_help("what becomes of a label of 0.5: soft keeps it")
    )
    labels: str | None = field(
        default=None, metadata=_help("AI labels beside the data, by name or .parquet file, instead of its own")
    )
    on_fault: dict[str, str] = field(
        default_factory=dict,
        metadata=_help("drop, keep or error, by kind of error, e.g. --on_fault.different_size drop"),
    )
    mask: str | None = field(
        default=None,
        metadata=_help("column of masks, one for all images of a row and of their size: white counts, black does not"),
    )
    max_bad_share: float = field(
        default=0.01, metadata=_help("a run with a larger share of unusable samples stops before its first step")
    )
    scan: int | None = field(
        default=1000, metadata=_help("samples whose images are decoded before the first step; null: all")
    )
    min_side: int = field(default=16, metadata=_help("an image with a shorter side is too_small"))
    rollouts: Pairing = field(default_factory=Pairing, metadata=_help("how images of a rollout buffer become pairs"))

    def __post_init__(self) -> None:
        """Check actions and ranges. Raises ValueError."""
        check_actions(self.on_fault)
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is a share in [0, 1], got {self.max_bad_share}")
        if self.min_side < 1 or (self.scan is not None and self.scan < 0):
            raise ValueError(f"min_side {self.min_side} must be at least 1, and scan {self.scan} at least 0")
