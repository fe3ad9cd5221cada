"""A sampling, unrolled: the way of a reward's gradient from the sample that it judges back to the denoiser.

The methods that train on a reward's gradient differ in which calls of the denoiser are recorded, in whether the
gradient passes through the inputs of those calls, and in what the reward sees. So a method is a ``GradientPath``: moves
from level to level, each a call of the denoiser and the ODE step that follows it,

    x' = A x + B output(x),   A, B from ``steps.step``.

Written so, every combination is one loop. Through A x and B output runs the sampler's own path; through the input of
output(x) the long product of the denoiser's Jacobians.
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
    """A call at level ``start`` and the step to level ``end``, both places in a schedule.

    end: None is a level without noise, so that the step gives the predicted x0. gradient: whether the call is recorded;
    one that is not is a constant, but x keeps its path through the step.
    """

    start: int
    end: int | None
    gradient: bool = True


@dataclass(frozen=True)
class GradientPath:
    """Segments of a trajectory that are unrolled with a gradient; the reward sees the sample after the last one.

    moves: the segments; each begins where the one before ended, and the first carries a gradient. input_grad_scale:
        the share of the gradient that passes through the inputs of calls: 1 all of it, 0 none (detached inputs).
    renoise: begin at a finished sample, noised to the first level with known noise; False: at a state of a trajectory.
    direct_align: subtract the known noise from the sample, (x - sigma noise) / alpha (Direct-Align).
    straight_through: segments leap over steps of a trajectory, and take its states as their values where they end,
        with the gradient of the leap.
    weight: of its loss. words, word_weight: SRPO's control words in its reward, the one to come closer to first, and k.

    ValueError: moves that do not join, no gradient in the first, a share outside [0, 1], or a recovery without known
    noise.
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
            raise ValueError("a course begins with a move that carries a gradient: what lies before is sampled")
        if any(a.end != b.start for a, b in zip(self.moves, self.moves[1:], strict=False)):
            raise ValueError(f"each move must begin where the one before ended, got {self.moves}")
        if not 0 <= self.input_grad_scale <= 1:
            raise ValueError(f"input_grad_scale is a share in [0, 1], got {self.input_grad_scale}")
        if self.direct_align and not (self.renoise and self.moves[-1].end is not None):
            raise ValueError("noise can be taken off where it is known: set renoise, and end at a level")

    @property
    def start(self) -> int:
        """The place of the first level."""
        return self.moves[0].start

    @property
    def inverted(self) -> bool:
        """Whether it goes up, to more noise."""
        end = self.moves[0].end
        return end is not None and end < self.start

    @property
    def states(self) -> tuple[int, ...]:
        """The places in a sampling whose states it needs, beside a finished sample where it is renoised."""
        ends = tuple(move.end for move in self.moves if move.end is not None) if self.straight_through else ()
        return (() if self.renoise else (self.start,)) + ends


@dataclass(frozen=True)
class RecordedCall:
    """A recorded call: its input, a constant; its level; its output, with the gradient."""

    x: Tensor
    level: Level
    output: Tensor


@dataclass(frozen=True)
class Unrolled:
    """x: (B, C, h, w), float32 or wider, what the reward sees. calls: those that carry a gradient, in order.

    gaps: of a straight course, per move (B,), the mean absolute difference of a leap's end from the sampling's state.
    """

    x: Tensor
    calls: tuple[RecordedCall, ...]
    gaps: tuple[Tensor, ...]


def unroll(
    denoise: Denoiser,
    course: GradientPath,
    levels: Level,
    start: Tensor,
    *,
    parameterization: str,
    noise: Tensor | None = None,
    truth: Mapping[int, Tensor] | None = None,
    checkpointed: bool = False,
) -> Unrolled:
    """Runs the moves of ``course``.

    denoise: see ``Denoiser``; calls without a gradient are made under ``no_grad``. levels: the N + 1 of the sampling.
    start: (B, C, h, w), a constant: the state at the course's first level; of a renoised course the finished sample.
    noise: the same shape, the known noise of a renoised course. truth: of a straight course, the states at ``states``.
    checkpointed: a recorded call keeps its input alone and is made again on the way back; the gradient is the same.
    """
    x = start if not course.renoise else add_noise(start, _given(noise, "noise"), levels[course.start])
    calls, gaps = [], []
    for move in course.moves:
        level, next_level = levels[move.start], levels[move.end] if move.end is not None else clean(levels)
        seen = passing(x, course.input_grad_scale)
        output = _call(denoise, seen, level, move.gradient, checkpointed)
        if move.gradient:
            calls.append(RecordedCall(seen.detach(), level, output))
        x = step("ode", x, output, level, next_level, parameterization=parameterization).mean
        if course.straight_through:
            assert move.end is not None
            state = widen(_given(truth, "truth")[move.end])
            gaps.append((x.detach() - state).abs().flatten(1).mean(1))
            # In this order, so that the value is the state to the last bit.
            x = state + (x - x.detach())
    if course.direct_align:
        x = recover(x, _given(noise, "noise"), next_level)
    return Unrolled(x, tuple(calls), tuple(gaps))


def _given(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"this course needs {name}: pass it")
    return value


def clean(levels: Level) -> Level:
    """The level without noise, whether or not a schedule reaches it."""
    return Level(torch.ones_like(levels.alpha[0]), torch.zeros_like(levels.sigma[0]), torch.zeros_like(levels.time[0]))


def passing(x: Tensor, share: float) -> Tensor:
    """``x`` with this share of its gradient; the value is that of ``x`` to the last bit."""
    if share == 1 or not x.requires_grad:
        return x
    return x.detach() if share == 0 else x.detach() + share * (x - x.detach())


def recover(x: Tensor, noise: Tensor, level: Level) -> Tensor:
    """x0 = (x - sigma noise) / alpha, with noise that is known (Direct-Align, arXiv 2509.06942).

    Exact where the denoiser is right, at any level with alpha > 0, because nothing is predicted but the last step.
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
    """The sum over slices of ``loss(x[rows], rows)``, with its gradient, holding the graph of one slice at a time.

    The gradient by ``x`` is taken slice by slice, and given to ``x`` by a product: exact for a loss of which no slice
    needs another. It costs no pass more. Whatever else ``loss`` depends on gets no gradient.

    loss: returns a scalar. x: (B, ...). size: rows per slice, at least 1.
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
