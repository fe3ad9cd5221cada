"""Configurations: dataclasses, filled from YAML and from dotted command-line options.

    @dataclass
    class TrainConfig:
        output_dir: Path
        learning_rate: float = option(1e-4, "step size of AdamW")
        plan: PlanConfig = option(PlanConfig(), "what each step of a rollout does")

    config = parse(TrainConfig, ["--config", "run.yaml", "--plan.num_steps", "10"])

Every value is checked against the annotation of its field. Checks across fields belong to ``__post_init__`` of the
configuration itself; a ValueError raised there comes back with the source and the section in front.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

import yaml

from diffalign.atomic import write_text
from diffalign.config import yaml_dialect
from diffalign.config.consent import CONSENT, check_file, without
from diffalign.config.conversion import build
from diffalign.config.fields import Checked, Given, free_fields, given_names, option
from diffalign.config.help import describe
from diffalign.config.schema import (
    ConfigError,
    Place,
    arms_of,
    bare_field,
    config_arm,
    default_of,
    init_fields,
    problems_of,
    shown,
    truth,
)
from diffalign.config.taken_back import take_back
from diffalign.config.text import read
from diffalign.config.unread import plain, unread_names
from diffalign.embedded import config_file
from diffalign.files import bounded, read_text, shorten

__all__ = [
    "Checked",
    "Given",
    "describe",
    "free_fields",
    "from_dict",
    "given_names",
    "load_yaml",
    "option",
    "parse",
    "save_yaml",
    "to_dict",
    "to_yaml",
]

T = TypeVar("T")
COMMAND_LINE = "command line"


def from_dict(cls: type[T], mapping: Mapping[str, Any], source: str = "configuration", *, consent: bool = False) -> T:
    """Build and check an instance of the dataclass ``cls`` from plain values, which count as those of a file.

    ValueError: an unknown key (names the closest known one), a value of another type, a missing required field, what a
    file may not decide without the user's ``consent`` (code of rewards, servers), or, for a class with
    ``numbers_checked = True``, a number out of the range of its field (see ``ranges``).
    """
    place = Place(source, cls)
    if isinstance(mapping, Mapping):
        check_file(cls, mapping, place, consent)
    return build(cls, mapping, place)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Load the mapping of a YAML file, or of a configuration of the package, such as "flow_grpo/shapes".

    ValueError names the file: missing, not YAML, a duplicate key, not a mapping.
    """
    if not Path(path).suffix and not Path(path).exists():
        path = config_file(str(path))
    try:
        content = yaml_dialect.load(read_text(path))
    except OSError as error:
        raise ValueError(f"cannot read the config file {shorten(path)}: {error.strerror}; check --config") from error
    except (yaml.YAMLError, RecursionError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else bounded(error, 1000)
        raise ValueError(f"{shorten(path)} is not a YAML file: {detail}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold 'key: value' lines, found {type(content).__name__}")
    return content


@dataclasses.dataclass(frozen=True)
class Section:
    """A step of a dotted key. default: the default of the field, if it is a dict."""

    name: str
    default: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bare_field: str | None = None
    bare: Any = None

    def opened(self, value: Any) -> dict[str, Any]:
        """Expand a value of a file to a mapping: it may be a preset's name alone, or a list of names."""
        if isinstance(value, dict):
            return value
        if value is None:
            return dict(self.default)
        if self.bare_field and isinstance(value, (str, int, float)):
            return {self.bare_field: value}
        names = value.split(",") if isinstance(value, str) else value
        if self.bare is not None and isinstance(names, list):
            return {str(name).strip(): self.bare for name in names}
        return dict(self.default)


@dataclasses.dataclass(frozen=True)
class Target:
    """The field that a dotted key names: the sections that lead to it, itself the last, and its type."""

    sections: list[Section]
    hint: Any
    bare: Any = None

    @property
    def takes_several(self) -> bool:
        """Return whether the field is a list, which accepts several values and repeated options."""
        arms = arms_of(self.hint)
        return self.bare is not None or any(typing.get_origin(arm) in (list, tuple) for arm in arms)


def _tokens(argv: Sequence[str], cls: type, positional: list[str] | None, problems: list[str]) -> Iterator[Any]:
    """Yield (key, texts, target) of each option; a switch without a value means true.

    positional: field for arguments without an option; None if the command has none.
    """
    rest, place = list(argv), Place(COMMAND_LINE, cls)
    while rest:
        token = rest.pop(0)
        key, equals, text = token[2:].partition("=")
        if not token.startswith("--") or not key:
            if positional is None:
                hint = "values with spaces need quotes"
                problems.append(f"{COMMAND_LINE}: expected --key value, got {shown(token)}; {hint}")
            else:
                positional.append(token)
            continue
        try:
            target = Target([], str) if key == "config" else _resolve(cls, key, place)
        except ValueError as error:
            problems.extend(problems_of(error))
            _take(rest, 1)
            continue
        # Where the command's own arguments have not come yet, what follows a list's first value is among them.
        several = target.takes_several and (positional is None or bool(positional))
        texts = [text] if equals else _take(rest, len(rest) if several else 1)
        if bool in arms_of(target.hint) and texts and positional is not None and truth(texts[0]) is None:
            rest.insert(0, texts.pop())
        if not texts and bool not in arms_of(target.hint):
            problems.append(f"{COMMAND_LINE}: --{key} needs a value: --{key} VALUE, or --{key}=VALUE")
            continue
        yield key, texts or ["true"], target


def _take(rest: list[str], most: int) -> list[str]:
    """Remove and return up to ``most`` tokens that are no options."""
    count = next(
        (i for i, token in enumerate(rest[:most]) if token.startswith("--") and token != "--"), len(rest[:most])
    )
    taken = rest[:count]
    del rest[:count]
    return taken


def _resolve(cls: type, key: str, place: Place) -> Target:
    sections: list[Section] = []
    hint: Any = cls
    default: Any = MISSING
    rest, bare = key, None
    while rest:
        name, _, rest = rest.partition(".")
        found = {field.name: (field, hint) for field, hint in init_fields(config_arm(hint))}
        if name not in found:
            raise (place / key).unknown()
        field, hint = found[name]
        bare = field.metadata.get("bare")
        default = default_of(field, default)
        arm = config_arm(hint)
        sections.append(Section(name, default if isinstance(default, dict) else {}, arm and bare_field(arm), bare))
        if rest and typing.get_origin(hint) is dict:  # The rest names an entry, dots and all.
            return Target([*sections, Section(rest)], typing.get_args(hint)[1])
        if rest and not config_arm(hint):
            raise (place / key).unknown()
    return Target(sections, hint, bare)


def _value(target: Target, texts: Sequence[str], place: Place) -> tuple[list[Section], Any]:
    """Return the sections that lead to a value, and the value."""
    arm = config_arm(target.hint)
    name = bare_field(arm)
    if name and texts[-1].lstrip()[:1] not in ("{", "[") and texts[-1] not in ("", "null", "~"):
        hint = next(hint for field, hint in init_fields(arm) if field.name == name)
        with contextlib.suppress(ValueError):
            return [*target.sections, Section(name)], read(hint, texts[-1], place)
    values = [read(target.hint, text, place, target.bare) for text in texts]
    if len(values) == 1:
        return target.sections, values[0]
    if all(isinstance(value, dict) for value in values):
        return target.sections, {name: entry for value in values for name, entry in value.items()}
    return target.sections, type(values[0])(item for value in values for item in value)


def parse(cls: type[T], argv: Sequence[str], positional: str | None = None) -> T:
    """Parse ``--config FILE`` (optional), ``--field VALUE``, ``--section.field VALUE``, ``--field=VALUE``.

    Options win over the file, later ones over earlier ones, and a file cannot set all of them (see ``consent``); a list
    that is given twice has the items of both. ``--switch`` alone means true. An entry of a dict field is
    ``--field.name VALUE``. How a value is read follows from the annotation of its field: see ``config.text``.

    Args:
        cls: A dataclass.
        argv: Arguments, without the names of program and command.
        positional: The field, a list of text, for arguments without an option.

    Raises:
        ConfigError: All errors, a sentence each.
    """
    place, problems = Place(COMMAND_LINE, cls), list[str]()
    free: list[str] | None = None if positional is None else []
    given: dict[str, tuple[list[str], Target]] = {}
    for key, texts, target in _tokens(argv, cls, free, problems):
        before = given.pop(key, ([], target))[0] if target.takes_several or key == "config" else []
        given[key] = ([*before, *texts], target)
    files = given.pop("config")[0] if "config" in given else []
    if len(files) > 1:
        problems.append(f"{COMMAND_LINE}: --config given {len(files)} times; one file is read, so merge them")
    mapping: dict[str, Any] = {}
    try:
        mapping = load_yaml(files[0]) if files else {}
    except ValueError as error:
        problems.append(str(error))
    typed: list[tuple[list[Section], Any]] = []
    for key, (texts, target) in given.items():
        try:
            typed.append(_value(target, texts, place / key))
        except ValueError as error:
            problems.extend(problems_of(error))

    source = Place(files[0] if files else COMMAND_LINE, cls)
    consent = any(value is True and sections[-1].name == CONSENT for sections, value in typed)
    from_file = without(mapping, [[section.name for section in sections] for sections, _ in typed])
    try:
        check_file(cls, from_file, source, consent)
    except ValueError as error:
        problems.extend(problems_of(error))

    for sections, value in typed:
        _put(mapping, sections, value)
    take_back(cls, from_file, mapping, [[section.name for section in sections] for sections, _ in typed])
    if positional is not None and free:
        mapping[positional] = (*free, *mapping.get(positional, ()))
    try:
        config = build(cls, mapping, source)
    except ValueError as error:
        problems.extend(problems_of(error))
    if problems:
        raise ConfigError(problems)
    return config


def _put(mapping: dict[str, Any], sections: Sequence[Section], value: Any) -> None:
    for section in sections[:-1]:
        mapping[section.name] = section.opened(mapping.get(section.name))
        mapping = mapping[section.name]
    mapping[sections[-1].name] = value


def to_dict(config: Any) -> dict[str, Any]:
    """Convert to plain dicts, lists and scalars; ``from_dict`` restores the configuration.

    Typed-only fields, and fields that a run of the configuration does not read, are left out.
    """
    found: dict[str, Any] = plain(config, unread_names(config))
    return found


def to_yaml(config: Any) -> str:
    """Convert to YAML in the order of the fields; floats are exact."""
    return yaml_dialect.dump(to_dict(config))


def save_yaml(config: Any, path: str | Path) -> None:
    """Write ``to_yaml``; ``parse(cls, ["--config", path])`` restores the same configuration."""
    write_text(path, to_yaml(config))
