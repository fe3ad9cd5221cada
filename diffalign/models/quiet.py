"""What diffusers and transformers log while they load: kept from users where this package has settled the matter."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

LIBRARIES = {"diffusers": diffusers_logging, "transformers": transformers_logging, "peft": None}
# Said of every model, and true of none: casting parts without float32 modules, and LoRAs of a denoiser alone.
NOISE = (
    re.compile(r"should be kept in float32: \[\]"),
    re.compile(r"No LoRA keys associated"),
    re.compile(r"was truncated because"),
    re.compile(r"Token indices sequence length is longer"),
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
    """Within this context no progress bars are shown, and what the libraries log is collected in what this yields."""
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
    """Warn of what the libraries logged, less what is known as noise; ``source`` names the file or model.

    ValueError: weights that were not found, and are random numbers instead.
    """
    kept = [line[:LONGEST] for line in dict.fromkeys(lines) if not any(noise.search(line) for noise in NOISE)]
    if random := [line for line in lines if RANDOM.search(line)]:
        raise ValueError(f"{source}: weights are missing, copy it again ({random[0][:LONGEST]})")
    for line in kept:
        warnings.warn(f"{source}: {line}", stacklevel=3)


def no_bars() -> None:
    """Turn off the bars of diffusers and transformers, which nest while a pipeline loads; downloads keep theirs."""
    for library in LIBRARIES.values():
        if library is not None:
            library.disable_progress_bar()
