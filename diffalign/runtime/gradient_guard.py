"""Decides whether an optimizer step is taken: not on numbers that are not finite, not on a spike, not on nothing."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

WINDOW = 50  # gradient norms that say what is usual
ENOUGH = 20  # of them before a spike can be told
STREAK = 3  # steps in a row: not finite, and the run ends; spikes, and they are what is usual now
FLAT_ALARM = 5
DRIFT = 10.0  # times the first full window
REASONS = ("loss not finite", "gradient not finite", "spike", "no gradient")


@dataclass
class GradientGuard:
    """What is usual in this run, and what was not.

    spike_factor: a gradient norm that many times the median of the last ``WINDOW`` is a spike; 0: none is. norms: of
    steps that were taken. baseline: the median of the first full window. skipped: how many steps were not taken, noted
    of them those at fault; bad, spikes, flat: how many of the last ones in a row.
    """

    spike_factor: float = 100.0
    norms: list[float] = field(default_factory=list)
    baseline: float | None = None
    skipped: int = 0
    noted: int = 0
    bad: int = 0
    spikes: int = 0
    flat: int = 0
    drifted: bool = False

    @property
    def limit(self) -> float:
        """The largest norm that is no spike."""
        known = len(self.norms) >= ENOUGH and self.spike_factor
        return self.spike_factor * statistics.median(self.norms) if known else float("inf")

    def flags(self, loss: Tensor, norm: Tensor) -> Tensor:
        """What this process sees, a number for each of ``REASONS``, without waiting for the device; (4,)."""
        seen = [~loss.isfinite(), ~norm.isfinite(), norm.isfinite() & (norm > self.limit), norm == 0]
        return torch.stack(seen).float()

    @staticmethod
    def reason(shares: Sequence[float]) -> str | None:
        """Why a step must not be taken, from the share of processes that raised each flag; None: take it.

        One process is enough, but for the lack of a gradient, which all have to see.
        """
        *faults, flat = shares
        found = next((name for name, share in zip(REASONS, faults, strict=False) if share > 0), None)
        return found or (REASONS[-1] if flat == 1 else None)

    def note(self, reason: str | None, norm: float) -> None:
        """Remembers what became of a step. ``stuck`` says whether the run has to end."""
        self.skipped += reason is not None
        self.noted += reason in REASONS[:3]
        self.bad = self.bad + 1 if reason in REASONS[:2] else 0
        self.spikes = self.spikes + 1 if reason == "spike" else 0
        self.flat = self.flat + 1 if reason == "no gradient" else 0
        if reason is None:
            self.norms = [*self.norms, norm][-WINDOW:]
            self._watch_drift()
        if self.spikes == STREAK:
            warnings.warn(f"{STREAK} spikes in a row: gradients of norm {norm:.3g} count as usual now", stacklevel=2)
            self.norms, self.spikes = [], 0
        if self.flat == FLAT_ALARM:
            warnings.warn(
                f"{FLAT_ALARM} updates in a row had no gradient: rewards are equal within groups (see zero_std_groups),"
                " or losses are saturated; try another reward, more noise, or larger groups",
                stacklevel=2,
            )

    def _watch_drift(self) -> None:
        if len(self.norms) < WINDOW:
            return
        now = statistics.median(self.norms)
        self.baseline = now if self.baseline is None else self.baseline
        if now > DRIFT * self.baseline and not self.drifted:
            self.drifted = True
            warnings.warn(
                f"gradients have drifted from a norm of {self.baseline:.3g} to {now:.3g}: lower learning_rate, or "
                "raise beta or kl_beta, if rewards fall",
                stacklevel=3,
            )

    def state(self) -> dict[str, Any]:
        """For JSON; the setting is the configuration's."""
        return {name: value for name, value in asdict(self).items() if name != "spike_factor"}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state`` gave."""
        for name, value in state.items():
            setattr(self, name, value)


def first_bad(tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor that is not finite."""
    return next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)
