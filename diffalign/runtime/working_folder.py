"""Keep a run in the working folder it started in: data are read from relative paths."""

from __future__ import annotations

import os
from collections.abc import Callable


def return_to(folder: str, say: Callable[[str], None]) -> None:
    """Undo a change of the working folder by user code, and report it through ``say``."""
    try:
        now = os.getcwd()
    except OSError:
        now = "a folder that is gone"
    if now != folder:
        os.chdir(folder)
        say(f"warning: a reward changed the working folder to {now}; the run stays in {folder}")
