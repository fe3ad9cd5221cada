"""Parse the text of a command-line option by the annotation of its field.

    --seed 5_000            int            --lr_scale 1e-4          float
    --dry_run yes           bool           --offload vae,text       tuple[Literal[...], ...]
    --window 0,4            tuple[int, int]    --rewards a=0.5,b    dict[str, float]

YAML in brackets (``[a, b]``, ``{a: 1}``) is read item by item in the same way, so that ``[2024]`` is text in a list of
text and a number in a list of numbers.
"""

from __future__ import annotations

import csv
import typing
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

import yaml

from diffalign.config import yaml_dialect
from diffalign.config.schema import Place, arms_of, bare_field, config_arm, init_fields, shown, truth, type_name

NOTHING = type(None)


def read(hint: Any, text: str, place: Place, bare: Any = None) -> Any:
    """Parse ``text`` for a field annotated with ``hint``.

    Args:
        hint: The annotation, resolved.
        text: What was typed.
        place: The option, for messages.
        bare: For a dict, the value of an entry that is given by its name alone.

    Raises:
        ValueError: The text does not fit; names the option, the text and a spelling that works.
    """
    if text[:1] in ("[", "{") or (_has_mapping(hint) and not text.startswith('"')):
        node, takes_text = _compose(text), str in arms_of(hint)
        fits = _has_mapping(hint) if isinstance(node, yaml.MappingNode) else _has_sequence(hint) or bare is not None
        if isinstance(node, yaml.CollectionNode) and (fits or not takes_text):
            return _structured(hint, node, place, bare)
    if (value := _scalar(hint, text)) is not MISSING:
        return value
    if bare is not None:
        return dict(_entry(hint, item, place, bare) for item in _split(text, ()))
    if (arm := _arm(hint, (list, tuple))) is not None:
        items = _split(text, typing.get_args(arm))
        if len(items) > 1 or not {int, float} & set(arms_of(hint)):  # else it was meant as the number
            return _sequence(arm, [(item, None) for item in items], place)
    raise place.error(f"expected {type_name(hint)}, got {shown(text)}{_spelling(hint, place)}")


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml_dialect.compose(text)
    except yaml.YAMLError:
        return None


def _structured(hint: Any, node: yaml.Node, place: Place, bare: Any = None) -> Any:
    """Convert a YAML node by annotation; plain scalars are parsed as text is."""
    if isinstance(node, yaml.ScalarNode):
        quoted = node.style is not None
        if quoted and str in arms_of(hint):
            return node.value
        return read(hint, node.value, place)
    if Any in arms_of(hint):
        return yaml_dialect.construct(node)
    if isinstance(node, yaml.MappingNode):
        return _mapping(hint, node, place)
    if bare is not None:
        return dict(_entry(hint, item.value, place, bare) for item in node.value)
    if (arm := _arm(hint, (list, tuple))) is None:
        raise place.error(f"expected {type_name(hint)}, got a list{_spelling(hint, place)}")
    return _sequence(arm, [(getattr(item, "value", None), item) for item in node.value], place)


def _mapping(hint: Any, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
    known = None
    if (arm := config_arm(hint)) is not None:
        known = {field.name: own for field, own in init_fields(arm)}
    elif (arm := _arm(hint, (dict,))) is None:
        raise place.error(f"expected {type_name(hint)}, got fields{_spelling(hint, place)}")
    found: dict[str, Any] = {}
    for key, value in node.value:
        name = key.value
        if known is not None and name not in known:
            raise (place / name).unknown()
        if name in found:
            raise place.error(f"{name} is given twice")
        found[name] = _structured(known[name] if known else typing.get_args(arm)[1], value, place / name)
    return found


def _sequence(arm: Any, items: Sequence[tuple[str | None, yaml.Node | None]], place: Place) -> Any:
    hints = typing.get_args(arm)
    if typing.get_origin(arm) is list or hints[1:] == (...,):
        hints = (hints[0],) * len(items)
    if len(hints) != len(items):
        raise place.error(
            f"expected {len(hints)} values ({type_name(arm)}), got {len(items)}: "
            f"write --{place.path} {','.join('N' for _ in hints)}"
        )
    values = [
        read(hint, str(text), place / i) if node is None else _structured(hint, node, place / i)
        for i, (hint, (text, node)) in enumerate(zip(hints, items, strict=True))
    ]
    return typing.get_origin(arm)(values)


def _entry(hint: Any, item: str, place: Place, bare: Any) -> tuple[str, Any]:
    """Parse ``name`` or ``name=value`` of a dict whose entries have a default value."""
    name, equals, value = item.partition("=")
    if not name.strip():
        raise place.error(f"{shown(item)} has no name: write --{place.path} NAME,NAME or NAME=VALUE,NAME=VALUE")
    kind = typing.get_args(_arm(hint, (dict,)))[1]
    return name.strip(), read(kind, value.strip(), place / name.strip()) if equals else bare


def _split(text: str, items: Sequence[Any]) -> list[str]:
    """Split at commas, except within quotes and within the path of an existing file."""
    if not text.strip():
        return []
    if {str, Path} & {arm for item in items for arm in arms_of(item)} and _exists(text):
        return [text]
    return [item.strip() for item in next(csv.reader([text], skipinitialspace=True))]


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _scalar(hint: Any, text: str) -> Any:
    """Convert to the first union member that accepts the text, text types last; MISSING if none does."""
    arms = arms_of(hint)
    if not text.strip() and str not in arms and NOTHING in arms:
        return None
    if NOTHING in arms and (text in ("~", "null", "Null", "NULL") or (text in ("none", "None") and str not in arms)):
        return None
    if Any in arms:
        return yaml_dialect.load(text) if _compose(text) is not None else text
    for arm in sorted(arms, key=lambda arm: (arm is str, arm is Path)):
        if (value := _as(arm, text)) is not MISSING:
            return value
    return MISSING


def _as(arm: Any, text: str) -> Any:
    if typing.get_origin(arm) is Literal:
        return next((choice for choice in typing.get_args(arm) if str(choice) == text.strip()), MISSING)
    if arm is bool:
        return MISSING if (value := truth(text.strip())) is None else value
    if arm in (int, float):
        return _number(arm, text.strip())
    if arm is Path:
        return Path(text) if text else MISSING
    return text if arm is str else MISSING


def _number(kind: type, text: str) -> Any:
    """Parse a number; ``1e4`` is an integer too, and ``010``, 8 in YAML 1.1, is none."""
    lowered = text.lower().replace("_", "")
    if lowered.lstrip("+-") in ("inf", "nan", "infinity"):
        return float(lowered) if kind is float else MISSING
    try:
        value = yaml_dialect.load(lowered)
    except yaml.YAMLError:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return MISSING
    if kind is float:
        return yaml_dialect.as_float(value)
    whole = isinstance(value, int) or ("e" in lowered and "inf" not in lowered and value.is_integer())
    return int(value) if whole else MISSING


def _arm(hint: Any, origins: tuple[type, ...]) -> Any:
    return next((arm for arm in arms_of(hint) if typing.get_origin(arm) in origins), None)


def _has_sequence(hint: Any) -> bool:
    return Any in arms_of(hint) or _arm(hint, (list, tuple)) is not None


def _has_mapping(hint: Any) -> bool:
    return Any in arms_of(hint) or _arm(hint, (dict,)) is not None or config_arm(hint) is not None


def _spelling(hint: Any, place: Place) -> str:
    """Show a spelling that works, for types where it is not obvious."""
    if (arm := config_arm(hint)) is not None:
        name = bare_field(arm) or next(field.name for field, _ in init_fields(arm))
        return f": write --{place.path}.{name} VALUE, or --{place.path} '{{{name}: VALUE}}'"
    if _arm(hint, (dict,)) is not None:
        return f": write --{place.path}.NAME VALUE, or --{place.path} '{{NAME: VALUE}}'"
    if _arm(hint, (list, tuple)) is not None:
        return f": write --{place.path} A,B or --{place.path} '[A, B]'"
    return ""
