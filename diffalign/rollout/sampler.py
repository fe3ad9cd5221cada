"""Executes a plan: from start noise to final latents, step by step, in any micro-batch size."""

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
    """A plan on the levels of a model: everything about a rollout that does not depend on prompts or noise."""

    plan: Plan
    levels: Level
    guidance: Guidance | None = None
    # Of the first steps, how many the reference makes: ImageReFL's combined generation (arXiv 2505.22569).
    base_steps: int = 0

    def __post_init__(self) -> None:
        """ValueError for a plan that branches: rollouts are chains so far, and would ignore it."""
        if any(row.branch > 1 for row in self.plan.rows):
            raise ValueError("the sampler does not branch yet: give every row of the plan branch 1")

    def replay(
        self, model: DiffusionModel, index: int, x: Tensor, conditioning: Conditioning, x_next: Tensor
    ) -> StepResult:
        """The stored transition ``x -> x_next`` of step ``index`` under the model's current weights."""
        row, level, next_level = self.plan.rows[index], self.levels[index], self.levels[index + 1]
        output = model.predict(x, level, conditioning, self.guidance)
        return step(
            row.solver,
            x,
            output,
            level,
            next_level,
            parameterization=model.parameterization,
            noise_level=row.noise_level,
            x_next=x_next,
        )


@torch.no_grad()
def sample(
    model: DiffusionModel,
    route: SamplingPlan,
    conditioning: Conditioning,
    start: Tensor,
    draw: Draw | None = None,
    observe: Observer | None = None,
    steps: range | None = None,
) -> Tensor:
    """Latents of one micro-batch after the last of ``steps``, (B, C, h, w) in the dtype of ``start``.

    steps: consecutive steps of the plan; default all, which gives final latents. start: the latents at the first of
    them, for the whole plan the noise. draw(i): the noise (B, C, h, w) of stochastic step i, asked for where it is
    needed. observe(i, result): sees every transition, and what it does not keep is freed.
    """
    x, previous_x0, previous_level = start, None, None
    guidance = model.resolve_guidance(route.guidance)
    for index in range(len(route.plan)) if steps is None else steps:
        row = route.plan.rows[index]
        level, next_level = route.levels[index], route.levels[index + 1]
        with model.using(REFERENCE) if index < route.base_steps else nullcontext():
            output = model.predict(x, level, conditioning, guidance)
        if row.solver == "dpmpp_2m":
            result = dpmpp_2m(
                x,
                output,
                level,
                next_level,
                parameterization=model.parameterization,
                previous_x0=previous_x0,
                previous_level=previous_level,
            )
            previous_x0, previous_level = to_x0(model.parameterization, x, output, level), level
        else:
            # A multistep solver starts afresh after any other step: its history would be of another path.
            previous_x0, previous_level = None, None
            result = step(
                row.solver,
                x,
                output,
                level,
                next_level,
                parameterization=model.parameterization,
                noise_level=row.noise_level,
                noise=draw(index).to(x.device, non_blocking=True) if draw and row.noise_level else None,
            )
        if observe is not None:
            observe(index, result)
        x = result.x_next
    return x


def ode_plan(num_steps: int, solver: str = "ode") -> Plan:
    """A plan without noise, for evaluation."""
    return Plan((Row(solver, 0.0, trained=False),) * num_steps)


def micro_batches(count: int, size: int) -> Sequence[slice]:
    """Consecutive slices of at most ``size`` that cover ``count`` items."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
