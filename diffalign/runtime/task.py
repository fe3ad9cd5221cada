"""What the loop asks of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Metrics = dict[str, float]
Micro = Callable[[], tuple[Tensor, dict[str, Tensor]]]


class Task(Protocol):
    """What a trainer gives to the loop.

    world_size_invariant: whether any number of processes splits an iteration into the same updates. commits: of the
    repositories of the hub that it has loaded, by their names. contents: fingerprints of the local files it depends on.
    """

    updates_per_iteration: int
    world_size_invariant: bool
    done: bool
    data_digest: str
    commits: Mapping[str, str]
    contents: Mapping[str, Mapping[str, str]]
    resume_command: str

    def collect(self, iteration: int) -> Metrics:
        """Prepares the data of an iteration; returns what to log of it."""

    def updates(self, iteration: int) -> Iterator[Sequence[Micro]]:
        """Per optimizer step, its micro-batches: each a call that returns a loss, already weighted, and metrics.

        The same data give the same updates, however often it is asked.
        """

    def updating(self) -> AbstractContextManager[None]:
        """A context around the passes of an optimizer step, forward and backward."""

    def samples(self) -> list[dict[str, Any]]:
        """What tells the samples of the current update from all others, for the record of a step not taken."""

    def collected(self) -> dict[str, Tensor]:
        """What ``collect`` prepared with weights that have moved since; empty where it would do the same again.

        The first dimension is of equal size on all processes, which it is gathered over.
        """

    def recollect(self, iteration: int, tensors: Mapping[str, Tensor]) -> None:
        """Prepares the iteration's data from what ``collected`` gave, gathered over all processes of then."""

    def evaluate(self, step: int) -> Metrics:
        """Figures of the averaged weights where there are any, else of the policy."""

    def before_first_update(self) -> None:
        """Checks that must hold when the weights have not moved yet; raises where they do not.

        Called before each update until one is taken, and not skipped.
        """

    def after_first_update(self) -> None:
        """Checks that must hold once they have."""

    def after_update(self, step: int, metrics: Metrics) -> None:
        """Follows optimizer step number ``step`` (from 1), with its figures over all processes, which it may add to."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold besides weights, optimizer and counters: tensors, and what JSON can hold.

        Asked for after each optimizer step; tensors may be the live ones if only ``after_update`` changes them.
        """

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""

    def exporter(self) -> Callable[[Path], object] | None:
        """What writes into a checkpoint's folder what other programs load: the LoRA as it is now.

        All processes ask for it, and the main one calls it.
        """

    def finish(self) -> Sequence[Path] | None:
        """Write the results of the run; return the files and folders written, on the main process.

        They go into a manifest that proves the run finished: where one of them is missing or damaged, the next start
        calls ``finish`` again.
        """
