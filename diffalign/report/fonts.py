"""Fonts of the texts in pictures: Pillow's own, or for letters that it lacks, matplotlib's or one of this machine."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

from PIL import ImageFont

SIZE = 14
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class FontWarning(UserWarning):
    """Letters that no font of this machine has."""


@cache
def own() -> Font:
    """Return Pillow's own font."""
    return ImageFont.load_default(SIZE)


@cache
def letters_of(file: Any) -> frozenset[int]:
    """Return the code points of a font file; none of a file that is no font."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@cache
def own_letters() -> frozenset[int]:
    """Return the code points of Pillow's own font; those of Latin-1 where Pillow was built without FreeType."""
    font = own()
    if not isinstance(font, ImageFont.FreeTypeFont):
        return frozenset(range(256))
    content: Any = font.path
    content.seek(0)
    return letters_of(content)


def system_fonts() -> list[str]:
    """List font files: the one that comes with matplotlib, then those of this machine in the order of their names."""
    from matplotlib.font_manager import findfont, findSystemFonts

    return [findfont("DejaVu Sans"), *sorted(findSystemFonts())]


def needed(text: str) -> frozenset[int]:
    """Return the code points of a text that a font must have."""
    return frozenset(ord(letter) for letter in text if letter.isprintable() and not letter.isspace())


@cache
def _best(wanted: frozenset[int]) -> tuple[Font, frozenset[int]]:
    """Return the font with the most of some code points, the first of equals, and what it has."""
    best, known = own(), own_letters()
    for file in system_fonts():
        if wanted <= known:
            break
        found = letters_of(file)
        if len(wanted & found) <= len(wanted & known):
            continue
        try:
            best, known = ImageFont.truetype(file, SIZE), found
        except OSError:  # a format that Pillow does not read
            continue
    return best, known


def font_of(text: str) -> Font:
    """Return the font to draw a text with: Pillow's own if it has all letters."""
    wanted = needed(text)
    return own() if wanted <= own_letters() else _best(wanted)[0]


def drawable(texts: Iterable[str]) -> list[str]:
    """Replace letters that no font has by their number in brackets, and warn once for all texts."""
    lost, found = set[str](), []
    for text in texts:
        wanted = needed(text)
        missing = set() if wanted <= own_letters() else {chr(code) for code in wanted - _best(wanted)[1]}
        lost |= missing
        found.append(_without(text, missing) if missing else text)
    if lost:
        some = " ".join(sorted(lost)[:5])
        warnings.warn(
            f"no font of this machine has {len(lost)} letters of the texts in a picture ({some} ...): install one, "
            "such as fonts-noto-cjk; pages (compare.html) show them with the browser's",
            FontWarning,
            stacklevel=2,
        )
    return found


def _without(text: str, missing: set[str]) -> str:
    run = f"[{re.escape(''.join(sorted(missing)))}]+"
    return re.sub(run, lambda match: f"[{len(match[0])} letters without a font]", text)
