"""What the processes of these tests do: functions that a fork can find by name."""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from diffalign import cli
from diffalign.log import get_logger
from diffalign.runtime import checkpoint, lock
from diffalign.runtime.errors import NotFinite, SaveFailed
from diffalign.trainers import base
from tests.reliability.null import NullTrainer, run

CALLS = [(os, name) for name in ("mkdir", "rename", "fsync", "open", "unlink", "rmdir", "chmod")]
CALLS += [(Path, "open"), (checkpoint, "save_file")]


def guarded(folder: str, hook=None, **changes) -> None:
    """A run with the exit codes of the command line."""
    try:
        run(Path(folder), hook, **changes)
    except (SaveFailed, NotFinite) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def dies_at_every_call(target: str, keep: int) -> None:
    """For each call to the file system of the save at step 6, a folder in which a process died just before it.

    The folder "before" holds the state before the save, "done" the state after it.
    """
    root, original = Path(target), checkpoint.save

    def save(folder, step, *args, **kwargs):
        if step < 6:
            return original(folder, step, *args, **kwargs)
        shutil.copytree(folder, root / "before")
        for at in itertools.count(1):
            shutil.copytree(folder, root / str(at))
            if (pid := os.fork()) == 0:
                _die_before(at)
                original(root / str(at), step, *args, **kwargs)
                os._exit(1)
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1:
                os.rename(root / str(at), root / "done")
                os._exit(0)
        return None

    checkpoint.save = save
    run(root / "run", checkpointing_steps=2, checkpoints_total_limit=keep)


def _die_before(at: int) -> None:
    calls = itertools.count(1)

    def wrap(call):
        def wrapped(*args, **kwargs):
            if next(calls) == at:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapped

    for module, name in CALLS:
        setattr(module, name, wrap(getattr(module, name)))


def keeps_on(target: str, steps: int, every: int = 2) -> None:
    """Saves at every second step, or less often, and notes each save that has returned."""
    report = os.open(f"{target}/saved.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    task = None
    original = checkpoint.save

    def save(folder, step, *args, **kwargs):
        path = original(folder, step, *args, **kwargs)
        os.write(report, f"{step}\n".encode())
        return path

    checkpoint.save = save
    task = run(Path(target), max_train_steps=steps, checkpointing_steps=every, eval_steps=0, lr_scheduler="constant")
    assert task.loop.progress.step == steps


def small_disk(target: str, limit: int, steps: int) -> None:
    """No file can be larger than ``limit`` bytes from the first save on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def hook(phase: str, task: NullTrainer) -> None:
        if phase == "save" and task.loop.progress.step >= 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    guarded(target, hook, width=64, max_train_steps=steps, checkpointing_steps=2)


def holds(target: str) -> None:
    """Keeps the folder until it is killed."""
    with lock.claimed(Path(target)):
        print("held", flush=True)
        time.sleep(1000)


def signalled(target: str, phase: str, number: int, second: float | None = None) -> None:
    """Sends itself a real signal at the second time that a phase begins, and a ``second`` one so much later."""
    seen = 0

    def hook(name: str, task: NullTrainer) -> None:
        nonlocal seen
        seen += name == phase
        if name == phase and seen == 2:
            os.kill(os.getpid(), number)
            if second is not None:
                time.sleep(second)
                os.kill(os.getpid(), number)
                time.sleep(100)

    run(Path(target), hook)


def signals_one(target: str, number: int = signal.SIGTERM) -> None:
    """Stop process 1 of two in the middle of an update."""
    seen = 0

    def hook(name: str, task: NullTrainer) -> None:
        nonlocal seen
        seen += name == "backward"
        if name == "backward" and seen == 6 and task.loop.run.accelerator.process_index == 1:
            os.kill(os.getpid(), number)

    run(Path(target), hook)


def hangs(target: str, limit: float) -> None:
    """A reward that never answers."""

    def hook(phase: str, task: NullTrainer) -> None:
        if phase == "score" and task.loop.progress.step == 4:
            a_reward_that_hangs()

    run(Path(target), hook, hang_timeout=limit)


def a_reward_that_hangs() -> None:
    time.sleep(1000)


def bad_on_one(target: str, bad_steps: list[int]) -> None:
    """The gradient of process 1 (of the only one, if it is alone) is infinite at some steps."""

    def hook(phase: str, task: NullTrainer) -> None:
        task.loop.state.parameters[0].register_hook(poison) if not hasattr(task, "poisoned") else None
        task.poisoned = True
        if phase == "backward":
            state["bad"] = task.loop.progress.step in bad_steps and (
                task.loop.run.accelerator.process_index == task.loop.run.accelerator.num_processes - 1
            )

    state = {"bad": False}

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.inf if state["bad"] else gradient

    guarded(target, hook)


def in_two(target: str) -> None:
    """A plain run, in any number of processes."""
    run(Path(target))


def stops_slowly(target: str) -> None:
    """A run whose save takes long enough to be hit."""

    def hook(phase: str, task: NullTrainer) -> None:
        if phase == "backward" and task.loop.progress.step == 4:
            print("going", flush=True)
            time.sleep(0.3)
        if phase == "save":
            time.sleep(0.3)

    run(Path(target), hook, max_train_steps=6, lr_scheduler="constant", checkpointing_steps=2)


def loads(number: int) -> None:
    """Stop the command line while the model loads."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def slow(*args: object, **options: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(20)

    base.Trainer.__init__ = slow
    sys.exit(cli.main(["train", "flow_grpo"]))


def _closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


READERS = {
    "a closed pipe": _closed_pipe,
    "a full disk": lambda: os.open("/dev/full", os.O_WRONLY),
    "none": None,
}


def to_nobody(target: str, reader: str) -> None:
    """A run whose output leads to where nobody reads it, from its first line on."""
    make = READERS[reader]
    for number, name in ((1, "stdout"), (2, "stderr")):
        if make is None:
            os.close(number)
            setattr(sys, name, None), setattr(sys, f"__{name}__", None)
        else:
            os.dup2(make(), number)
    run(Path(target), lambda phase, task: get_logger("diffalign.faults").info(phase * 500))


def holds_the_lock_of_python(target: str, limit: float) -> None:
    """A reward that hangs in C code and lets no other thread run."""

    def hook(phase: str, task: NullTrainer) -> None:
        if phase == "score" and task.loop.progress.step == 4:
            ctypes.PyDLL(None).sleep(1000)

    run(Path(target), hook, hang_timeout=limit)


def waits(target: str, limit: float) -> None:
    """A run that says when it waits, for less than its limit."""

    def hook(phase: str, task: NullTrainer) -> None:
        if phase == "score" and task.loop.progress.step == 4:
            Path(target, "waiting").touch()
            time.sleep(0.3)

    run(Path(target), hook, hang_timeout=limit)
