"""Name the settings that explain why numbers went bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

LARGE, SMALL = 1e6, 1e-12  # of the size of a setting; whatever is beyond is no usual one
# Numbers that are allowed to be of any size: they bound or count something, and enter no computation.
COUNTS = frozenset(("max_train_steps", "eval_steps", "checkpointing_steps", "checkpoints_total_limit", "seed", "scan"))
COUNTS |= {"hang_timeout", "max_grad_spike", "advantage_clip", "early_stopping", "reference_steps", "shift_every"}


def extremes(config: Any) -> str:
    """Name the numeric settings of unusual size, for the end of a message; empty where there are none."""
    found = [f"{name}: {value:g}" for name, value in _numbers(config) if _extreme(value)]
    return f"; unusual settings, to be changed first: {', '.join(found[:5])}" if found else ""


def _extreme(value: float) -> bool:
    return value != 0 and not SMALL <= abs(value) <= LARGE and abs(value) != float("inf")


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if name not in COUNTS:
                yield from _numbers(entry, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (list, tuple)):
        for place, entry in enumerate(value):
            yield from _numbers(entry, f"{path}.{place}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value
