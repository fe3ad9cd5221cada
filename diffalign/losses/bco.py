"""BCO, binary classifier optimization (arXiv 2404.04656): is this image liked? with the implicit reward as logit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.context import Processes
from diffalign.losses.errors import Denoised
from diffalign.losses.registry import preference_loss
from diffalign.losses.running import RunningMean


class RewardShift:
    """delta = (mean reward of liked samples + mean reward of the others) / 2, each a running mean (equation 7)."""

    provides: tuple[str, ...] = ("shift",)

    def __init__(self, decay: float = 0.99) -> None:
        self.sides = {"liked": RunningMean(decay), "disliked": RunningMean(decay)}

    def __call__(
        self, denoised: Denoised, liked: Tensor, beta: float | Tensor | None, weight: Tensor, processes: Processes
    ) -> dict[str, Tensor]:
        """Update delta with the rewards of all processes: {"shift": ()}. weight: (B,), 0 for padding images."""
        assert beta is not None
        rewards = beta * denoised.gain.detach()
        own = torch.stack([rewards, liked.to(rewards), (weight > 0).to(rewards)])

        rewards, label, counted = processes.gather(own.T.contiguous()).T
        return {"shift": self.update(rewards, label > 0.5, counted)}

    def update(self, rewards: Tensor, liked: Tensor, counted: Tensor | None = None) -> Tensor:
        """Update both means and return delta, ().

        A side that has no sample keeps its mean; one that never had any has the mean 0, which is where rewards start.

        Args:
            rewards: beta gain of all processes, (N,).
            liked: Their labels, (N,), bool.
            counted: (N,), 1, or 0 for a sample that is left out; default: all count.
        """
        for side, chosen in zip(self.sides.values(), (liked, ~liked), strict=True):
            count = chosen.to(rewards) if counted is None else chosen * counted
            side.update((rewards.detach() * count).sum() / count.sum())
        return self.value

    @property
    def value(self) -> Tensor:
        """delta, ()."""
        return (self.sides["liked"].mean + self.sides["disliked"].mean) / 2

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return plain numbers, by side."""
        return {name: side.state_dict() for name, side in self.sides.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Restore what ``state_dict`` returned."""
        for name, side in self.sides.items():
            side.load_state_dict(state[name])


# The beta of "kto", whose logit it has; the paper is about language models.
@preference_loss(
    "bco",
    idea="a classifier of liked images",
    source="2404.04656",
    beta=1000.0,
    paired=False,
    context=RewardShift,
)
def bco(denoised: Denoised, liked: Tensor, *, beta: float | Tensor, shift: float | Tensor) -> Tensor:
    """-log sigma(+-(beta gain - shift)), + for liked samples: (B,).

    liked: (B,), bool. beta: in the units of the errors. shift: the paper's delta, (), see ``RewardShift``; 0 is the
    plain binary cross-entropy. It is held constant.

    Departures from the paper:
    1. Log-likelihood ratios are gains, the differences of denoising errors.
    """
    if isinstance(shift, Tensor):
        shift = shift.detach()
    reward = beta * denoised.gain
    return -F.logsigmoid((2 * liked.to(reward) - 1) * (reward - shift))
