"""Parts of a process that belong to the operating system, and that user code may leave changed."""

from __future__ import annotations

import os
import signal

_TIMERS = tuple(
    getattr(signal, f"ITIMER_{name}") for name in ("REAL", "VIRTUAL", "PROF") if hasattr(signal, "setitimer")
)


def timers() -> tuple[bool, ...]:
    """Return which interval timers run."""
    return tuple(signal.getitimer(timer)[0] > 0 for timer in _TIMERS)


def set_timers(running: tuple[bool, ...]) -> None:
    """End timers that were started meanwhile: without the handler of who did, their signal ends the process."""
    for timer, before in zip(_TIMERS, running, strict=True):
        if not before:
            signal.setitimer(timer, 0)


def umask() -> int | None:
    """Return the mask of new files, where the system tells it without setting it."""
    try:  # the call that returns it also sets it, for all threads
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            return next((int(line.split()[1], 8) for line in file if line.startswith("Umask:")), None)
    except OSError:
        return None


def set_umask(value: int | None) -> None:
    """Set the mask of new files, where it is known."""
    if value is not None:
        os.umask(value)


def blocked_signals() -> frozenset[int]:
    """Return the signals that this thread holds back."""
    return (
        frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ())) if hasattr(signal, "pthread_sigmask") else frozenset()
    )


def open_descriptors() -> tuple[bool, ...]:
    """Return which of the three standard streams are open."""
    return tuple(map(_is_open, range(3)))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def open_again(before: tuple[bool, ...]) -> None:
    """Lead closed standard streams to the null device: a file that took their number would receive the output."""
    for number, was_open in enumerate(before):
        if was_open and not _is_open(number):
            os.open(os.devnull, os.O_RDWR)
