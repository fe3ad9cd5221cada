"""A row of a table: its cells as texts, numbers and images, with errors that name row and column."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffalign.data.quarantine import Fault, printable
from diffalign.structures import ImageSource, Prompt

PROMPTS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Row:
    """A row. name: of its source and its number; key: the number, as text; root: where relative image paths start.

    A cell that is a function is fetched when its image is read. masks: the column of masks, where they are asked for.
    """

    name: str
    key: str
    values: Mapping[str, Any] = field(repr=False)
    root: Path = Path()
    masks: str | None = None

    def first(self, columns: Sequence[str]) -> str:
        """The first of ``columns`` that has a value here, else the first that is there."""
        there = [column for column in columns if column in self.values]
        return next((column for column in there if self.values[column] is not None), there[0])

    def fault(self, kind: str, column: str, detail: str) -> Fault:
        """A fault of this row."""
        return Fault(kind, f"{self.name}, {column}", detail)

    def prompt(self) -> Prompt:
        """The text ("prompt", "caption" or "text"), empty where there is none, and the mapping in "metadata"."""
        text = self.values[self.first(PROMPTS)]
        metadata = self.values.get("metadata")
        try:
            metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        except json.JSONDecodeError as error:
            raise self.fault("bad_row", "metadata", f"not JSON: {error.msg}") from error
        return Prompt(text.strip() if isinstance(text, str) else "", metadata if isinstance(metadata, Mapping) else {})

    def image(self, column: str, identity: Any = None, place: int | None = None) -> ImageSource:
        """The image in ``column``, of a list the one at ``place``: bytes, a path, or ``datasets``' mapping of both."""
        cell = self.values[column]
        name = f"{self.name}, {column}" + ("" if place is None else f"[{place}]")
        content = partial(self._fetch, cell, place) if callable(cell) else self._content(cell, place)
        if isinstance(content, Path):
            name, identity = printable(content), identity or str(content)
        return ImageSource(name, content, None if identity is None else str(identity))

    def mask(self) -> ImageSource | None:
        """The mask of the row's images; None where masks are not asked for."""
        return None if self.masks is None else self.image(self.masks)

    def _fetch(self, cell: Any, place: int | None) -> bytes | Path | None:
        return self._content(cell(), place)

    def _content(self, cell: Any, place: int | None) -> bytes | Path | None:
        if place is not None and cell is not None:
            cell = cell[place]
        if isinstance(cell, Mapping):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, (str, Path)) and str(cell):
            return self.root / cell
        return cell if isinstance(cell, bytes) else None

    def number(self, column: str) -> float | None:
        """The number in ``column``; None for none, or NaN. Fault "bad_label": something else."""
        value = self.values[column]
        if value is None or value != value:
            return None
        try:
            return float(value)
        except (TypeError, ValueError):
            raise self.fault("bad_label", column, f"{value!r} is not a number") from None

    def choice(self, column: str, choices: Sequence[float]) -> float:
        """The number in ``column``, one of ``choices``. Fault "bad_label": another, or none."""
        value = self.number(column)
        if value not in choices:
            raise self.fault("bad_label", column, f"{value} is not one of {', '.join(f'{c:g}' for c in choices)}")
        return value

    def probability(self, column: str) -> float | None:
        """The number in ``column``, in [0, 1]; None for none. Fault "bad_label": outside."""
        value = self.number(column)
        if value is not None and not (0 <= value <= 1 and math.isfinite(value)):
            raise self.fault("bad_label", column, f"{value} is not in [0, 1]")
        return value
