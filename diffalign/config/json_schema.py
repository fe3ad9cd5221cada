"""JSON Schema (draft 2020-12) of a configuration, by which editors complete and check its YAML files."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

from diffalign.config.ranges import Range, range_of
from diffalign.config.schema import arms_of, bare_field, config_arm, default_of, init_fields
from diffalign.config.unread import plain

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCALARS: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Path: {"type": "string"},
    type(None): {"type": "null"},
    Any: {},
}
LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def json_schema(cls: Any) -> dict[str, Any]:
    """Return the schema of the files of a configuration class; what only the command line may set is left out."""
    return {"$schema": DIALECT, "title": cls.__name__, **_object(cls, MISSING)}


def schema_text(cls: Any) -> str:
    """Format the schema as JSON, as in ``configs/schema``."""
    return json.dumps(json_schema(cls), indent=2, ensure_ascii=False) + "\n"


def _object(cls: Any, base: Any) -> dict[str, Any]:
    """Build the schema of a configuration class. base: the default of the section, if any."""
    properties, required = {}, []
    for field, hint in init_fields(cls):
        if field.metadata.get("typed_only"):
            continue
        default = default_of(field, base)
        properties[field.name] = _property(field, hint, default)
        if default is MISSING and config_arm(hint) is None:
            required.append(field.name)
    found: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {})


def _property(field: dataclasses.Field[Any], hint: Any, default: Any) -> dict[str, Any]:
    options = _of(hint, range_of(field), default)
    if field.metadata.get("bare") is not None:
        options += [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]
    found = options[0] if len(options) == 1 else {"anyOf": options}
    if text := field.metadata.get("help"):
        found = {"description": text, **found}
    if default is MISSING or dataclasses.is_dataclass(default):
        return found
    return found | {"default": plain(default)}


def _of(hint: Any, limits: Range, default: Any = MISSING) -> list[dict[str, Any]]:
    """List the alternatives that an annotation allows."""
    return [found for arm in arms_of(hint) for found in _arm(arm, limits, default)]


def _arm(arm: Any, limits: Range, default: Any) -> list[dict[str, Any]]:
    origin, inner = typing.get_origin(arm), typing.get_args(arm)
    if origin is Literal:
        return [{"enum": list(inner)}]
    if config_arm(arm) is not None:
        own = [_object(arm, default if isinstance(default, arm) else MISSING)]
        if (name := bare_field(arm)) is None:
            return own
        field, hint = next((field, hint) for field, hint in init_fields(arm) if field.name == name)
        return [*own, *_of(hint, range_of(field))]
    if origin is dict:
        return [{"type": "object", "additionalProperties": _one(inner[1], limits)}]
    if origin in (list, tuple):
        # A list may be written as text with commas too.
        return [_array(origin, inner, limits), {"type": "string"}]
    bounds = {word: getattr(limits, name) for name, word in LIMITS.items() if getattr(limits, name) is not None}
    return [SCALARS[arm] | (bounds if arm in (int, float) else {})]


def _array(origin: type, inner: Sequence[Any], limits: Range) -> dict[str, Any]:
    if origin is list or inner[1:] == (...,):
        return {"type": "array", "items": _one(inner[0], limits)}
    items = [_one(hint, limits) for hint in inner]
    return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}


def _one(hint: Any, limits: Range) -> dict[str, Any]:
    found = _of(hint, limits)
    return found[0] if len(found) == 1 else {"anyOf": found}
