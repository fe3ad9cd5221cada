"""End a run that hangs, and print the stacks of its threads.

A thread counts ticks without progress, which detects every hang that lets other threads run. A second process watches
that thread: if it stops too, something holds Python's lock (the GIL). Both count ticks instead of clock time, without
those in which the run was suspended: a laptop that slept, or a job that was stopped by SIGSTOP, does not hang.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from diffalign.runtime import guardian
from diffalign.runtime.errors import HANG
from diffalign.runtime.output import emit

DUMP = getattr(signal, "SIGRTMIN", 0) + 11 if hasattr(signal, "SIGRTMIN") else None  # signal that dumps all stacks
READING = 1 << 20  # bytes that must be read or written for loading to count as progress


class Watchdog:
    """Context that ends the process if ``beat`` is not called for ``limit`` seconds, without times of suspension.

    The stacks of all threads are written to standard error and to ``stacks-<pid>.txt`` in ``folder``. The exit code is
    75; if the GIL is held, the process cannot exit by itself and is killed (SIGKILL).

    Args:
        limit: Seconds; 0 and infinity: never.
        folder: The run folder.
        loading: Whether reading and writing files counts as progress, as during downloads.
    """

    def __init__(self, limit: float, folder: Path, loading: bool = False) -> None:
        self.limit, self.folder, self.loading = limit, folder.absolute(), loading
        self.tick = min(1.0, max(limit / 20, 0.05))
        self.idle = 0  # ticks since the last beat
        self._over = threading.Event()
        self._guardian: subprocess.Popen[bytes] | None = None

    def beat(self) -> None:
        """Note that the run made progress."""
        self.idle = 0

    @property
    def file(self) -> Path:
        """Path of the file with the stacks."""
        return self.folder / f"stacks-{os.getpid()}.txt"

    def __enter__(self) -> Watchdog:
        self.beat()
        self._over.clear()
        if 0 < self.limit < math.inf:
            self._start_guardian()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._guardian is not None:
            self._thread.join()
            if DUMP is not None:
                faulthandler.unregister(DUMP)
            self._guardian.kill()
            self._guardian.wait()
            _pipe(self._guardian).close()
            self._guardian = None

    def _start_guardian(self) -> None:
        """Start the process that watches the thread; without it, hangs that hold the GIL are not detected."""
        numbers = [str(os.getpid()), str(DUMP or 0), repr(self.limit), repr(self.tick)]
        command: list[str | bytes] = [sys.executable, "-I", "-S", guardian.__file__, *numbers, os.fsencode(self.file)]
        with contextlib.suppress(OSError):
            # Unbuffered, because ticks must be sent at once; a new session, so that no terminal stops it.
            self._guardian = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, start_new_session=True
            )
            os.set_blocking(_pipe(self._guardian).fileno(), False)
            if DUMP is not None:
                faulthandler.register(DUMP, _pipe(self._guardian).fileno(), all_threads=True, chain=False)

    def _watch(self) -> None:
        traffic = _traffic() if self.loading else None
        done = traffic() if traffic else 0
        while not self._over.wait(self.tick):
            self.idle += 1
            if traffic and (now := traffic()) > done + READING:
                self.idle, done = 0, now
            if self._guardian is not None:
                with contextlib.suppress(OSError):  # it is gone
                    _pipe(self._guardian).write(b".")
            if self.idle * self.tick > self.limit:
                self._end()

    def _end(self) -> None:
        try:
            emit(
                f"\nno progress for {self.limit:g} s (hang_timeout): the stacks of all threads, also in {self.file}:\n"
            )
            with contextlib.suppress(Exception), self.file.open("w") as copy:
                faulthandler.dump_traceback(copy, all_threads=True)
            if sys.__stderr__ is not None:
                with contextlib.suppress(Exception):
                    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        finally:
            os._exit(HANG)  # the main thread hangs and cannot handle an exception


def _pipe(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


def _traffic() -> Callable[[], int] | None:
    """Return a function that counts the bytes this process has read and written; None if the system does not."""
    process = psutil.Process()

    def count() -> int:
        counters = process.io_counters()
        return getattr(counters, "read_chars", counters.read_bytes) + getattr(
            counters, "write_chars", counters.write_bytes
        )

    try:
        count()
    except (AttributeError, psutil.Error, OSError):
        return None
    return count
