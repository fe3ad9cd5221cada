"""Interfaces of the training loop to algorithms and to the outputs of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL.Image import Image
from torch import Tensor

Metrics = dict[str, float]
State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and JSON values


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward and backward pass.

    Attributes:
        rows: (b,) int64, indices into ``data``.
        weight: The share of the optimizer step's loss; the loop multiplies the mean loss of the rows by it.
        data: What the rows index: the iteration's batch, or rows that other processes sent.
        tag: Which part of the rows' trajectories the pass covers, such as the index of a gradient path.
    """

    rows: Tensor
    weight: float
    data: Any
    tag: int = 0


@dataclass(frozen=True)
class MiniBatch:
    """The micro-batches of one optimizer step.

    Attributes:
        micros: The passes, in order.
        rows: (n,) int64, all samples of this process in the step, those that need no pass included.
        metrics: Metrics of the split itself, logged with the step.
    """

    micros: Sequence[MicroBatch]
    rows: Tensor
    metrics: Metrics = field(default_factory=dict)


@dataclass
class IterationBatch:
    """Base class of the data of an iteration.

    Attributes:
        metrics: Metrics of the data, logged with its optimizer steps.
    """

    metrics: Metrics = field(default_factory=dict, kw_only=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the data for a checkpoint; empty if ``sample`` reproduces them from the current weights.

        The first dimension has the same size on all processes and is gathered over them.
        """
        return {}

    def ids(self, rows: Tensor) -> list[dict[str, Any]]:
        """Identify samples, for skipped.jsonl."""
        return []


B = TypeVar("B", bound=IterationBatch)


class LoopAlgorithm(Protocol[B]):
    """An algorithm, as the loop calls it. ``trainers.algorithm.Algorithm`` documents the members.

    An iteration is ``sample``, ``score``, ``advantage``, and an optimizer step per minibatch.
    """

    updates_per_iteration: int
    world_size_invariant: bool

    @property
    def done(self) -> bool: ...  # noqa: D102

    def sample(self, iteration: int) -> B: ...  # noqa: D102

    def score(self, batch: B) -> None: ...  # noqa: D102

    def advantage(self, batch: B) -> None: ...  # noqa: D102

    def restored(self, iteration: int, tensors: Mapping[str, Tensor], metrics: Metrics) -> B: ...  # noqa: D102

    def minibatches(self, batch: B, iteration: int) -> Iterator[MiniBatch]: ...  # noqa: D102

    def loss(self, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]: ...  # noqa: D102

    def updating(self) -> AbstractContextManager[None]: ...  # noqa: D102

    def probe(self, batch: B) -> list[Tensor]: ...  # noqa: D102

    def on_first_batch(self, batch: B) -> None: ...  # noqa: D102

    def on_step(self, batch: B, metrics: Metrics) -> None: ...  # noqa: D102

    def state_dict(self) -> State: ...  # noqa: D102

    def load_state_dict(self, state: State) -> None: ...  # noqa: D102


class RunOutputs(Protocol):
    """Evaluations and products of a run."""

    @property
    def resume_command(self) -> str:
        """Shell command that resumes the run."""
        ...

    def origin(self) -> dict[str, Any]:
        """Describe the configuration, data and machine of the run, for its checkpoints."""
        ...

    def evaluate(self, step: int) -> Metrics:
        """Evaluate the EMA weights if there are any, else the policy."""
        ...

    def pictures(self) -> Mapping[str, Sequence[tuple[Image, str]]]:
        """Return the images of the last evaluation with captions, on the main process."""
        ...

    def watch(self, step: int, row: Mapping[str, Any]) -> Metrics:
        """Return what to add to a row of metrics, on the main process."""
        ...

    def exporter(self) -> Callable[[Path], object] | None:
        """Return a function that writes the current LoRA into a checkpoint's folder, or None.

        Every process calls ``exporter``; the main process calls its result.
        """
        ...

    def finish(self) -> Sequence[Path] | None:
        """Write the results of the run; return the files and folders written, on the main process.

        They go into a manifest that proves the run finished: where one of them is missing or damaged, the next start
        calls ``finish`` again.
        """
        ...
