"""Text of ``--help``: usage, examples, the options that matter first, then all others by section."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING
from typing import Any

from diffalign.config import yaml_dialect
from diffalign.config.schema import Leaf, leaves, type_name
from diffalign.config.unread import plain

ESSENTIAL = "most used options"
OTHER = "other options"
FROM_FILE = "--config FILE.yaml reads options from a file; options on the command line win over it."
SECTIONS = (
    "model", "data", "sampling", "rewards", "advantages", "loss", "adapter", "optimizer", "evaluation", "output",
    "server", "performance", "checkpoints", "run",
)  # fmt: skip


def describe(cls: Any) -> str:
    """Return the help text of a configuration class, wrapped at the width of the terminal.

    The class may have ``usage``, ``examples`` and ``essential``, the paths of the options to show first.
    """
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    return "\n".join(_lines(cls, width)) + "\n"


def _lines(cls: Any, width: int) -> Iterator[str]:
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

    others = [leaf for name, leaf in options.items() if name not in first]
    known = {leaf.section or OTHER for leaf in others}
    for name in [*(section for section in SECTIONS if section in known), *sorted(known - set(SECTIONS))]:
        yield from _section(name, [leaf for leaf in others if (leaf.section or OTHER) == name], width)
    yield from _wrapped(FROM_FILE, "", "", width)


def _section(name: str, options: Sequence[Leaf], width: int) -> Iterator[str]:
    yield f"{name}:"
    for leaf in options:
        default = "(required)" if leaf.default is MISSING else f"= {yaml_dialect.dump_inline(plain(leaf.default))}"
        yield from _wrapped(f"--{leaf.path} {type_name(leaf.hint)} {default}", "  ", "      ", width)
        if leaf.help:
            yield from _wrapped(leaf.help, "      ", "      ", width)
    yield ""


def _wrapped(text: str, first: str, rest: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
