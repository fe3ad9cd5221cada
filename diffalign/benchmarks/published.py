"""Read the table of published figures: benchmark, model, settings, figure, value, source and year."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "data/published.csv"


@dataclass(frozen=True)
class Published:
    """The figures of a model that a source prints.

    Attributes:
        model: The model, and what it was trained with.
        settings: What else differs between rows of one model; may be empty.
        source: Paper or repository.
        year: Of the source.
        figures: Figure -> value, on the scale of this package.
    """

    model: str
    settings: str
    source: str
    year: int
    figures: dict[str, float]

    @property
    def title(self) -> str:
        """The model with its settings."""
        return f"{self.model} ({self.settings})" if self.settings else self.model


@cache
def _rows() -> Sequence[dict[str, str]]:
    return list(csv.DictReader(FILE.read_text(encoding="utf-8").splitlines()))


def published(benchmark: str) -> list[Published]:
    """Return the published figures of a benchmark, in the order of the file."""
    found: dict[tuple[str, str, str], Published] = {}
    for row in (row for row in _rows() if row["benchmark"] == benchmark):
        key = row["model"], row["settings"], row["source"]
        entry = found.setdefault(key, Published(*key, int(row["year"]), {}))
        entry.figures[row["figure"]] = float(row["value"])
    return list(found.values())
