"""Schedules of lagged copies of the weights: copy <- d copy + (1 - d) policy, with d a function of the step."""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass, replace
from typing import ClassVar, Literal

from diffalign.config import Checked, Given, option

NAMES = "current, type0, type1, type2, type3, linear, crd_old, dgpo, dgpo_sampling or constant"


@dataclass(frozen=True)
class Lag:
    """d(s) = 0 before step ``start``, then min(offset + slope (s - start), maximum).

    Attributes:
        start: First optimizer step with d > 0.
        offset: d at that step.
        slope: Growth of d per optimizer step.
        maximum: Largest d, below 1.
        every: Whether the copy moves after each "iteration" or each optimizer "step".
    """

    start: int = 0
    offset: float = 0.0
    slope: float = 0.0
    maximum: float = 0.0
    every: Literal["iteration", "step"] = "iteration"

    def decay(self, step: int) -> float:
        """Return d after ``step`` optimizer steps."""
        if step < self.start:
            return 0.0
        return min(self.offset + self.slope * (step - self.start), self.maximum)

    def follows(self, updates: int) -> bool:
        """Return whether the copy equals the policy in every pass, with so many updates per iteration."""
        never = self.maximum == 0 or (self.offset == 0 and self.slope == 0)
        return never and (self.every == "step" or updates == 1)


# NFT's types 0 to 2, and type 3 of the code that follows it; the others are named after the method.
LAGS: dict[str, Lag] = {
    "current": Lag(),  # the policy itself
    "type0": Lag(),
    "type1": Lag(slope=0.001, maximum=0.5),
    "type2": Lag(start=75, slope=0.0075, maximum=0.999),
    "type3": Lag(start=10, slope=0.01, maximum=0.5),
    "linear": Lag(slope=0.001, maximum=0.3),  # AWM's anchor
    "crd_old": Lag(offset=0.25, slope=0.005, maximum=0.999),
    "dgpo": Lag(slope=0.001, maximum=0.3, every="step"),
    "dgpo_sampling": Lag(start=200, offset=0.2, slope=0.001, maximum=0.3, every="step"),
    "constant": Lag(offset=0.9, maximum=0.999),
}


@dataclass(frozen=True)
class LagConfig(Checked):
    """A schedule of ``LAGS`` and overrides; None keeps the value of the schedule, or of the trainer's preset."""

    bare_field: ClassVar[str] = "kind"

    kind: str | None = option(None, f"{NAMES}; default: the preset's")
    start: int | None = option(None, "optimizer steps before the copy lags", ge=0)
    offset: float | None = option(None, "decay at that step; of constant: the decay", ge=0, lt=1)
    slope: float | None = option(None, "growth of the decay per optimizer step", ge=0, lt=1)
    maximum: float | None = option(None, "largest decay", ge=0, lt=1)
    every: Literal["iteration", "step"] | None = option(None, "when the copy moves")
    _: KW_ONLY
    given: InitVar[Given] = None

    def resolve(self, default: str) -> Lag:
        """Return the schedule; ``default`` is the preset's kind. ValueError: an unknown kind."""
        kind = default if self.kind is None else self.kind
        if kind not in LAGS:
            raise ValueError(f"unknown lag {kind!r}; use {NAMES}")
        names = ("start", "offset", "slope", "maximum", "every")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(LAGS[kind], **given)
