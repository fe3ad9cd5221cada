"""Configuration for reading preference data; a trainer's configuration may hold it as a section."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Literal

from diffalign.config import Checked, Given, option
from diffalign.data.rollouts import Pairing
from diffalign.data.validation import check_actions


@dataclass(frozen=True, kw_only=True)
class PreferenceDataConfig(Checked):
    """Options for reading preference data and for handling unusable samples."""

    given: InitVar[Given] = None
    format: str = option(
        "auto",
        "pick_a_pic, hpdv2, hpdv3, chosen_rejected, pairs or liked; auto: inferred from the columns",
        section="data",
    )
    split: str = option("train", "split of a folder or hub data set", section="data")
    subset: str | None = option(None, "configuration name of a hub data set", section="data")
    revision: str | None = option(None, "branch, tag or commit of a hub data set", section="data")
    image_root: Path | None = option(
        None, "base folder of relative image paths, or its address; default: the folder of the table", section="data"
    )
    allow_outside: bool = option(
        False,
        "read image files outside the folder of the data (or image_root), also through links",
        section="data",
    )
    ties: Literal["drop", "soft", "error"] = option(
        "drop", "what to do with a label of 0.5; soft keeps it", section="data"
    )
    labels: str | None = option(
        None, "AI labels to use instead of the data's own, by name or .parquet file", section="data"
    )
    on_fault: dict[str, str] = option(
        {}, "drop, keep or error, by kind of fault, e.g. --on_fault.different_size drop", section="data"
    )
    mask: str | None = option(
        None,
        "column of masks, one for all images of a row and of their size: white counts, black does not",
        section="data",
    )
    source: str | None = option(
        None, 'column of source images, for models that edit; default: "image" in "metadata"', section="data"
    )
    max_bad_share: float = option(
        0.01, "share of unusable samples above which the run stops before its first step", section="data", ge=0, le=1
    )
    scan: int | None = option(
        1000, "samples whose images are decoded before the first step; null: all", section="data", ge=0
    )
    min_side: int = option(16, "shorter side below which an image is too_small, in pixels", section="data", ge=1)
    rollouts: Pairing = option(Pairing(), "how scored images of a rollout buffer become pairs", section="data")

    def __post_init__(self, given: Given = None) -> None:  # noqa: RUF033 (of an InitVar)
        """Check every field. ValueError: an action that cannot be taken, or a value out of range."""
        super().__post_init__(given)
        check_actions(self.on_fault)
