"""Standard output and error that neither end nor block a run if they are closed or not read."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import sys
from collections.abc import Iterator
from typing import Any

CHUNK = 4096  # bytes that a writable pipe accepts without blocking
PATIENCE = 1.0  # seconds to wait for a reader before text is dropped


class SteadyStream:
    """A text stream whose ``write`` and ``flush`` never raise OSError and never wait for a reader for long.

    Text is dropped if the pipe or terminal is closed, the disk is full, or the reader has stopped reading. After such
    an error the descriptor leads to the null device, so that writes of libraries cannot fail either.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._waits = PATIENCE
        self._pipe = self._is_pipe()

    def _is_pipe(self) -> bool:
        try:
            return not stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode)
        except (OSError, ValueError, AttributeError):  # no descriptor: a stream in memory, or one that is closed
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        with contextlib.suppress(ValueError):  # closed
            try:
                self._stream.write(text) if not self._pipe else self._send(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except OSError as error:
                self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what waits."""
        try:
            if not self._pipe:
                self._stream.flush()
        except ValueError:
            pass
        except OSError as error:
            self._lost(error)

    def _send(self, text: str) -> None:
        content = text.encode(self._stream.encoding or "utf-8", "backslashreplace")
        for start in range(0, len(content), CHUNK):
            ready = select.select([], [self._stream.fileno()], [], self._waits)[1]
            self._waits = PATIENCE if ready else 0.0  # wait once for a reader that has stopped
            if not ready:
                return
            os.write(self._stream.fileno(), content[start : start + CHUNK])

    def _lost(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            return
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Make ``sys.stdout`` and ``sys.stderr`` steady within the context."""
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    sys.stdout, sys.stderr = (s if isinstance(s, SteadyStream) else SteadyStream(s) for s in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _open_standard_descriptors() -> None:
    """Open the null device for 0, 1 and 2 if they are closed: the next file opened would receive the output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def emit(text: str) -> None:
    """Write to standard error from a signal handler or a thread, without a buffer and without waiting."""
    stream = sys.__stderr__
    if stream is None:  # closed when the process started
        return
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [stream.fileno()], [], 0)[1]:
            os.write(stream.fileno(), text.encode("utf-8", "replace")[:CHUNK])
