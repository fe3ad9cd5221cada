"""Describe a dataclass as the schema of plain values: fields, annotations, defaults and dotted keys."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, Literal, Union

from diffalign.config.ranges import ANY, Range, range_of
from diffalign.config.renamed import about_removed

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


def is_config(hint: Any) -> bool:
    """Return whether an annotation is a configuration class."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def arms_of(hint: Any) -> tuple[Any, ...]:
    """List the members of a union; any other annotation is its only member."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def config_arm(hint: Any) -> Any:
    """Return the configuration class of ``C`` or ``C | None``; None for any other annotation."""
    return next((arm for arm in arms_of(hint) if is_config(arm)), None)


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
