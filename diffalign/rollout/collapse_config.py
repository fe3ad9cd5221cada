"""Configuration of the collapse alarm."""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass
from typing import ClassVar

from diffalign.config import Checked, Given, option


@dataclass(frozen=True)
class CollapseConfig(Checked):
    """When online training counts as collapsing: see ``evaluation.collapse``."""

    bare_field: ClassVar[str] = "window"

    window: int = option(
        10, "iterations whose mean reward is compared with the best such mean before; 0: no alarm", resume="free", ge=0
    )
    drop: float = option(
        0.25, "share of what a reward has gained that it must lose for an alarm", resume="free", gt=0, infinite=False
    )
    significance: float = option(
        5.0, "standard errors that the mean reward must fall by", resume="free", ge=0, infinite=False
    )
    diversity: float = option(
        0.8, "alarm below this share of the base's diversity of evaluations; 0: none", resume="free", ge=0, le=1
    )
    _: KW_ONLY
    given: InitVar[Given] = None
