"""Every configuration class of a command, and how each kind of field is written on the command line."""

import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from diffalign.cli import COMMANDS, Command
from diffalign.config.schema import arms_of, leaves
from diffalign.lazy import load
from diffalign.trainers.registry import config_class, trainer_names

CLASSES = {f"train {name}": config_class(name) for name in trainer_names()}
CLASSES |= {name: load(command.config) for name, command in COMMANDS.items() if isinstance(command, Command)}


def samples(hint: Any, bare: Any = None) -> list[tuple[str, Any]]:
    """(text, value) pairs of an annotation: the spelling, and the value that it must be read as."""
    arms = arms_of(hint)
    found: list[tuple[str, Any]] = []
    for arm in arms:
        origin, inner = typing.get_origin(arm), typing.get_args(arm)
        if arm is type(None):
            found.append(("null", None))
        elif origin is Literal:
            found += [(str(choice), choice) for choice in inner]
        elif arm is bool:
            found += [(word, word in ("true", "yes", "1", "on")) for word in
                      ("true", "false", "yes", "no", "1", "0", "on", "off")]  # fmt: skip
        elif arm is int:
            found += [("7", 7), ("-3", -3), ("5_000", 5000), ("1e3", 1000)]
        elif arm is float:
            found += [("1e-4", 1e-4), ("-0.5", -0.5), ("3", 3.0), ("5_000", 5000.0)]
        elif arm is Path:
            found += [("a/b.txt", Path("a/b.txt")), ("./x y", Path("./x y"))]
        elif arm is str:
            found += [("a word", "a word"), ("010", "010"), ("[x", "[x"), ("a,b", "a,b"), ("", "")]
        elif origin in (list, tuple):
            found += _sequences(arm, origin, inner, str in arms)
        elif origin is dict and inner[0] is str:
            text, value = next(iter(samples(inner[1])), ("1", 1))
            found += [(f"{{a: {text}, b: {text}}}", {"a": value, "b": value}), ("{}", {})]
            if bare is not None:
                found += [("a,b", {"a": bare, "b": bare}), ("[a, b]", {"a": bare, "b": bare}), ("a", {"a": bare})]
    return found


def _sequences(arm: Any, origin: type, inner: Any, or_text: bool) -> list[tuple[str, Any]]:
    count = 2 if origin is list or inner[1:] == (...,) else len(inner)
    items = [inner[0]] * count if origin is list or inner[1:] == (...,) else list(inner)
    if any(all(typing.get_origin(arm) not in (None, Literal) for arm in arms_of(item)) for item in items):
        return []  # a list of lists is written in brackets; see test_config
    text, value = zip(*(samples(item)[0] for item in items), strict=True)
    brackets = (f"[{', '.join(text)}]", origin(value))
    return [brackets] if or_text else [brackets, (",".join(text), origin(value))]


def options() -> list[tuple[str, type, str, Any, Any]]:
    """(command, class, dotted path, annotation, bare) of each option of each command."""
    return [
        (command, cls, leaf.path, leaf.hint, bare_of(cls, leaf.path))
        for command, cls in CLASSES.items()
        for leaf in leaves(cls)
        if not any(is_dataclass(arm) for arm in arms_of(leaf.hint))
    ]


def bare_of(cls: Any, path: str) -> Any:
    """The value of an entry of this field that is given by its name alone."""
    *sections, name = path.split(".")
    for section in sections:
        hints = typing.get_type_hints(cls)
        cls = next(arm for arm in arms_of(hints[section]) if is_dataclass(arm))
    return next(field.metadata.get("bare") for field in fields(cls) if field.name == name)
