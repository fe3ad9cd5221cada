"""Unroll a trajectory with gradients: the path of a reward's gradient from its input back to the denoiser.

Methods that train on a reward's gradient differ in which denoiser calls are recorded, in whether the gradient passes
through the inputs of those calls, and in what the reward sees. A method is therefore a ``GradientPath``: segments from
level to level, each a denoiser call and the ODE step after it,

    x' = A x + B output(x),   A, B from ``steps.step``,

and one loop runs every combination. The gradient reaches the weights through A x and B output, the sampler's own path,
and through the input of output(x), which adds the product of the denoiser's Jacobians.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.diffusion.parameterization import add_noise, combine, widen
from diffalign.diffusion.steps import step
from diffalign.structures import Level

# (x, level, whether the call carries a gradient) -> output; the flag lets guidance differ on the gradient's path.
Denoiser = Callable[[Tensor, Level, bool], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Segment:
    """A denoiser call at one level and the step to another.

    Attributes:
        start: Index of the call's level in the schedule.
        end: Index of the level that the step reaches; None for the level without noise, which gives the predicted x0.
        gradient: Whether the call is recorded. The output of other calls is a constant; x keeps its gradient.
    """

    start: int
    end: int | None
    gradient: bool = True


@dataclass(frozen=True)
class GradientPath:
    """Segments of a trajectory that are unrolled with a gradient; the reward sees the sample after the last one.

    Attributes:
        moves: The segments; each starts at the level where the previous one ended. The first carries a gradient.
        input_grad_scale: Factor in [0, 1] of the gradient through the inputs of calls; 0 detaches them.
        renoise: Start from a finished sample, noised to the first level with known noise, instead of from a state of
            the trajectory.
        direct_align: Remove the known noise from the sample, (x - sigma noise) / alpha (Direct-Align).
        straight_through: Segments leap over steps of the trajectory; a leap ends at the value of the trajectory's
            state, with the gradient of the leap.
        weight: Factor of the loss.
        words: SRPO's control words of the reward, the wanted one first.
        word_weight: SRPO's k.

    Raises:
        ValueError: Segments that do not join, a first segment without a gradient, ``input_grad_scale`` outside [0, 1],
            or ``direct_align`` without known noise.
    """

    moves: tuple[Segment, ...]
    input_grad_scale: float = 1.0
    renoise: bool = False
    direct_align: bool = False
    straight_through: bool = False
    weight: float = 1.0
    words: tuple[str, str] | None = None
    word_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.moves or not self.moves[0].gradient:
            raise ValueError("the first segment must carry a gradient: sample the steps before it instead")
        if any(a.end != b.start for a, b in zip(self.moves, self.moves[1:], strict=False)):
            raise ValueError(f"each segment must start where the previous one ended, got {self.moves}")
        if not 0 <= self.input_grad_scale <= 1:
            raise ValueError(f"input_grad_scale must lie in [0, 1], got {self.input_grad_scale}")
        if self.direct_align and not (self.renoise and self.moves[-1].end is not None):
            raise ValueError("direct_align needs known noise: set renoise, and end the last segment at a level")

    @property
    def start(self) -> int:
        """Index of the first level."""
        return self.moves[0].start

    @property
    def inverted(self) -> bool:
        """Whether the first step goes up in noise."""
        end = self.moves[0].end
        return end is not None and end < self.start

    @property
    def states(self) -> tuple[int, ...]:
        """Step indices of the trajectory states that the path needs, apart from the finished sample of ``renoise``."""
        ends = tuple(move.end for move in self.moves if move.end is not None) if self.straight_through else ()
        return (() if self.renoise else (self.start,)) + ends


@dataclass(frozen=True)
class RecordedCall:
    """A denoiser call with gradients: ``x``, its input, a constant; its level; ``output``, with the gradient."""

    x: Tensor
    level: Level
    output: Tensor


@dataclass(frozen=True)
class Unrolled:
    """Result of an unrolled path.

    Attributes:
        x: (B, C, h, w), float32 or wider, the latents that the reward sees.
        calls: The recorded calls, in order.
        gaps: With ``straight_through``, (B,) per segment: the mean absolute difference between the end of a leap and
            the state of the trajectory; else empty.
    """

    x: Tensor
    calls: tuple[RecordedCall, ...]
    gaps: tuple[Tensor, ...]


def unroll(
    denoise: Denoiser,
    path: GradientPath,
    levels: Level,
    start: Tensor,
    *,
    parameterization: str,
    noise: Tensor | None = None,
    truth: Mapping[int, Tensor] | None = None,
    checkpointed: bool = False,
) -> Unrolled:
    """Run the segments of a path.

    Args:
        denoise: See ``Denoiser``; calls without a gradient run under ``no_grad``.
        path: The path.
        levels: The N + 1 levels of the trajectory.
        start: (B, C, h, w), a constant: the state at the first level; with ``renoise`` the finished sample.
        parameterization: Meaning of the denoiser's output.
        noise: (B, C, h, w), the known noise of ``renoise``.
        truth: With ``straight_through``, the states of the trajectory at ``path.states``.
        checkpointed: Recompute recorded calls in the backward pass; only their inputs are stored. The gradient is the
            same.
    """
    x = start if not path.renoise else add_noise(start, _given(noise, "noise"), levels[path.start])
    calls, gaps = [], []
    for move in path.moves:
        level, next_level = levels[move.start], levels[move.end] if move.end is not None else clean(levels)
        inputs = passing(x, path.input_grad_scale)
        output = _call(denoise, inputs, level, move.gradient, checkpointed)
        if move.gradient:
            calls.append(RecordedCall(inputs.detach(), level, output))
        x = step("ode", x, output, level, next_level, parameterization=parameterization).mean
        if path.straight_through:
            assert move.end is not None
            state = widen(_given(truth, "truth")[move.end])
            gaps.append((x.detach() - state).abs().flatten(1).mean(1))
            # This order keeps every bit of the state.
            x = state + (x - x.detach())
    if path.direct_align:
        x = recover(x, _given(noise, "noise"), next_level)
    return Unrolled(x, tuple(calls), tuple(gaps))


def _given(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"this path needs {name}: pass it")
    return value


def clean(levels: Level) -> Level:
    """Return the level without noise, which a schedule need not contain."""
    return Level(torch.ones_like(levels.alpha[0]), torch.zeros_like(levels.sigma[0]), torch.zeros_like(levels.time[0]))


def passing(x: Tensor, share: float) -> Tensor:
    """Scale the gradient of ``x`` by ``share``; the value keeps every bit."""
    if share == 1 or not x.requires_grad:
        return x
    return x.detach() if share == 0 else x.detach() + share * (x - x.detach())


def recover(x: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Compute x0 = (x - sigma noise) / alpha with known noise (Direct-Align, arXiv 2509.06942).

    Exact for an exact denoiser, at any level with alpha > 0, because only the last step is predicted.
    """
    return combine(1 / level.alpha, x, -level.sigma / level.alpha, noise)


def _call(denoise: Denoiser, x: Tensor, level: Level, gradient: bool, checkpointed: bool) -> Tensor:
    if not gradient:
        with torch.no_grad():
            return denoise(x, level, False)
    if checkpointed:
        result: Tensor = checkpoint(denoise, x, level, True, use_reentrant=False, preserve_rng_state=False)
        return result
    return denoise(x, level, True)


def in_slices(loss: Callable[[Tensor, slice], Tensor], x: Tensor, size: int) -> Tensor:
    """Sum ``loss(x[rows], rows)`` over slices, with its gradient, holding the graph of one slice at a time.

    The gradient with respect to ``x`` is computed slice by slice and attached by a product, without an additional pass.
    It is exact if no slice's loss depends on another slice. Other tensors that ``loss`` uses get no gradient.

    Args:
        loss: Returns a scalar.
        x: (B, ...).
        size: Rows per slice, at least 1.
    """
    total, gradients = x.new_zeros(()), list[Tensor]()
    for first in range(0, len(x), size):
        rows = slice(first, min(first + size, len(x)))
        with torch.enable_grad():
            piece = x[rows].detach().requires_grad_()
            part = loss(piece, rows)
        gradients += torch.autograd.grad(part, piece)
        total = total + part.detach()
    product = (x * torch.cat(gradients)).sum()
    return total + (product - product.detach())
