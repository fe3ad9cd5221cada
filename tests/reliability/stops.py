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
from diffalign.runtime.run import Heartbeat

PHASES = {
    "_iterate": "between iterations",
    "sample": "rollout",
    "_samples": "evaluation",
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
        if name == "sample" and "book" in caller.f_locals:  # a collector's: before it scores a batch, and after that
            return ROLLOUT if places[-1].phase == BEFORE_REWARD else BEFORE_REWARD
        if name == "_update":
            first = BETWEEN_UPDATES if trainer.loop.progress.update else BEFORE_UPDATES
            return first if caller.f_locals["micro"] is caller.f_locals["minibatch"].micros[0] else ACCUMULATION
        return PHASES[name]

    class Noted(Heartbeat):
        def __call__(self, collective: bool = False) -> None:
            places.append(Place(len(places), trainer.loop.progress.step, phase(sys._getframe(1))))
            act(len(places) - 1)
            super().__call__(collective)

    trainer.run.heartbeat.__class__ = Noted
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
