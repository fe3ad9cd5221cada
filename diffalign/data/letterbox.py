"""Progress bars of ``datasets``, shown on terminals only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Show the progress bars of ``datasets`` only if stderr is a terminal."""
    import datasets

    if datasets.are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
