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

import copy
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

import yaml

from diffalign.config import yaml_dialect
from diffalign.config.ranges import bounded, check_numbers, problems
from diffalign.config.schema import (
    Place,
    arms_of,
    build,
    config_arm,
    convert,
    default_of,
    init_fields,
    leaves,
    type_name,
)
from diffalign.files import write_text

__all__ = ["check_numbers", "describe", "from_dict", "load_yaml", "option", "parse", "save_yaml", "to_dict", "to_yaml"]

T = TypeVar("T")
COMMAND_LINE = "command line"


def option(default: Any = MISSING, help: str = "", **limits: Any) -> Any:
    """A dataclass field with a one-line description for ``--help``; a mutable default is copied for each instance.

    limits: of numbers, as for ``ranges.Range``: ge, gt, le, lt, infinite.
    """
    kw: dict[str, Any] = {}
    if type(default).__hash__ is None:
        kw["default_factory"] = lambda: copy.deepcopy(default)
    elif default is not MISSING:
        kw["default"] = default
    return dataclasses.field(metadata={"help": help, **bounded(**limits)}, **kw)


def from_dict(cls: type[T], mapping: Mapping[str, Any], source: str = "configuration") -> T:
    """An instance of the dataclass ``cls``, checked.

    ValueError: an unknown key (names the closest known one), a value of another type, a missing required field; for a
    class with ``numbers_checked = True``, a number out of the range of its field (see ``ranges``).
    """
    built = build(cls, mapping, Place(source, cls))
    if getattr(cls, "numbers_checked", False) and (problem := next(problems(built), None)):
        raise ValueError(f"{source}: {problem}")
    return built


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file. ValueError naming the file: missing, not YAML, a key given twice, not a mapping."""
    try:
        content = yaml_dialect.load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the config file {path}: {error.strerror}; check --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold 'key: value' lines, found {type(content).__name__}")
    return content


def _tokens(argv: Sequence[str], cls: type) -> Iterator[tuple[str, str]]:
    """(key, text) of each option; a switch without a value means true."""
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        key, equals, text = token[2:].partition("=")
        if not token.startswith("--") or not key:
            raise ValueError(f"{COMMAND_LINE}: expected --key value, got {token!r}; values with spaces need quotes")
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        elif not equals:
            if key == "config" or bool not in arms_of(_resolve(cls, key, Place(COMMAND_LINE, cls))[1]):
                raise ValueError(f"{COMMAND_LINE}: --{key} needs a value: --{key} VALUE, or --{key}=VALUE")
            text = "true"
        yield key, text


def _resolve(cls: type, key: str, place: Place) -> tuple[list[tuple[str, Any]], Any]:
    """The sections that lead to a dotted key, each (name, its default if it is a dict), and the key's annotation."""
    sections: list[tuple[str, Any]] = []
    hint: Any = cls
    default: Any = MISSING
    rest = key
    while rest:
        name, _, rest = rest.partition(".")
        found = {field.name: (field, hint) for field, hint in init_fields(config_arm(hint))}
        if name not in found:
            raise (place / key).unknown()
        field, hint = found[name]
        default = default_of(field, default)
        sections.append((name, default if isinstance(default, dict) else {}))
        if rest and typing.get_origin(hint) is dict:  # The rest names an entry, dots and all.
            return [*sections, (rest, {})], typing.get_args(hint)[1]
        if rest and not config_arm(hint):
            raise (place / key).unknown()
    return sections, hint


def _value(hint: Any, text: str, place: Place) -> Any:
    """The text as YAML, or as it stands where the field takes text."""
    try:
        value = yaml_dialect.load(text)
    except yaml.YAMLError:
        value = text
    # Text stays as typed: YAML would strip quotes, comments and outer spaces, and take nothing for null.
    typed = isinstance(value, str) or (not text.strip() and str in arms_of(hint))
    try:
        return _checked(hint, text if typed else value, place)
    except ValueError as error:
        try:
            return _checked(hint, text, place)
        except ValueError:
            raise error from None


def _checked(hint: Any, value: Any, place: Place) -> Any:
    if not (isinstance(value, Mapping) and config_arm(hint)):
        convert(hint, value, place)
    return value


def parse(cls: type[T], argv: Sequence[str]) -> T:
    """An instance from ``--config FILE`` (optional), ``--field VALUE``, ``--section.field VALUE``, ``--field=VALUE``.

    Options win over the file, later ones over earlier ones. ``--switch`` alone means true. An entry of a dict field is
    ``--field.name VALUE``. ValueError as in ``from_dict`` and ``load_yaml``.
    """
    place, pairs = Place(COMMAND_LINE, cls), list(_tokens(argv, cls))
    files = [text for key, text in pairs if key == "config"]
    if len(files) > 1:
        raise ValueError(f"{COMMAND_LINE}: --config given {len(files)} times; one file is read, so merge them")
    mapping = load_yaml(files[0]) if files else {}
    for key, text in pairs:
        if key != "config":
            sections, hint = _resolve(cls, key, place)
            _put(mapping, sections, _value(hint, text, place / key))
    return from_dict(cls, mapping, files[0] if files else COMMAND_LINE)


def _put(mapping: dict[str, Any], sections: Sequence[tuple[str, Any]], value: Any) -> None:
    for name, default in sections[:-1]:
        if not isinstance(mapping.get(name), dict):
            mapping[name] = dict(default)
        mapping = mapping[name]
    mapping[sections[-1][0]] = value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars; ``from_dict`` gives the same configuration back."""
    plain: dict[str, Any] = _plain(config)
    return plain


def to_yaml(config: Any) -> str:
    """YAML in the order of the fields; floats are exact."""
    return yaml_dialect.dump(_plain(config))


def save_yaml(config: Any, path: str | Path) -> None:
    """Writes ``to_yaml``, so that ``parse(cls, ["--config", path])`` gives the same configuration back."""
    write_text(path, to_yaml(config))


def describe(cls: type) -> str:
    """Help text: each option with its type, its default and its description."""
    lines = ["--config FILE.yaml"]
    for leaf in leaves(cls):
        default = "(required)" if leaf.default is MISSING else f"= {yaml_dialect.dump_inline(_plain(leaf.default))}"
        lines.append(f"--{leaf.path} {type_name(leaf.hint)} {default}" + (f"\n    {leaf.help}" if leaf.help else ""))
    return "\n".join(lines) + "\n"
