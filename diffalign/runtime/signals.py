"""SIGTERM and Ctrl-C: the first asks a run to stop, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """A context in which the first signal is only noted, as ``received``, for the run to stop where it is whole.

    A second one exits at once with 128 + its number; what was saved before stays valid, because checkpoints appear by
    one rename. Outside the main thread Python delivers no signals, and the context does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was set outside Python

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        # os.write and not print: a handler may interrupt a print, whose buffer cannot be entered twice.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving and stopping; once more to stop at once\n".encode())
