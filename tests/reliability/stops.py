"""Stops a trainer between any two of its micro-steps, and lets it go on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest

from diffalign.runtime.errors import Interrupted

PHASES = {
    "_collect": "between iterations",
    "collect": "rollout",
    "_images": "evaluation",
}
BEFORE_REWARD, ROLLOUT = "before reward", "rollout"
BEFORE_UPDATES, BETWEEN_UPDATES, ACCUMULATION = "before the updates", "between updates", "accumulation"


@dataclass(frozen=True)
class Place:
    """Where a run can be stopped: the number of the micro-step, and what the run was about to do."""

    number: int
    step: int
    phase: str


class Killed(BaseException):
    """Not an Exception: nothing is saved, as when the process is gone."""


def watched(trainer: Any, act: Callable[[int], None]) -> list[Place]:
    """Calls ``act`` with its number before every micro-step; the list fills while the trainer runs."""
    places: list[Place] = []

    def phase(caller: FrameType) -> str:
        name = caller.f_code.co_name
        if name == "__call__":  # a collector's: before it scores a batch, and before it draws the next one
            return ROLLOUT if places[-1].phase == BEFORE_REWARD else BEFORE_REWARD
        if name == "_passes":
            first = BETWEEN_UPDATES if trainer.loop.progress.update else BEFORE_UPDATES
            return ACCUMULATION if caller.f_locals["index"] else first
        return PHASES[name]

    pulse = trainer.run.heartbeat

    def wrapped(together: bool = False) -> None:
        places.append(Place(len(places), trainer.loop.progress.step, phase(sys._getframe(1))))
        act(len(places) - 1)
        pulse(together)

    trainer.run.heartbeat = wrapped
    trainer.outputs.evaluation.pulse = wrapped
    return places


def stop_at(trainer: Any, number: int) -> None:
    """Trains until a signal comes before this micro-step; the run saves and leaves."""

    def act(now: int) -> None:
        if now == number:
            trainer.run.heartbeat.signals.received = signal.SIGTERM

    watched(trainer, act)
    with pytest.raises(Interrupted) as left:
        trainer.train()
    assert left.value.code == 128 + signal.SIGTERM


def kill_at(trainer: Any, number: int) -> None:
    """Trains until the process is gone before this micro-step."""

    def act(now: int) -> None:
        if now == number:
            raise Killed

    watched(trainer, act)
    with pytest.raises(Killed):
        trainer.train()


def crash_before(trainer: Any, iteration: int) -> None:
    """Trains until the data of an iteration are asked for; then the run ends as by a fault in it."""
    sample = trainer.algorithm.sample

    def crash(number: int) -> Any:
        if number == iteration:
            raise Killed
        return sample(number)

    trainer.algorithm.sample = crash
    with pytest.raises(Killed):
        trainer.train()
