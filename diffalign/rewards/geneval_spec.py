"""Read and validate GenEval's metadata format (arXiv 2310.11513)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from diffalign.files import shorten, some
from diffalign.structures import without_nulls

RELATIONS = ("left of", "right of", "above", "below")
KEYS = ("class", "count", "color", "position")


def read_spec(
    metadata: Mapping[str, Any], classes: Collection[str], colors: Collection[str], who: str = "the reward"
) -> dict[str, Any]:
    """Validate the metadata of a prompt, and return it without nulls.

    Args:
        metadata: ``{"include": [{"class", "count", "color"?, "position"?}], "exclude"?: [{"class", "count"}]}``, where
            ``position`` is ``[relation, index of an earlier entry]``; other keys are kept. Lists may be JSON text, as
            in tables.
        classes: known object classes.
        colors: known colours.
        who: subject of error messages, such as "the detector".

    Raises:
        ValueError: an invalid entry; the message names it and a valid form.
    """
    found: dict[str, Any] = without_nulls(metadata)
    include = _entries(found.get("include"), "include")
    checked = [_entry(entry, f"include[{i}]", i, classes, colors, who) for i, entry in enumerate(include)]
    found["include"] = checked
    if "exclude" in found:
        exclude = _entries(found["exclude"], "exclude")
        found["exclude"] = [_entry(e, f"exclude[{i}]", 0, classes, colors, who) for i, e in enumerate(exclude)]
    return found


def _entries(value: Any, where: str) -> Sequence[Any]:
    if isinstance(value, str):
        try:
            value = without_nulls(json.loads(value))
        except ValueError as error:
            raise ValueError(f"{where} is text but not JSON: {shorten(value, 60)}") from error
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is {shorten(repr(value), 60)}; write a list of objects")
    return value


def _entry(
    entry: Any, where: str, earlier: int, classes: Collection[str], colors: Collection[str], who: str
) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f'{where} is {shorten(repr(entry), 60)}; write {{"class": "bench", "count": 1}}')
    if unknown := [key for key in entry if key not in KEYS]:
        raise ValueError(f"{where} has the key {some(unknown)}; it can have {', '.join(KEYS)}")
    if not isinstance(entry.get("class"), str) or entry["class"] not in classes:
        names = ", ".join(sorted(classes))
        raise ValueError(f"{who} knows no {shorten(repr(entry.get('class')), 40)}; it knows {shorten(names, 1200)}")
    if "color" in entry and (not isinstance(entry["color"], str) or entry["color"] not in colors):
        raise ValueError(f"{who} knows no color {shorten(repr(entry['color']), 40)}; it knows {', '.join(colors)}")
    found = {**entry, "count": _whole(entry.get("count"), f"{where}.count", 1)}
    if "position" in entry:
        found["position"] = _position(entry["position"], f"{where}.position", earlier)
    return found


def _position(value: Any, where: str, earlier: int) -> tuple[str, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or value[0] not in RELATIONS:
        example = f'["left of", 0], where the relation is one of {", ".join(RELATIONS)}'
        raise ValueError(f"{where} is {shorten(repr(value), 60)}; write {example}")
    index = _whole(value[1], f"{where}[1]", 0)
    if index >= earlier:
        raise ValueError(f"{where} refers to entry {index}, but only earlier entries can be referred to")
    return value[0], index


def _whole(value: Any, where: str, least: int) -> int:
    """Parse an integer; tables turn integers into floats beside nulls, and into texts beside texts."""
    text = str(value).strip()
    if isinstance(value, bool) or not text.removesuffix(".0").isdecimal() or int(text.removesuffix(".0")) < least:
        raise ValueError(f"{where} is {shorten(repr(value), 40)}; write a whole number of at least {least}")
    return int(text.removesuffix(".0"))
