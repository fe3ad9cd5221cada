"""Find plug-ins: the entry points of installed packages, and of nothing that merely lies in the working folder."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoints, distributions


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
