"""Skip optimizer steps whose loss or gradient is non-finite, whose gradient norm spikes, or whose gradient is zero."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

WINDOW = 50  # recent gradient norms whose median is the reference
ENOUGH = 20  # norms needed before a spike can be detected
STREAK = 3  # consecutive non-finite steps that end the run; consecutive spikes that reset the reference
FLAT_ALARM = 5
DRIFT = 10.0  # times the first full window
REASONS = ("loss not finite", "gradient not finite", "spike", "no gradient")


@dataclass
class GradientGuard:
    """Running statistics of gradient norms, and counts of skipped steps.

    Attributes:
        spike_factor: A gradient norm of so many times the median of the last ``WINDOW`` is a spike; 0 turns this off.
        norms: Gradient norms of the last steps taken, at most ``WINDOW``.
        baseline: Median of the first full window.
        skipped: Steps not taken; ``noted`` counts those among them that are written to skipped.jsonl.
        bad, spikes, flat: Length of the current streak of non-finite steps, of spikes, and of zero gradients.
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
        """Largest gradient norm that is not a spike."""
        known = len(self.norms) >= ENOUGH and self.spike_factor
        return self.spike_factor * statistics.median(self.norms) if known else float("inf")

    def flags(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return 1.0 for each of ``REASONS`` that holds on this process, without a host synchronisation: (4,)."""
        seen = [~loss.isfinite(), ~norm.isfinite(), norm.isfinite() & (norm > self.limit), norm == 0]
        return torch.stack(seen).float()

    @staticmethod
    def reason(shares: Sequence[float]) -> str | None:
        """Return why a step must be skipped, or None to take it.

        One process is enough to skip a step, except for a zero gradient, which all processes must have.

        Args:
            shares: Share of the processes that raised each flag, in the order of ``REASONS``.
        """
        *faults, flat = shares
        found = next((name for name, share in zip(REASONS, faults, strict=False) if share > 0), None)
        return found or (REASONS[-1] if flat == 1 else None)

    def note(self, reason: str | None, norm: float) -> None:
        """Update the statistics with a step; warn about spikes, zero gradients and drift."""
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
        """Return the statistics as JSON values, without the setting."""
        return {name: value for name, value in asdict(self).items() if name != "spike_factor"}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        for name, value in state.items():
            setattr(self, name, value)


def first_bad(tensors: dict[str, Tensor]) -> str | None:
    """Return the name of a non-finite tensor, or None."""
    return next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)
