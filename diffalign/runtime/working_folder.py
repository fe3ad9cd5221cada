"""Keep a run in the working folder it started in: data are read from relative paths."""

from __future__ import annotations

import os

from diffalign.log import get_logger

logger = get_logger(__name__)


def return_to(folder: str) -> None:
    """Undo a change of the working folder by user code, with a warning."""
    try:
        now = os.getcwd()
    except OSError:
        now = "a folder that is gone"
    if now != folder:
        os.chdir(folder)
        logger.warning(f"a reward changed the working folder to {now}; the run stays in {folder}")
