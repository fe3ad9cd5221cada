"""A loss of single images, with what it needs to know of the batch on all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from diffalign.losses.bco import RewardShift
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

    def __call__(self, image: Denoised, liked: Tensor, beta: float | Tensor | None, weight: Tensor) -> Tensor:
        """(B,). liked: (B,), bool. beta: None for a loss that has none. weight: (B,), 0 for an image that only keeps a
        process company: what is known of the batch leaves it out."""
        strength = {} if beta is None else {"beta": beta}
        batch = {} if self.context is None else self.context(self, image, liked, beta, weight)
        return self.function(image, liked, **strength, **batch, **self.options)


def _kto(
    objective: SingleObjective, image: Denoised, liked: Tensor, beta: float | Tensor, weight: Tensor
) -> dict[str, Tensor]:
    gain, counted = image.gain.detach(), weight > 0
    total, count = objective.accelerator.reduce(torch.stack([(gain * counted).sum(), counted.to(gain).sum()]), "sum")
    return {"kl": total / count.clamp(min=1)}


def _bco(
    objective: SingleObjective, image: Denoised, liked: Tensor, beta: float | Tensor, weight: Tensor
) -> dict[str, Tensor]:
    rewards = beta * image.gain.detach()
    own = torch.stack([rewards, liked.to(rewards), (weight > 0).to(rewards)])
    rewards, label, counted = objective.accelerator.gather(own.T.contiguous()).T
    return {"shift": objective.shift.update(rewards, label > 0.5, counted)}


# What asks all processes in every pass: each makes as many passes as the others, of as many images.
CONTEXT: dict[str, Callable[..., dict[str, Tensor]]] = {"kto": _kto, "bco": _bco}
