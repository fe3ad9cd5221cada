"""Statistics over the batches of all processes, for losses whose value depends on more than their own sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from diffalign.losses.errors import Denoised


class Processes(Protocol):
    """The two collective operations that statistics need; an ``accelerate.Accelerator`` has them."""

    def reduce(self, tensor: Tensor, reduction: str) -> Any:
        """Sum a tensor over processes, with the reduction "sum"; the same shape."""

    def gather(self, tensor: Tensor) -> Any:
        """Concatenate the tensors of all processes, which are of one shape, along the first dimension."""


class BatchContext(Protocol):
    """Statistics that a loss of single images takes as options, with their own state.

    It is called in every pass on every process: all make as many passes as the others, of as many images.
    """

    provides: tuple[str, ...]
    """The names of the options that a call returns."""

    def __call__(
        self, denoised: Denoised, liked: Tensor, beta: float | Tensor | None, weight: Tensor, processes: Processes
    ) -> dict[str, Tensor]:
        """Return the options for this batch. weight: (B,), 0 for padding images, which count in no statistic."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers, for checkpoints; empty where there is none."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
