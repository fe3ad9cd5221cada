"""Log messages of the package: plain lines on the terminal, and a log file in the run folder."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import warnings
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from accelerate.logging import MultiProcessAdapter
from accelerate.logging import get_logger as accelerate_logger
from accelerate.state import PartialState
from tqdm.auto import tqdm

LOG_FILE = "train.log"
PACKAGE = "diffalign"
FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Logger(MultiProcessAdapter):  # type: ignore[misc]  # accelerate has no types
    """Accelerate's logger, but usable before an ``Accelerator`` exists, and without the rank of the main process.

    Messages are those of the main process unless ``main_process_only=False``.
    """

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Prefix the rank of other processes than the main one."""
        rank = _rank()
        return (f"[rank {rank}] {msg}" if rank else msg), kwargs

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Log a message; see ``accelerate.logging``."""
        if PartialState._shared_state:
            super().log(level, msg, *args, **kwargs)
            return
        kwargs.pop("in_order", None)
        if self.isEnabledFor(level) and (not kwargs.pop("main_process_only", True) or _rank() == 0):
            msg, kwargs = self.process(msg, kwargs)  # type: ignore[assignment]
            self.logger.log(level, msg, *args, **kwargs)


def get_logger(name: str) -> Logger:
    """Return the logger of a module of the package; ``ACCELERATE_LOG_LEVEL`` sets its level, INFO without it."""
    package = logging.getLogger(PACKAGE)
    if not any(isinstance(handler, TerminalHandler) for handler in package.handlers):
        package.addHandler(TerminalHandler())
        package.setLevel(logging.INFO)
        package.propagate = False  # handlers of an application would print every line twice
    return Logger(accelerate_logger(name).logger, {})


@contextlib.contextmanager
def log_to_file(folder: str | Path) -> Iterator[None]:
    """Append messages and warnings to ``train.log`` in a folder, on the main process; they are still printed.

    A disk that refuses lines costs these lines only.
    """
    path = Path(folder) / LOG_FILE
    if _rank() or not _is_appendable(path):
        yield
        return
    package, handler = logging.getLogger(PACKAGE), FileHandler(path)
    package.addHandler(handler)
    try:
        with _copied_warnings(handler):
            yield
    finally:
        package.removeHandler(handler)
        handler.close()


class TerminalHandler(logging.Handler):
    """Print information as it is on standard output, and ``warning: ...`` on standard error, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; without a reader it is dropped."""
        with contextlib.suppress(OSError, ValueError):
            plain, text = record.levelno == logging.INFO, record.getMessage()
            stream = sys.stdout if plain else sys.stderr
            text = text if plain else f"{record.levelname.lower()}: {' '.join(text.split())}"
            encoding = getattr(stream, "encoding", None) or "utf-8"
            tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


class FileHandler(logging.Handler):
    """Append each record to a file, which is opened for it: the file may be moved or rotated meanwhile."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.setFormatter(logging.Formatter(FILE_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record, or drop it."""
        with contextlib.suppress(OSError, ValueError):
            if _is_appendable(self.path):
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(self.format(record) + "\n")


@contextlib.contextmanager
def _copied_warnings(handler: logging.Handler) -> Iterator[None]:
    """Send each warning to a handler too. ``logging.captureWarnings`` would hide it from whoever records warnings."""
    before = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        text = " ".join(str(message).split())
        handler.handle(logging.LogRecord(category.__name__, logging.WARNING, filename, lineno, text, (), None))
        before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        if warnings.showwarning is show:
            warnings.showwarning = before


def _is_appendable(path: Path) -> bool:
    """Return whether a path is a regular file or does not exist: a pipe would block, a link could lead anywhere."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _rank() -> int:
    """Return the rank of this process, known before accelerate's state is."""
    state = PartialState._shared_state
    return PartialState().process_index if state else int(os.environ.get("RANK", "0"))
