"""Convert plain values to dataclasses by annotation, with errors that name the dotted key."""

from __future__ import annotations

import dataclasses
import numbers
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffalign.config import yaml_dialect
from diffalign.config.ranges import problems as range_problems
from diffalign.config.ranges import range_of
from diffalign.config.schema import (
    ConfigError,
    Place,
    arms_of,
    bare_field,
    default_of,
    init_fields,
    is_config,
    problems_of,
    shown,
    truth,
    type_name,
)
from diffalign.config.text import read

T = TypeVar("T")


def convert(hint: Any, value: Any, place: Place, base: Any = MISSING) -> Any:
    """Convert a value to an annotation. ValueError names the key, the value and the expected type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if is_config(hint):
        if isinstance(value, (str, int, float)) and (name := bare_field(hint)):
            value = {name: value}
        return value if isinstance(value, hint) else build(hint, value, place, base)
    if isinstance(value, str) and takes_list(hint):
        # In a file a list of one item, or one with commas, may be written as on the command line.
        return read(hint, value, place)
    if len(arms := arms_of(hint)) > 1:
        return _convert_union(arms, value, place, base)
    if origin is dict and isinstance(value, Mapping):
        key, item = arguments
        return {convert(key, name, place): convert(item, entry, place / name) for name, entry in value.items()}
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return _convert_sequence(origin, arguments, hint, value, place)
    if origin is Literal and any(type(choice) is type(value) and choice == value for choice in arguments):
        return value
    if origin is None and (converted := _convert_scalar(hint, value)) is not MISSING:
        return converted
    raise place.error(f"expected {type_name(hint)}, got {shown(value)} ({type(value).__name__})")


def takes_list(hint: Any) -> bool:
    """Return whether an annotation is a list or tuple, or null, but not text."""
    arms = arms_of(hint)
    return str not in arms and any(typing.get_origin(arm) in (list, tuple) for arm in arms)


def _convert_scalar(hint: Any, value: Any) -> Any:
    """Convert a scalar; MISSING if it does not fit. True is no number, and text is one only if it is written as one."""
    if hint is bool and isinstance(value, (str, int)) and (found := truth(str(value))) is not None:
        return found
    if hint is float and isinstance(value, str) and yaml_dialect.NUMBER.match(value):
        return yaml_dialect.as_float(yaml_dialect.load(value))
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return yaml_dialect.as_float(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is Path and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    fits = type(value) is hint if hint in (bool, int, float, str, dict, list) else isinstance(value, hint)
    return value if fits else MISSING


def _convert_sequence(origin: type, arguments: Sequence[Any], hint: Any, value: Sequence[Any], place: Place) -> Any:
    if origin is list or arguments[1:] == (...,):
        arguments = [arguments[0]] * len(value)
    if len(arguments) != len(value):
        raise place.error(f"expected {type_name(hint)}, which has {len(arguments)} items, got {shown(value)}")
    return origin(convert(item, entry, place / i) for i, (item, entry) in enumerate(zip(arguments, value, strict=True)))


def _convert_union(arms: Sequence[Any], value: Any, place: Place, base: Any) -> Any:
    """Convert to the union member that holds the value unchanged, else to the first that can convert it."""
    if isinstance(value, Mapping) and (arm := next(filter(is_config, arms), None)):
        return convert(arm, value, place, base)
    converted = []
    for arm in arms:
        try:
            converted.append(convert(arm, value, place))
        except ValueError:
            continue
    if not converted:
        raise place.error(f"expected {' or '.join(map(type_name, arms))}, got {shown(value)} ({type(value).__name__})")
    return next((item for item in converted if type(item) is type(value)), converted[0])


def build(cls: type[T], mapping: Any, place: Place, base: Any = MISSING) -> T:
    """Build an instance; missing keys come from ``base`` (the default of the section), else from ``cls``.

    Raises ConfigError with all errors.
    """
    if not isinstance(mapping, Mapping):
        raise place.error(f"expected the fields of {cls.__name__}, got {shown(mapping)} ({type(mapping).__name__})")
    found = {field.name: (field, hint) for field, hint in init_fields(cls)}
    problems = [str((place / name).unknown()) for name in mapping if name not in found]
    values, missing = {}, []
    for name, (field, hint) in found.items():
        default = default_of(field, base)
        try:
            if name in mapping:
                value = named(field, mapping[name], place / name)
                values[name] = convert(hint, value, place / name, default)
                if getattr(cls, "numbers_checked", False):
                    found_here = range_problems(values[name], range_of(field), (place / name).path)
                    problems += [f"{place.source}: {problem}" for problem in found_here]
            elif default is not MISSING:
                values[name] = default
            elif is_config(hint):
                values[name] = build(hint, {}, place / name)
            else:
                missing.append((place / name).path)
        except ValueError as error:
            problems.extend(problems_of(error))
    if missing:
        problems.append(
            f"{place.source}: no value for {', '.join(missing)}; give it in a --config file or as --{missing[0]} VALUE"
        )
    if problems:
        raise ConfigError(problems)
    try:
        built = cls(**values)
    except ValueError as error:
        raise place.error(str(error)) from error
    if hasattr(built, "mark_given"):
        built.mark_given(mapping, None if base is MISSING else base)
    return built


def named(field: dataclasses.Field[Any], value: Any, place: Place) -> Any:
    """Expand bare names, ``[a, b]`` or ``a,b``, to a mapping with the field's default entry value."""
    bare = field.metadata.get("bare")
    if bare is None or isinstance(value, Mapping):
        return value
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name.strip() for name in names):
        raise place.error(f"expected names, or names and values, got {shown(value)}")
    return {name.strip(): bare for name in names}
