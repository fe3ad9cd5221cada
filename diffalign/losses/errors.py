"""Inputs of preference losses: denoising errors of a policy and its reference, of single images or of pairs.

A loss compares errors of the denoiser's output against the target of training (``parameterization.target``).
Epsilon, v and flow models differ in that target alone, so one set of losses serves all three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.diffusion.parameterization import widen

REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Denoised:
    """Outputs of the policy for B samples, with target and reference. Errors are (B,), float32 or wider.

    output: (B, C, h, w), any float dtype, with the policy's gradient. target: the same shape.
    reference: the same shape, the reference's output for the same input; None for losses that need none. If both
        run at equal batch shapes and dtype, an untrained policy has a gain of exactly 0.
    mask: (B, 1, h, w) in [0, 1] on the latent grid, how much each position counts; None counts all alike. Where it is
        0 everywhere, the sample's error and gradient are 0.
    reduction: over a sample's dimensions, "mean" (weighted by the mask) or "sum". Beta depends on it: ``convert_beta``.

    ValueError: shapes that do not fit, or another reduction.
    """

    output: Tensor
    target: Tensor
    reference: Tensor | None = None
    mask: Tensor | None = None
    reduction: str = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {self.reduction!r}; use one of {', '.join(REDUCTIONS)}")
        shape = self.output.shape
        if len(shape) != 4:
            raise ValueError(f"output is {tuple(shape)}: make it (B, C, h, w), as latents are")
        batch, _, height, width = shape
        wanted = {"target": shape, "reference": shape, "mask": (batch, 1, height, width)}
        for name, size in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != size:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} for an output of {tuple(shape)}: make it {tuple(size)}"
                )

    @property
    def weights(self) -> Tensor:
        """Weight of each position, (B, 1, h, w): an error is the sum of weights * residual^2 over C, h and w."""
        batch, channels, height, width = self.output.shape
        like = widen(self.output.detach())
        mask = like.new_ones(batch, 1, height, width) if self.mask is None else self.mask.to(like)
        if self.reduction == "sum":
            return mask
        total = channels * mask.sum((1, 2, 3), keepdim=True)
        return mask / torch.where(total > 0, total, 1)

    def reduce(self, values: Tensor) -> Tensor:
        """Sum ``values`` (B, C, h, w) over each sample with ``weights``: (B,)."""
        return (self.weights * values).flatten(1).sum(1)

    @property
    def residual(self) -> Tensor:
        """Output - target: (B, C, h, w), float32 or wider, with the gradient."""
        return widen(self.output) - widen(self.target.detach())

    @property
    def shift(self) -> Tensor:
        """Output - reference: (B, C, h, w), float32 or wider, with the gradient. ValueError without a reference."""
        return widen(self.output) - self._reference

    @property
    def error(self) -> Tensor:
        """L, the policy's squared error: (B,), with the gradient."""
        return self.reduce(self.residual.square())

    @property
    def reference_error(self) -> Tensor:
        """R, the reference's squared error: (B,), a constant. ValueError without a reference."""
        return self.reduce(self._reference_residual.square())

    @property
    def gain(self) -> Tensor:
        """R - L: (B,), positive where the policy denoises better than the reference. ValueError without a reference."""
        # As a product: where the two outputs are close, a difference of errors would lose most of its digits.
        return self.reduce(-self.shift * (self.residual + self._reference_residual))

    @property
    def drift(self) -> Tensor:
        """The squared distance of the policy's output from the reference's: (B,). ValueError without a reference."""
        return self.reduce(self.shift.square())

    @property
    def error_gradient(self) -> Tensor:
        """The derivative of ``error`` by ``output``: (B, C, h, w), a constant, float32 or wider."""
        return 2 * self.weights * self.residual.detach()

    @property
    def _reference(self) -> Tensor:
        if self.reference is None:
            raise ValueError("there is no reference to compare with: give Denoised the reference's output as well")
        return widen(self.reference.detach())

    @property
    def _reference_residual(self) -> Tensor:
        return self._reference - widen(self.target.detach())


@dataclass(frozen=True)
class DenoisedPair:
    """Winners and losers of B pairs; both images of a pair share their level and noise.

    With different noise the margin would measure the noise. ``max_margin`` > 0 bounds the margin; a loss of the margin
    has no gradient at the bound. Infinite for none.

    ValueError: winner and loser of different shape or reduction.
    """

    winner: Denoised
    loser: Denoised
    max_margin: float = math.inf

    def __post_init__(self) -> None:
        forms = [(tuple(side.output.shape), side.reduction) for side in (self.winner, self.loser)]
        if forms[0] != forms[1]:
            raise ValueError(f"winner {forms[0]} and loser {forms[1]} differ: give both one shape and one reduction")

    @property
    def margin(self) -> Tensor:
        """(R_w - L_w) - (R_l - L_l), at most ``max_margin``: (B,), positive where the policy moved as preferred.

        ValueError without a reference.
        """
        return (self.winner.gain - self.loser.gain).clamp(max=self.max_margin)

    @property
    def gap(self) -> Tensor:
        """L_l - L_w: (B,), the margin of losses that have no reference."""
        return self.loser.error - self.winner.error


def latent_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Downsample a pixel mask to the latent grid: the mean of the pixels that each cell covers.

    mask: (B, 1, H, W), [0, 1], any dtype. size: (h, w). Returns (B, 1, h, w), float32 or wider.
    ValueError: not one channel.
    """
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"a mask is (B, 1, H, W), got {tuple(mask.shape)}: give it one channel")
    return F.interpolate(widen(mask), tuple(size), mode="area")
