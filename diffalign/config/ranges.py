"""Ranges of numbers in configurations: every number is finite and fits 64 bits, unless its field allows more."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

INT64 = 1 << 63
FLOAT32 = 3.4e38  # what tensors can hold
RANGE = "range"  # the key of a field's metadata


@dataclass(frozen=True)
class Range:
    """Bounds of a number.

    Args:
        infinite: Whether ``.inf`` is legal, where it means "no limit"; NaN never is.
        hint: The reason for the bounds, or what to write instead; ends the message.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    infinite: bool = False
    hint: str = ""

    def problem(self, value: float) -> str | None:
        """Say what is wrong with a number, or return None."""
        if isinstance(value, float) and math.isnan(value):
            return f"must be a number, got nan: give {self}"
        if isinstance(value, float) and math.isinf(value) and not self.infinite:
            return f"must be finite, got {value}: give {self}"
        if isinstance(value, float) and FLOAT32 < abs(value) < math.inf:
            return f"must be at most {FLOAT32:g} in size, which float32 can hold, got {value}"
        if isinstance(value, int) and not -INT64 <= value < INT64:
            return f"must fit 64 bits (-2**63 to 2**63 - 1), got a number of {len(bin(abs(value))) - 2} bits"
        low = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        high = (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)
        return None if low and high else f"must be {self}, got {value}{self.hint and f': {self.hint}'}"

    def __str__(self) -> str:
        limits = {"at least": self.ge, "more than": self.gt, "at most": self.le, "less than": self.lt}
        given = [f"{word} {limit:.10g}" for word, limit in limits.items() if limit is not None]
        return " and ".join(given) or "a finite number"


ANY = Range()


def range_metadata(**limits: Any) -> dict[str, Any]:
    """Return field metadata with the limits of a ``Range``; empty without limits."""
    return {RANGE: limits} if limits else {}


def range_of(field: dataclasses.Field[Any]) -> Range:
    """Return the range of a field; any finite number if none is declared."""
    return Range(**field.metadata[RANGE]) if RANGE in field.metadata else ANY


def problems(value: Any, allowed: Range = ANY, path: str = "") -> Iterator[str]:
    """Yield ``PATH must be ...`` for each illegal number in a value: a configuration, or plain containers.

    path: the dotted name of the value.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from problems(
                getattr(value, field.name), range_of(field), f"{path}.{field.name}" if path else field.name
            )
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from problems(entry, allowed, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
        for place, entry in enumerate(value):
            yield from problems(entry, allowed, f"{path}.{place}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and (problem := allowed.problem(value)):
        yield f"{path} {problem}"
