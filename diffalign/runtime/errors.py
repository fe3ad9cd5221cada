"""Exceptions that end a run, with exit codes that a scheduler can act on."""

from __future__ import annotations

import signal

# Of sysexits.h: "input/output error", "try again later" and "remote error in protocol", the nearest to what happened.
DISK, HANG, NOT_FINITE = 74, 75, 76


class SaveFailed(OSError):
    """No checkpoint can be written; the message names the folder and the bytes that did not fit."""

    exit_code = DISK


class NotFinite(FloatingPointError):
    """Losses, gradients or weights stayed non-finite; the message names the last good checkpoint."""

    exit_code = NOT_FINITE


class CannotTrain(RuntimeError):
    """A check before or after the first update failed; the message names settings to change."""

    exit_code = 1


class OutOfMemory(RuntimeError):
    """A batch did not fit; the message names settings to change, with numbers to try."""

    exit_code = 1


class StopRequested(Exception):
    """Raised between two micro-batches after a signal; the loop saves and exits."""


class Interrupted(SystemExit):
    """A run was stopped by a signal and is saved: exit code 128 + the signal number, as in shells."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)
