"""Signals that stop a run: Ctrl-C, SIGTERM, a closed terminal (SIGHUP) and Slurm's warnings (SIGUSR1, SIGUSR2)."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from diffalign.runtime.output import emit

STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows has two of them
)
# Only these, sent twice, end a run at once. A closing terminal sends SIGHUP more than once, and Slurm sends SIGTERM
# some time after its warning: neither must cut the save short.
FORCING = (signal.SIGTERM, signal.SIGINT)


def _ignored(number: int) -> bool:
    """Return whether the parent process set SIGHUP to be ignored, as nohup does."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN


def exit_on_signals() -> None:
    """Exit with 128 + the signal's number on any of ``STOPPING``; for the time before a run, which saves nothing."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            if not _ignored(number) and number != signal.SIGINT:  # Ctrl-C raises KeyboardInterrupt already
                signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


class Signals:
    """Context that records the first signal, so that the run can stop after a whole optimizer step.

    A second one of ``FORCING`` exits at once with 128 + its number; saved checkpoints stay valid, because they appear
    by one rename. Outside the main thread Python delivers no signals, and the context does nothing.

    Attributes:
        received: The first signal; None without.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._forced = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.received, self._forced = None, 0
        if threading.current_thread() is threading.main_thread():
            numbers = [number for number in STOPPING if not _ignored(number)]
            self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was set outside Python

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._forced += number in FORCING
        if self._forced > 1:
            os._exit(128 + number)
        if self.received is None:
            self.received = number
            # Not print: a handler may interrupt a print, whose buffer cannot be entered twice.
            emit(f"\n{signal.Signals(number).name}: saving and stopping; Ctrl-C or SIGTERM again to stop at once\n")
