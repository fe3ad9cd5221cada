"""Diffusion-KTO (arXiv 2404.04465): utilities of single images that were liked or disliked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.losses.context import Processes
from diffalign.losses.errors import Denoised
from diffalign.losses.registry import preference_loss

# Section 4.2. The first is the paper's choice; the others weigh losses, and gains, more.
UTILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "kahneman_tversky": torch.sigmoid,
    "loss_averse": F.logsigmoid,
    "risk_seeking": F.softplus,
}


class BatchKL:
    """The KL estimate of each batch, ``reference_point`` over all processes. It has no state."""

    provides: tuple[str, ...] = ("kl",)

    def __call__(
        self, denoised: Denoised, liked: Tensor, beta: float | Tensor | None, weight: Tensor, processes: Processes
    ) -> dict[str, Tensor]:
        """Return {"kl": ()}, the mean gain of all images. weight: (B,), 0 for padding images."""
        gain, counted = denoised.gain.detach(), weight > 0
        sums = torch.stack([(gain * counted).sum(), counted.to(gain).sum()])

        total, count = processes.reduce(sums, "sum")
        return {"kl": total / count.clamp(min=1)}

    def state_dict(self) -> dict[str, float]:
        """Return nothing: each batch has its own estimate."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore nothing."""


@preference_loss(
    "kto", idea="prospect theory's utility", source="2404.04465", beta=1000.0, paired=False, context=BatchKL
)
def diffusion_kto(
    denoised: Denoised,
    liked: Tensor,
    *,
    beta: float | Tensor,
    kl: Tensor | None = None,
    utility: str = "kahneman_tversky",
    liked_weight: float = 1.0,
    disliked_weight: float = 1.0,
) -> Tensor:
    """w (1 - U(+-beta (gain - max(0, kl)))), + for liked samples: (B,).

    liked: (B,), bool. beta: in the units of the errors; published 1000 for the reduction "mean".
    kl: (), ``reference_point`` as the mean over all processes; None takes it from this batch. It is held constant.
    utility: U, a name in ``UTILITIES``. liked_weight, disliked_weight: w.
    ValueError: an unknown utility.

    Departures from the paper:
    1. The KL is estimated from the gains of the samples themselves, as the released code does by default;
       the paper uses mismatched prompts and images, at the cost of two more passes.
    """
    if utility not in UTILITIES:
        raise ValueError(f"unknown utility {utility!r}; use one of {', '.join(UTILITIES)}")
    gain = denoised.gain
    kl = (reference_point(denoised) if kl is None else kl).detach().clamp(min=0)
    sign = 2 * liked.to(gain) - 1
    weight = torch.where(liked, liked_weight, disliked_weight).to(gain)
    return weight * (1 - UTILITIES[utility](sign * beta * (gain - kl)))


def reference_point(denoised: Denoised) -> Tensor:
    """Compute the batch mean of the gain, a constant, of either sign: (). Its mean over processes is ``kl``."""
    return denoised.gain.detach().mean()
