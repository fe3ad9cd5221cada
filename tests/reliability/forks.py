"""Processes that share one start of Python."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm

# A process that has used CUDA, or in which autograd has started its threads, cannot fork: a server that has imported
# everything and done nothing does.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "tests.reliability.faults"])
LIMIT = 60  # seconds; nothing here takes as long


class Child:
    """A function of an importable module in a process of its own; what it prints goes to a file in ``folder``."""

    def __init__(self, folder: Path, function: Callable[..., Any], *arguments: Any, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / f"output{environment.get('RANK', '')}.txt"
        self.process = CONTEXT.Process(target=_enter, args=(str(self.output), environment, function, arguments))
        self.process.daemon = True  # whoever is stopped while it waits takes it along
        self.process.start()

    def kill(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.process.pid, number)

    def wait(self, limit: float = LIMIT) -> int:
        """The exit code; minus the signal's number where one ended it."""
        self.process.join(limit)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {limit} s:\n{self.text}")
        return self.process.exitcode

    def until(self, happened: Callable[[], bool]) -> None:
        """Waits for something that the process does."""
        last = time.monotonic() + LIMIT
        while not happened():
            assert self.process.is_alive() or happened(), f"it is gone:\n{self.text}"
            assert time.monotonic() < last, f"it waits for something:\n{self.text}"
            time.sleep(0.002)

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def _enter(output: str, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(handle, 1), os.dup2(handle, 2)
    for name in ("stdout", "stderr"):  # what pytest had put there
        stream = open(1 if name == "stdout" else 2, "w", buffering=1, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream), setattr(sys, f"__{name}__", stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared between processes, and held for ever by one that was killed
    AcceleratorState._reset_state(reset_partial_state=True)
    function(*arguments)


def several(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Child]:
    """The same function in connected processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    # Else accelerate gives each its share of the cores, and threads of the process that forked are gone here.
    common |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Child(folder, function, *arguments, **common, **rank) for rank in ranks]


def finished(count: int, folder: Path, function: Callable[..., Any], *arguments: Any, limit: float = 240) -> Path:
    """The folder into which connected processes have written; ``function`` takes it first."""
    children = several(count, folder, function, folder, *arguments)
    assert [child.wait(limit) for child in children] == [0] * count, "\n".join(child.text for child in children)
    return folder
