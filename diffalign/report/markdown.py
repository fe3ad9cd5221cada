"""Text of others in Markdown: shown as it is, never as markup."""

from __future__ import annotations

from diffalign.files import printable

_ACTIVE = {character: f"&#{ord(character)};" for character in "|<>[]`"}


def inert(text: object) -> str:
    """Escape what could become HTML, a link, an image, code or another cell of a table; on one line."""
    return printable(str(text)).translate(str.maketrans(_ACTIVE))


def inline_code(text: object) -> str:
    """Quote a text as code within a line, whatever backticks it has."""
    shown = printable(str(text))
    fence = "`" * (max((len(run) for run in _runs(shown)), default=0) + 1)
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def _runs(text: str) -> list[str]:
    return "".join(c if c == "`" else " " for c in text).split()
