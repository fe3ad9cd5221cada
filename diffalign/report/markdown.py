"""Escape untrusted text for Markdown."""

from __future__ import annotations

from diffalign.files import printable

_ACTIVE = str.maketrans({character: f"&#{ord(character)};" for character in "|<>[]`"})


def inert(text: object) -> str:
    """Escape characters of HTML, links, images, code and table cells; returns one line."""
    return printable(str(text)).translate(_ACTIVE)


def inline_code(text: object) -> str:
    """Format a text as inline code, with a fence longer than its runs of backticks."""
    shown = printable(str(text))
    fence = "`" * (max((len(run) for run in _runs(shown)), default=0) + 1)
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _runs(text: str) -> list[str]:
    return "".join(c if c == "`" else " " for c in text).split()
