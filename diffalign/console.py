"""What the command line does to its output: one line per warning, no bars of libraries, no traceback for ``| head``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

READER_LEFT = 128 + 13  # as a shell reports a process that SIGPIPE ended
LIBRARIES = ("diffusers", "transformers", "huggingface_hub", "datasets", "accelerate", "peft", "torch")


@contextmanager
def closing_pipes(active: bool = True) -> Iterator[None]:
    """End quietly where the reader of the output has left: SystemExit with 141.

    active: false for what must go on without a reader, as a training.
    """
    if not active:
        yield
        return
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:
        with suppress(OSError, ValueError, AttributeError):
            # The interpreter flushes once more when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(READER_LEFT) from error


def say(text: str) -> None:
    """Print a line for a person; without a reader it is lost, and the work goes on."""
    with suppress(OSError, ValueError):
        print(text, flush=True)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print each warning as ``warning: ...``, without the line of code that raised it."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


class OneLine(logging.Formatter):
    """A record of a library as ``warning: ...``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record on one line."""
        return f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}"


class Once(logging.Filter):
    """Drops a message that was printed before."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is new."""
        text = record.getMessage()
        known = text in self.seen
        self.seen.add(text)
        return not known


def one_line_logs() -> None:
    """Turn the loading bars of libraries off, and their log into single lines, each once."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported
    from diffalign.models.quiet import no_bars

    no_bars()
    for name in LIBRARIES:
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(OneLine())
            if not any(isinstance(known, Once) for known in handler.filters):
                handler.addFilter(Once())
