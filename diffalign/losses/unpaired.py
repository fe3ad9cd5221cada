"""A loss of single images with its options and the statistics over all processes that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.losses.context import Processes
from diffalign.losses.errors import Denoised
from diffalign.losses.registry import get_loss


class SingleObjective:
    """The loss ``name`` with its options; calling it gives the loss per image.

    Args:
        name: A loss of single images. Code must have been loaded by ``get_loss`` before.
        options: The loss's own, such as {"utility": "loss_averse"}.
        processes: Sums and gathers over all processes, such as an ``Accelerator``; None to check the options only.

    Raises:
        ValueError: A loss of pairs, or an option that the loss does not take, or computes from the batch.
    """

    def __init__(self, name: str, options: Mapping[str, float | str], processes: Processes | None = None) -> None:
        loss = get_loss(name)
        if loss.paired:
            raise ValueError(f"{name!r} learns from pairs: use PairObjective, or a loss of single images")
        self.function, self.options, self.processes = loss.function, dict(options), processes
        self.context = None if loss.context is None else loss.context()
        provided = () if self.context is None else self.context.provides
        settable = [option for option in loss.options if option not in provided]
        if unknown := sorted(set(options) - set(settable)):
            known = ", ".join(settable) or "none"
            raise ValueError(f"{name!r} has no option {', '.join(unknown)}; its options: {known}")
        self._try(None if loss.beta is None else loss.beta, provided)

    def _try(self, beta: float | None, provided: tuple[str, ...]) -> None:
        """Evaluate the loss on one image of zeros, so that invalid option values fail before the run starts."""
        zero = torch.zeros(1, 1, 1, 1)
        strength = {} if beta is None else {"beta": beta}
        batch = dict.fromkeys(provided, torch.zeros(()))
        self.function(Denoised(zero, zero, zero), torch.ones(1, dtype=torch.bool), **strength, **batch, **self.options)

    def __call__(self, image: Denoised, liked: Tensor, beta: float | Tensor | None, weight: Tensor) -> Tensor:
        """Return the losses, (B,).

        Args:
            image: The denoised batch.
            liked: (B,), bool.
            beta: None for a loss that takes none.
            weight: (B,), 0 for padding images, which equalise the number of passes per process.
        """
        strength = {} if beta is None else {"beta": beta}
        batch: dict[str, Tensor] = {}
        if self.context is not None and self.processes is not None:
            batch = self.context(image, liked, beta, weight, self.processes)
        found: Tensor = self.function(image, liked, **strength, **batch, **self.options)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the statistics; empty where there are none."""
        return {} if self.context is None else self.context.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        if self.context is not None:
            self.context.load_state_dict(state)
