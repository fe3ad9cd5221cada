"""The phases of an iteration, without a loop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffalign.runtime.errors import Interrupted
from diffalign.runtime.state import indexed


def collect(trainer: Any, iteration: int = 0) -> Any:
    """Sample, score and assign advantages; return the batch."""
    algorithm = trainer.algorithm
    batch = algorithm.sample(iteration)
    algorithm.score(batch)
    algorithm.advantage(batch)
    return batch


def update(trainer: Any, batch: Any, iteration: int = 0) -> None:
    """Take the optimizer steps of an iteration, without guard, log and checkpoints."""
    state = trainer.loop.state
    for minibatch in trainer.algorithm.minibatches(batch, iteration):
        with trainer.algorithm.updating():
            for micro in minibatch.micros:
                loss, _ = trainer.algorithm.loss(micro)
                trainer.run.accelerator.backward(loss * micro.weight)
        trainer.run.accelerator.clip_grad_norm_(state.parameters, trainer.args.max_grad_norm)
        state.step(None, torch.nan)


def assert_resumes_within_an_iteration(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run after the first of an iteration's two updates; resumed, it must be bit for bit the whole run.

    Args:
        build: Returns a trainer of four steps, two per iteration, for a folder's name and changes.
        monkeypatch: Of the test.
    """
    whole = build("whole")
    whole.train()
    stopped, on_step = build("parts"), type(whole.algorithm).on_step

    def stop(batch: Any, metrics: Any) -> None:
        on_step(stopped.algorithm, batch, metrics)
        if stopped.run.progress.step == 3:
            stopped.run.heartbeat.signals.received = signal.SIGTERM

    monkeypatch.setattr(stopped.algorithm, "on_step", stop)
    with pytest.raises(Interrupted):
        stopped.train()
    assert (stopped.run.progress.step, stopped.run.progress.update) == (3, 1)
    again = build("parts", resume_from_checkpoint="latest")
    again.train()
    for name, tensor in indexed(whole.loop.state.parameters).items():
        assert torch.equal(tensor, indexed(again.loop.state.parameters)[name]), name
