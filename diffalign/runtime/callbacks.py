"""Callbacks of a training: act on steps, evaluations and checkpoints, and stop, save or evaluate early."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.runtime.run import Run


@dataclass(frozen=True)
class TrainerState:
    """Where a training stands, with the names of transformers' ``TrainerState``.

    Attributes:
        global_step: Optimizer steps taken or skipped.
        max_steps: ``max_train_steps`` of the run.
        iteration: Iterations finished.
        is_world_process_zero: Whether this is the main process.
    """

    global_step: int
    max_steps: int
    iteration: int
    is_world_process_zero: bool


@dataclass
class TrainerControl:
    """Requests to the loop. With several processes a request of any one holds for all, after the next optimizer step.

    Attributes:
        should_training_stop: End the training after this step, with its last evaluation and its exports.
        should_evaluate: Evaluate at the end of this iteration.
        should_save: Write a checkpoint at the end of this iteration.
    """

    should_training_stop: bool = False
    should_evaluate: bool = False
    should_save: bool = False


class TrainerCallback:
    """Base class of callbacks, named and called as those of transformers; override the events of interest.

    All processes call all events, but ``on_save``, which the main process calls. Metrics are those over all processes.
    An exception ends the training, after its last step is saved. More keywords may come: accept ``**kwargs``.

    Args of all events:
        args: The configuration of the run.
        state: Where the training stands.
        control: Requests to the loop.
        model: The ``DiffusionModel`` (keyword).
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act before the first step; a resumed run begins at the step of its checkpoint."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act after an optimizer step. metrics (keyword): its row of metrics.jsonl."""

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act after an evaluation. metrics (keyword): its figures, with the names ``eval/...``."""

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act after a checkpoint is complete on disk. path (keyword): its folder."""

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Act after the exports are written, also if an earlier process wrote them; not after an error or a signal."""


class Callbacks:
    """The callbacks of a run, called in order.

    Attributes:
        control: Requests of this process that the loop has not seen.
        agreed: Requests that hold for all processes, and are not carried out.
    """

    def __init__(self, run: Run[Any], callbacks: Sequence[TrainerCallback]) -> None:
        for callback in callbacks:
            if not isinstance(callback, TrainerCallback):
                kind = callback.__name__ if isinstance(callback, type) else type(callback).__name__
                hint = f"pass an instance, {kind}()" if isinstance(callback, type) else "derive its class from it"
                raise TypeError(f"callbacks: {kind} is no instance of diffalign.TrainerCallback: {hint}")
        self.run, self.callbacks = run, list(callbacks)
        self.control, self.agreed = TrainerControl(), TrainerControl()

    def __call__(self, event: str, **kwargs: Any) -> None:
        """Call an event of every callback."""
        run, progress = self.run, self.run.progress
        state = TrainerState(progress.step, run.config.max_train_steps, progress.iteration, run.is_main)
        for callback in self.callbacks:
            getattr(callback, event)(run.config, state, self.control, model=run.model, **kwargs)
        if run.world == 1:
            self.agree(self.asked())

    def asked(self) -> tuple[bool, ...]:
        """Return this process's requests, in the order of ``TrainerControl``."""
        return dataclasses.astuple(self.control)

    def agree(self, requests: Sequence[bool]) -> None:
        """Note the requests of all processes, and forget this process's."""
        both = zip(dataclasses.astuple(self.agreed), requests, strict=True)
        self.agreed, self.control = TrainerControl(*(old or new for old, new in both)), TrainerControl()

    def take(self) -> TrainerControl:
        """Return the agreed requests, which are carried out now; that to stop stays."""
        agreed, self.agreed = self.agreed, TrainerControl(self.agreed.should_training_stop)
        return agreed
