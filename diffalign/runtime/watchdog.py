"""Ends a run that hangs, and says where it hung."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from diffalign.runtime.exits import HANG


class Watchdog:
    """A context that ends the process with exit code 75 when ``beat`` was not called for ``limit`` seconds.

    The stacks of all threads go to standard error and to ``stacks-<pid>.txt`` in ``folder``. limit 0: never. Code that
    hangs without ever releasing Python's lock cannot be seen from here.
    """

    def __init__(self, limit: float, folder: Path) -> None:
        self.limit, self.folder = limit, folder
        self.last = time.monotonic()
        self._over = threading.Event()

    def beat(self) -> None:
        """The run goes on."""
        self.last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        self._over.clear()
        if self.limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(max(0.05, self.last + self.limit - time.monotonic())):
            if time.monotonic() - self.last > self.limit:
                self._end()

    def _end(self) -> None:
        file = self.folder / f"stacks-{os.getpid()}.txt"
        text = f"\nno progress for {self.limit:g} s (hang_timeout): the stacks of all threads, also in {file}:\n"
        try:
            sys.__stderr__.write(text)
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            with file.open("w") as copy:
                faulthandler.dump_traceback(copy, all_threads=True)
        finally:
            os._exit(HANG)  # the main thread hangs, so that nobody would handle an exception
