"""A loss of single images, with what it needs to know of the batch on all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.losses.bco import RewardShift
from diffalign.losses.diffusion_kto import reference_point
from diffalign.losses.errors import Denoised
from diffalign.losses.registry import get_loss


class SingleObjective:
    """The loss ``name`` with its options; calling it gives the loss per image.

    shift: BCO's running means, to be kept in checkpoints.
    """

    def __init__(self, name: str, options: Mapping[str, float | str], accelerator: Accelerator) -> None:
        self.function, self.options, self.accelerator = get_loss(name).function, options, accelerator
        self.context = CONTEXT.get(name)
        self.shift = RewardShift()

    def __call__(self, image: Denoised, liked: Tensor, beta: float | Tensor | None) -> Tensor:
        """(B,). liked: (B,), bool. beta: None for a loss that has none."""
        strength = {} if beta is None else {"beta": beta}
        batch = {} if self.context is None else self.context(self, image, liked, beta)
        return self.function(image, liked, **strength, **batch, **self.options)


def _kto(objective: SingleObjective, image: Denoised, liked: Tensor, beta: float | Tensor) -> dict[str, Tensor]:
    return {"kl": objective.accelerator.reduce(reference_point(image), "mean")}


def _bco(objective: SingleObjective, image: Denoised, liked: Tensor, beta: float | Tensor) -> dict[str, Tensor]:
    rewards = beta * image.gain.detach()
    everyone = objective.accelerator.gather(torch.stack([rewards, liked.to(rewards)]).T.contiguous())
    return {"shift": objective.shift.update(everyone[:, 0], everyone[:, 1] > 0.5)}


# What asks all processes in every pass, so that each needs as many passes as the others.
CONTEXT: dict[str, Callable[..., dict[str, Tensor]]] = {"kto": _kto, "bco": _bco}
