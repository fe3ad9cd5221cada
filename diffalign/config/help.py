"""Text of ``--help``: usage, examples, the options that matter first, then all others by section."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from types import MappingProxyType
from typing import Any

from diffalign.config import yaml_dialect
from diffalign.config.ranges import ANY
from diffalign.config.schema import Leaf, leaves, type_name
from diffalign.config.unread import plain

ESSENTIAL = "most used options"
OTHER = "other options"
FROM_FILE = "--config FILE.yaml reads options from a file; options on the command line win over it."
SECTIONS = (
    "model", "data", "sampling", "rewards", "advantages", "loss", "adapter", "optimizer", "evaluation", "output",
    "server", "performance", "checkpoints", "run",
)  # fmt: skip


def describe(cls: Any, switches: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the help text of a configuration class, wrapped at the width of the terminal.

    Args:
        cls: May have ``usage``, ``examples`` and ``essential``, the paths of the options to show first.
        switches: Name -> help of options that are no fields of the class.
    """
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    return "\n".join(_lines(cls, width, switches)) + "\n"


def _lines(cls: Any, width: int, switches: Mapping[str, str]) -> Iterator[str]:
    options = {leaf.path: leaf for leaf in leaves(cls)}
    first = [name for name in getattr(cls, "essential", ()) if name in options]

    if usage := getattr(cls, "usage", ""):
        yield from _wrapped(f"usage: {usage}", "", "       ", width)
        yield ""
    if examples := getattr(cls, "examples", ()):
        yield "examples:"
        for example in examples:
            yield from _wrapped(example, "  ", "      ", width)
        yield ""
    if first:
        yield from _section(ESSENTIAL, [options[name] for name in first], width)
    if switches:
        yield from _section("switches", [Leaf(name, bool, False, text) for name, text in switches.items()], width)

    others = [leaf for name, leaf in options.items() if name not in first]
    known = {leaf.section or OTHER for leaf in others}
    for name in [*(section for section in SECTIONS if section in known), *sorted(known - set(SECTIONS))]:
        yield from _section(name, [leaf for leaf in others if (leaf.section or OTHER) == name], width)
    yield from _wrapped(FROM_FILE, "", "", width)


def _section(name: str, options: Sequence[Leaf], width: int) -> Iterator[str]:
    yield f"{name}:"
    for leaf in options:
        default = "(required)" if leaf.default is MISSING else f"= {yaml_dialect.dump_inline(plain(leaf.default))}"
        limits = f" ({leaf.range})" if str(leaf.range) != str(ANY) else ""
        yield from _wrapped(f"--{leaf.path} {type_name(leaf.hint)} {default}{limits}", "  ", "      ", width)
        if leaf.help:
            yield from _wrapped(leaf.help, "      ", "      ", width)
    yield ""


def _wrapped(text: str, first: str, rest: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
