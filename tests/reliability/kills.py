"""Kills a training at random moments, over and over.

The training is the null task in the real loop, with every write, fsync and rename of its checkpoints, its log and its
lock. Each process is a fork of one that has imported everything, goes on from what the one before it left, and is
killed by SIGKILL: three times in four within 60 ms after a save has returned (in steps, in later saves, while old
checkpoints are removed), else at any time from its first instruction to its first save (while it takes the folder over,
reads, sweeps and rewinds).
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
import time
from pathlib import Path

import torch

from diffalign.runtime import checkpoint
from tests.reliability import faults
from tests.reliability.compare import rows
from tests.reliability.forks import Child

AFTER_SAVE = 0.06  # seconds
FIRST_SAVE = 0.3  # seconds, where none has been timed
Kill = dict[str, float]


def kill(folder: Path, number: int, first_save: float = FIRST_SAVE) -> Kill:
    """One kill, after which the newest checkpoint must be sound, and no older than the last save that had returned.

    number: of the kill, from 0; it decides the moment. first_save: the seconds from a start to a save. Returns
    the measured time to the first save, to pass to the next kill, and the core-seconds that this one took.
    """
    rng, spent = random.Random(number), cpu()
    before, started = len(_saved(folder)), time.monotonic()
    child, found = Child(folder, faults.keeps_on, str(folder), 10**6), {}
    if before and number % 4 == 3:
        time.sleep(rng.uniform(0, first_save))
    else:
        child.until(lambda: len(_saved(folder)) > before)
        found["first_save"] = time.monotonic() - started
        time.sleep(rng.uniform(0, AFTER_SAVE))
    child.kill(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    newest = checkpoint.latest(folder)
    assert newest is not None
    assert checkpoint.load(newest)[1]["step"] >= _saved(folder)[-1], "a save that had returned was lost"
    return {**found, "step": _saved(folder)[-1], "cpu": cpu() - spent}


def same_in_the_end(folder: Path) -> None:
    """Lets a copy of the run end, and compares it with one that was never interrupted: equal bit for bit, rows too."""
    last = checkpoint.load(checkpoint.latest(folder))[1]["step"] + 2
    ended, straight = (folder.with_name(f"{folder.name}-{kind}-{last}") for kind in ("ended", "straight"))
    shutil.copytree(folder, ended, dirs_exist_ok=True)
    for place, every in ((ended, 2), (straight, last)):
        child = Child(place, faults.keeps_on, str(place), last, every)
        assert child.wait(600) == 0, child.text
    (tensors, state), (others, other) = (checkpoint.load(checkpoint.latest(place)) for place in (ended, straight))
    assert state["step"] == other["step"] == last
    assert state["guard"] == other["guard"]
    assert tensors.keys() == others.keys()
    assert all(torch.equal(t, others[g][n]) for g, named in tensors.items() for n, t in named.items())
    assert rows(ended) == rows(straight)


def _saved(folder: Path) -> list[int]:
    """The steps of the saves that have returned; a kill may cut the last line short."""
    path = folder / "saved.txt"
    return [int(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def cpu() -> float:
    """The core-seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
