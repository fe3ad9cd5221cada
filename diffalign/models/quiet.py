"""Filter what diffusers, transformers and peft log while loading."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

LIBRARIES = {"diffusers": diffusers_logging, "transformers": transformers_logging, "peft": None}
# Messages without consequence: casts of components without float32 modules, LoRAs of the denoiser alone, and
# truncated prompts, which the prompt cache reports itself.
NOISE = (
    re.compile(r"should be kept in float32: \[\]"),
    re.compile(r"No LoRA keys associated"),
    re.compile(r"was truncated because"),
    re.compile(r"Token indices sequence length is longer"),
    re.compile(r"have to be in `processor_kwargs` dict"),
)
RANDOM = re.compile("newly initialized")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
LONGEST = 500


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.lines.append(" ".join(ESCAPES.sub("", record.getMessage()).split()))


@contextmanager
def quiet_libraries() -> Iterator[list[str]]:
    """Hide progress bars and collect the libraries' log messages in the list that this context yields."""
    collector = _Collector()
    loggers = {name: logging.getLogger(name) for name in LIBRARIES}
    handlers = {name: (logger.handlers, logger.propagate) for name, logger in loggers.items()}
    bars = [library for library in LIBRARIES.values() if library is not None and library.is_progress_bar_enabled()]
    try:
        for logger in loggers.values():
            logger.handlers, logger.propagate = [collector], False
        for library in bars:
            library.disable_progress_bar()
        yield collector.lines
    finally:
        for name, logger in loggers.items():
            logger.handlers, logger.propagate = handlers[name]
        for library in bars:
            library.enable_progress_bar()


def pass_on(source: object, lines: list[str]) -> None:
    """Warn of collected log messages, except known noise.

    Args:
        source: File or model to name in the messages.
        lines: Messages of ``quiet_libraries``.

    Raises:
        ValueError: Missing weights were randomly initialised.
    """
    kept = [line[:LONGEST] for line in dict.fromkeys(lines) if not any(noise.search(line) for noise in NOISE)]
    if random := [line for line in lines if RANDOM.search(line)]:
        raise ValueError(f"{source}: weights are missing, copy it again ({random[0][:LONGEST]})")
    for line in kept:
        warnings.warn(f"{source}: {line}", stacklevel=3)


def no_bars() -> None:
    """Disable the nested loading bars of diffusers and transformers; download bars stay."""
    for library in LIBRARIES.values():
        if library is not None:
            library.disable_progress_bar()
