"""Convert plain values to dataclasses by annotation, with errors that name the dotted key."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from diffalign.config import yaml_dialect
from diffalign.config.ranges import ANY, Range, range_of
from diffalign.config.ranges import problems as range_problems
from diffalign.config.renamed import about_removed

T = TypeVar("T")
LONGEST = 200  # characters of a value in a message
MESSAGE = 1900  # characters of a message
TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def shown(value: Any) -> str:
    """Format a value for a message; long ones are cut."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"


def truth(text: str) -> bool | None:
    """Parse a boolean such as "yes" or "off"; None for another word."""
    return TRUTH.get(text.lower())


def bare_field(cls: Any) -> str | None:
    """Return the field that a bare value sets, such as the preset of a plan."""
    return getattr(cls, "bare_field", None)


class ConfigError(ValueError):
    """All errors of a configuration: ``problems``, a sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__(listed(self.problems))


def listed(problems: Sequence[str]) -> str:
    """Format one problem as it is, several as a list, in less than 2,000 characters."""
    if len(problems) == 1:
        return problems[0] if len(problems[0]) < MESSAGE else f"{problems[0][: MESSAGE - 3]}..."
    lines, room = list[str](), MESSAGE - 100
    for problem in problems:
        line = f"  - {problem}" if len(problem) < MESSAGE // 4 else f"  - {problem[: MESSAGE // 4]}..."
        room -= len(line) + 1
        if room < 0:
            lines.append(f"  ... and {len(problems) - len(lines)} more")
            break
        lines.append(line)
    return "\n".join([f"{len(problems)} problems:", *lines])


def problems_of(error: ValueError) -> tuple[str, ...]:
    """Return the sentences of an error."""
    return error.problems if isinstance(error, ConfigError) else (str(error),)


@dataclass(frozen=True)
class Place:
    """Source of a value, for messages: a file or the command line, and the dotted path below ``root``."""

    source: str
    root: type
    path: str = ""

    def __truediv__(self, name: Any) -> Place:
        return dataclasses.replace(self, path=f"{self.path}.{name}" if self.path else str(name))

    def error(self, message: str) -> ValueError:
        """Make an error about the value at this place."""
        return ValueError(f"{self.source}: {self.path}: {message}" if self.path else f"{self.source}: {message}")

    def unknown(self) -> ValueError:
        """Make an error about an unknown field; names the closest known ones."""
        if (note := about_removed(self.root.__name__, self.path)) is not None:
            return self.error(note)
        known = [leaf.path for leaf in leaves(self.root)]
        name = self.path.rpartition(".")[2]
        close = [path for path in known if path.rpartition(".")[2] == name]
        close = close or difflib.get_close_matches(self.path, known, 1, 0.5)
        close = close or [path for path in known if difflib.get_close_matches(name, [path.rpartition(".")[2]], 1, 0.8)]
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known keys: {', '.join(known)}"
        if self.path in known:
            hint = "in a file a section stands on its own line, with its keys indented below it"
        return ValueError(f"{self.source}: unknown key {shown(self.path)}; {hint}")


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def arms_of(hint: Any) -> tuple[Any, ...]:
    """List the members of a union; any other annotation is its only member."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def config_arm(hint: Any) -> Any:
    """Return the configuration class of ``C`` or ``C | None``; None for any other annotation."""
    return next((arm for arm in arms_of(hint) if _is_config(arm)), None)


def init_fields(cls: Any) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    """(field, resolved annotation) of each field that can be given."""
    return _init_fields(cls)


@functools.cache
def _init_fields(cls: Any) -> tuple[tuple[dataclasses.Field[Any], Any], ...]:
    hints = typing.get_type_hints(cls)
    return tuple((field, hints[field.name]) for field in dataclasses.fields(cls) if field.init)


def default_of(field: dataclasses.Field[Any], base: Any) -> Any:
    """Return the value in ``base`` (the default of the section) if there is one, else the default of the field."""
    if base is not None and base is not MISSING:
        return getattr(base, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


@dataclass(frozen=True)
class Leaf:
    """One option: dotted path, annotation, default (MISSING if required), description."""

    path: str
    hint: Any
    default: Any
    help: str
    bare: Any = None
    section: str = ""
    range: Range = ANY


def leaves(cls: Any, base: Any = MISSING, prefix: str = "", section: str = "") -> Iterator[Leaf]:
    """List every option of a configuration, nested ones with their dotted path and effective default."""
    for field, hint in init_fields(cls):
        default = default_of(field, base)
        arm, path = config_arm(hint), prefix + field.name
        own = section or field.metadata.get("section", "")  # a nested configuration stays with its field
        if arm is None or default is None:
            yield Leaf(path, hint, default, field.metadata.get("help", ""), section=own, range=range_of(field))
        if arm is not None:
            yield from leaves(arm, default, path + ".", own)


def type_name(hint: Any) -> str:
    """Format an annotation for a message: ``int|null``, ``no|fp16|bf16``, ``list[str]``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if len(arms_of(hint)) > 1:
        return "|".join(map(type_name, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if arm is ... else type_name(arm) for arm in arguments)}]"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def convert(hint: Any, value: Any, place: Place, base: Any = MISSING) -> Any:
    """Convert a value to an annotation. ValueError names the key, the value and the expected type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if _is_config(hint):
        if isinstance(value, (str, int, float)) and (name := bare_field(hint)):
            value = {name: value}
        return value if isinstance(value, hint) else build(hint, value, place, base)
    if isinstance(value, str) and takes_list(hint):
        # In a file a list of one item, or one with commas, may be written as on the command line.
        from diffalign.config import text

        return text.read(hint, value, place)
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
    if isinstance(value, Mapping) and (arm := next(filter(_is_config, arms), None)):
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
            elif _is_config(hint):
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
