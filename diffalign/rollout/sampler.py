"""Integrate a model's sampling process along a plan, from initial noise to final latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.parameterization import to_x0
from diffalign.diffusion.plan import Plan, Row
from diffalign.diffusion.steps import dpmpp_2m, step
from diffalign.models import DiffusionModel
from diffalign.models.weights import REFERENCE
from diffalign.structures import Conditioning, Guidance, Level, StepResult

Observer = Callable[[int, StepResult], None]
Draw = Callable[[int], Tensor]


@dataclass(frozen=True)
class SamplingPlan:
    """A plan on the noise levels of a model; it depends on neither prompts nor noise.

    Attributes:
        plan: N steps.
        levels: N + 1 noise levels.
        guidance: Classifier-free guidance of every step; None for none.
        base_steps: Number of initial steps taken by the reference model: ImageReFL's combined generation (arXiv
            2505.22569).

    Raises:
        ValueError: A step branches without drawing noise, which would make identical children.
    """

    plan: Plan
    levels: Level
    guidance: Guidance | None = None
    base_steps: int = 0

    def __post_init__(self) -> None:
        self.plan.check_branches(self.levels)

    def replay(
        self,
        model: DiffusionModel,
        index: int,
        x: Tensor,
        conditioning: Conditioning,
        x_next: Tensor,
        parent: Tensor | None = None,
    ) -> StepResult:
        """Evaluate stored transitions ``x[parent] -> x_next`` of step ``index`` under the model's current weights.

        Args:
            x: (P, C, *spatial), the latents before the step; the model is evaluated once on each.
            conditioning: A row per row of ``x``.
            x_next: (B, C, *spatial), the latents after it.
            parent: (B,) int64, the row of ``x`` of each transition; default: P = B, in order.
        """
        output = model.predict(x, self.levels[index], conditioning, self.guidance)
        if parent is not None:
            parent = parent.to(x.device)
            x, output = x[parent], output[parent]
        return Solver(self, model.parameterization).step(x, output, index, x_next=x_next)


class Solver:
    """Take the steps of a plan in order, given the model's outputs; keeps the history of a multistep solver."""

    def __init__(self, plan: SamplingPlan, parameterization: str) -> None:
        self.plan, self.parameterization = plan, parameterization
        self.previous_x0: Tensor | None = None
        self.previous_level: Level | None = None

    def step(
        self, x: Tensor, output: Tensor, index: int, *, noise: Tensor | None = None, x_next: Tensor | None = None
    ) -> StepResult:
        """Advance latents (B, C, *spatial) by step ``index``; see ``diffusion.steps.step`` for noise and x_next."""
        row = self.plan.plan.rows[index]
        level, next_level = self.plan.levels[index], self.plan.levels[index + 1]
        if row.solver == "dpmpp_2m":
            return self._multistep(x, output, level, next_level)

        # After any other step, the history belongs to a different trajectory.
        self.previous_x0, self.previous_level = None, None
        return step(
            row.solver,
            x,
            output,
            level,
            next_level,
            parameterization=self.parameterization,
            noise_level=row.noise_level,
            noise=noise,
            x_next=x_next,
        )

    def _multistep(self, x: Tensor, output: Tensor, level: Level, next_level: Level) -> StepResult:
        result = dpmpp_2m(
            x,
            output,
            level,
            next_level,
            parameterization=self.parameterization,
            previous_x0=self.previous_x0,
            previous_level=self.previous_level,
        )
        self.previous_x0, self.previous_level = to_x0(self.parameterization, x, output, level), level
        return result


@torch.no_grad()
def sample(
    model: DiffusionModel,
    plan: SamplingPlan,
    conditioning: Conditioning,
    start: Tensor,
    draw: Draw | None = None,
    observe: Observer | None = None,
    steps: range | None = None,
) -> Tensor:
    """Sample one micro-batch and return its latents after the last step, in the dtype of ``start``.

    A step with branch factor b evaluates the model once per row and multiplies the batch by b; the children of a row
    are consecutive.

    Args:
        conditioning: A row per row of ``start``.
        start: (B, C, *spatial), the latents at the first of ``steps``; for a whole plan, the initial noise.
        draw: Maps the index of a stochastic step to its noise, (children, C, *spatial).
        observe: Called with the index and the result of every step.
        steps: Consecutive steps of the plan; default: all.
    """
    x, solver = start, Solver(plan, model.parameterization)
    guidance = model.resolve_guidance(plan.guidance)
    with model.trajectory():
        for index in range(len(plan.plan)) if steps is None else steps:
            row = plan.plan.rows[index]
            with model.using(REFERENCE) if index < plan.base_steps else nullcontext():
                output = model.predict(x, plan.levels[index], conditioning, guidance)
            if row.branch > 1:
                x, output = x.repeat_interleave(row.branch, 0), output.repeat_interleave(row.branch, 0)
                conditioning = conditioning[torch.arange(len(x)) // row.branch]

            noise = draw(index).to(x.device, non_blocking=True) if draw and row.noise_level else None
            result = solver.step(x, output, index, noise=noise)
            if observe is not None:
                observe(index, result)
            x = result.x_next
    return x


def ode_plan(num_steps: int, solver: str = "ode") -> Plan:
    """Make a plan of deterministic steps, for evaluation."""
    return Plan((Row(solver, 0.0, trained=False),) * num_steps)


def micro_batches(count: int, size: int) -> Sequence[slice]:
    """Split ``count`` items into consecutive slices of at most ``size``."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
