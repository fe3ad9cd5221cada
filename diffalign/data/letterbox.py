"""Progress bars of ``datasets``, which belong on a terminal and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import datasets


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Draw the bars of ``datasets`` only where the standard error is a terminal."""
    if datasets.are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
