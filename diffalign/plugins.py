"""Find what extends a registry: modules of this package, and entry points of installed packages."""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoints, distributions
from pathlib import Path


def entry_points(group: str) -> EntryPoints:
    """Return the entry points of installed packages.

    ``python -m`` and a ``PYTHONPATH`` with an empty part put the working folder on the path of modules. Metadata of a
    package there may have come with somebody's data: naming its reward in a file would run its code without consent.
    """
    here = os.path.realpath(os.curdir)
    places = [place for place in sys.path if os.path.realpath(place or os.curdir) != here]
    found: dict[str, EntryPoints] = {}
    for distribution in distributions(path=places):
        name = distribution.metadata["Name"] if distribution.entry_points else None
        if name is not None:  # of a package that is found twice the first counts, as for importlib.metadata
            found.setdefault(name.lower(), distribution.entry_points)
    return EntryPoints(point for points in found.values() for point in points.select(group=group))


def import_modules(package: str) -> None:
    """Import every module directly in ``package``, so that the decorators in them fill their registry."""
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


def declared_names(room: str, decorator: str) -> list[str]:
    """List the names that a room of this package registers as ``@decorator("name", ...)``, sorted, importing nothing.

    Help texts and checks of configurations name rewards and losses, and neither may take the seconds that torch takes.
    """
    return sorted(declaring_modules(room, decorator))


@cache
def declaring_modules(room: str, decorator: str) -> Mapping[str, str]:
    """Map each name that a room registers as ``@decorator("name", ...)`` to its module, importing nothing."""
    declaration = re.compile(rf'^@?{decorator}\(\s*"([^"]+)"', re.MULTILINE)
    files = sorted((Path(__file__).parent / room).glob("*.py"))
    return {
        name: f"{__package__}.{room}.{file.stem}"
        for file in files
        for name in declaration.findall(file.read_text(encoding="utf-8"))
    }
