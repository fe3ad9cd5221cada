"""Read and restore operating-system state of the process: timers, umask, signals, standard streams."""

from __future__ import annotations

import os
import signal

_TIMERS = tuple(
    getattr(signal, f"ITIMER_{name}") for name in ("REAL", "VIRTUAL", "PROF") if hasattr(signal, "setitimer")
)


def timers() -> tuple[bool, ...]:
    """Return which interval timers are running."""
    return tuple(signal.getitimer(timer)[0] > 0 for timer in _TIMERS)


def set_timers(running: tuple[bool, ...]) -> None:
    """Stop timers that user code started: without its handler, their signal would end the process."""
    for timer, before in zip(_TIMERS, running, strict=True):
        if not before:
            signal.setitimer(timer, 0)


def umask() -> int | None:
    """Return the umask, or None on systems where reading it would set it."""
    try:  # os.umask would set it for all threads
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            return next((int(line.split()[1], 8) for line in file if line.startswith("Umask:")), None)
    except OSError:
        return None


def set_umask(value: int | None) -> None:
    """Set the umask; None does nothing."""
    if value is not None:
        os.umask(value)


def blocked_signals() -> frozenset[int]:
    """Return the signals that this thread blocks."""
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
    """Reopen closed standard streams on the null device: a file with their number would receive the output."""
    for number, was_open in enumerate(before):
        if was_open and not _is_open(number):
            os.open(os.devnull, os.O_RDWR)
