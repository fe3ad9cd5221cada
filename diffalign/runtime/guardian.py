"""Watch a run from a separate process, and end it if the watchdog's thread stops sending ticks.

    python guardian.py PID DUMP_SIGNAL LIMIT TICK FILE     a tick of the run arrives as a byte on standard input

It imports the standard library only, to start fast and take little memory. It ends with the run.
"""

from __future__ import annotations

import os
import select
import signal
import sys

GRACE = 1.0  # seconds beyond the limit, so that the watchdog's own thread can exit first, with its exit code


def suspended(pid: int) -> bool:
    """Return whether a process is stopped (SIGSTOP, SIGTSTP, a debugger)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def watch(pid: int, limit: float, tick: float) -> bool:
    """Count ticks without a byte; return True after too many, False when the run is over."""
    silent = 0
    while silent * tick <= limit + GRACE:
        if select.select([0], [], [], tick)[0]:
            if not os.read(0, 4096):
                return False
            silent = 0
        elif os.getppid() != pid:
            return False
        elif not suspended(pid):
            silent += 1
    return True


def stacks(pid: int, dump: int, tick: float) -> bytes:
    """Read the stacks of the run's threads, which its C code writes on a signal, without the GIL."""
    if not dump:
        return b""
    os.kill(pid, dump)
    found = b""
    while select.select([0], [], [], max(tick, 0.5))[0] and (part := os.read(0, 65536)):
        found += part
    return found.lstrip(b".")


def main() -> None:
    """Watch until the run is over, or end it."""
    pid, dump, limit, tick, file = int(sys.argv[1]), int(sys.argv[2]), *map(float, sys.argv[3:5]), sys.argv[5]
    if not watch(pid, limit, tick) or os.getppid() != pid:
        return
    try:
        found = stacks(pid, dump, tick)
        with open(file, "wb") as copy:
            copy.write(found)
        text = f"\nno progress for {limit:g} s (hang_timeout), and Python's lock is held: stacks, also in {file}:\n"
        os.write(2, text.encode("utf-8", "replace") + found)
    finally:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
