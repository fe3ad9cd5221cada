"""The interface between the training loop and a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Metrics = dict[str, float]


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward and backward pass.

    Attributes:
        rows: (b,) int64, indices into the iteration's data, or into ``data`` where it is given.
        weight: The share of the optimizer step's loss; the loop multiplies the mean loss of the rows by it.
        tag: Which part of the rows' trajectories the pass covers: a step index, or the index of a gradient path.
        data: Rows of other processes that were sent here, or a batch of its own.
    """

    rows: Tensor
    weight: float
    tag: int = 0
    data: Any = None


@dataclass(frozen=True)
class MiniBatch:
    """The micro-batches of one optimizer step.

    Attributes:
        micros: The passes, in order.
        rows: (n,) int64, all samples of this process in the step, those that need no pass included.
        metrics: Figures of the split itself, logged with the step.
    """

    micros: Sequence[MicroBatch]
    rows: Tensor
    metrics: Metrics = field(default_factory=dict)


class Task(Protocol):
    """A training task, as the loop sees it.

    world_size_invariant: whether any number of processes splits an iteration into the same updates. commits: commit of
    each hub repository that was loaded. contents: fingerprints of the local files that the task depends on.
    """

    updates_per_iteration: int
    world_size_invariant: bool
    done: bool
    data_digest: str
    commits: Mapping[str, str]
    contents: Mapping[str, Mapping[str, str]]
    resume_command: str

    def collect(self, iteration: int) -> Metrics:
        """Collect the data of an iteration; return metrics to log."""

    def minibatches(self, iteration: int) -> Iterator[MiniBatch]:
        """Split the iteration's data into optimizer steps, the same way on every call."""

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a micro-batch, without its weight, and metrics."""

    def updating(self) -> AbstractContextManager[None]:
        """Return a context for the forward and backward passes of an optimizer step."""

    def ids(self, minibatch: MiniBatch) -> list[dict[str, Any]]:
        """Identify the samples of an optimizer step, for skipped.jsonl."""

    def collected(self) -> dict[str, Tensor]:
        """Return iteration data for a checkpoint; empty if ``collect`` is reproducible from the current weights.

        The first dimension has the same size on all processes and is gathered over them.
        """

    def recollect(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore the iteration's data from what ``collected`` returned, gathered over the processes that saved it."""

    def evaluate(self, step: int) -> Metrics:
        """Evaluate the EMA weights if there are any, else the policy."""

    def before_first_update(self) -> None:
        """Run checks that must hold before the weights change. Called before each update until one is taken."""

    def after_first_update(self) -> None:
        """Run checks that must hold after the first update."""

    def after_update(self, step: int, metrics: Metrics) -> None:
        """Act on optimizer step ``step`` (from 1); may add to ``metrics``, means over all processes."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state of the task besides weights, optimizer and counters: tensors and JSON values.

        Called after each optimizer step; tensors may be the live ones if only ``after_update`` changes them.
        """

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned."""

    def exporter(self) -> Callable[[Path], object] | None:
        """Return a function that writes the current LoRA into a checkpoint's folder, or None.

        Every process calls ``exporter``; the main process calls its result.
        """

    def finish(self) -> Sequence[Path] | None:
        """Write the results of the run; return the files and folders written, on the main process.

        They go into a manifest that proves the run finished: where one of them is missing or damaged, the next start
        calls ``finish`` again.
        """
