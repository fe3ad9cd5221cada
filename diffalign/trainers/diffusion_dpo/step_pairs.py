"""Pairs of sampling steps: a sampler's Gaussian step is a denoising error, so that losses of pairs compare steps.

With mu the mean of the step to x' and std its noise, log p(x' | x) = -(x' - mu)^2 / (2 std^2) + constant. So with
output mu / (sqrt(2) std) and target x' / (sqrt(2) std) the error is -log p up to a constant, and ``Denoised.gain`` is
log p_theta - log p_ref.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.parameterization import expand
from diffalign.diffusion.plan import Plan, Row, make_plan, possible_plans
from diffalign.diffusion.plan_config import PlanConfig
from diffalign.diffusion.steps import step, transition
from diffalign.losses.errors import Denoised
from diffalign.models import DiffusionModel
from diffalign.models.weights import POLICY, REFERENCE
from diffalign.rollout.sampler import SamplingPlan
from diffalign.structures import Conditioning, Input, Level
from diffalign.trainers.diffusion_dpo.siblings_config import Siblings


@dataclass(frozen=True)
class StepExamples:
    """P pairs of sampled steps.

    Attributes:
        x: (P, K, C, *spatial), where the steps begin: K = 1 if both begin in one state, else 2.
        x_next: (P, 2, C, *spatial), where they end, the preferred first.
        step: (P,) int64, index of the step.
        label, texts, number, weight: As in ``Examples``.
        plan: How the steps were taken.
    """

    x: Tensor
    x_next: Tensor
    step: Tensor
    label: Tensor
    texts: list[Input]
    number: list[int]
    weight: Tensor
    plan: SamplingPlan


def compared_steps(plan: PlanConfig, method: Siblings, seed: int = 0, iteration: int | None = None) -> tuple[int, ...]:
    """Return the steps that an iteration compares; without one, check every plan and return those of the first.

    Args:
        plan: How paths are sampled.
        method: Which steps are compared.
        seed: Of the run.
        iteration: Index of the iteration.

    Raises:
        ValueError: A plan that branches, or has no step with noise from ``siblings.first_step`` on.
    """
    found = []
    plans = possible_plans(plan) if iteration is None else [make_plan(plan, iteration, seed)]
    for one in plans:
        steps = tuple(index for index in one.trained_steps if index >= method.first_step)
        if not steps:
            raise ValueError(
                f"pairs: siblings compares steps with noise from siblings.first_step {method.first_step} on, and plan "
                f"{plan.preset!r} of {len(one)} steps has none: use plan.preset flow_grpo with a solver, as "
                "cps or ddim, or a smaller first_step"
            )
        found.append(steps)
    return found[0]


def solver_row(plan: Plan, steps: Sequence[int]) -> Row:
    """Return the row that compared steps share. ValueError: they differ in solver or noise level."""
    rows = {(plan.rows[index].solver, plan.rows[index].noise_level): plan.rows[index] for index in steps}
    if len(rows) > 1:
        raise ValueError("pairs: siblings compares steps of one solver and noise level, and the plan has several")
    return next(iter(rows.values()))


def step_sides(
    model: DiffusionModel,
    examples: StepExamples,
    rows: Tensor,
    conditioning: Conditioning,
    *,
    compare: bool,
    reduction: str,
) -> tuple[list[Denoised], Level]:
    """Evaluate the steps of some pairs under the policy and, with ``compare``, the reference.

    Siblings share one evaluation of each.

    Args:
        conditioning: A row per pair.

    Returns:
        The preferred and the other side, whose gains are log-ratios; the level at which each pair begins, (b,).
    """
    device, plan, steps = model.device, examples.plan, examples.step[rows]
    starts = examples.x[rows].transpose(0, 1)
    states = len(starts)
    x = starts.flatten(0, 1).to(device, non_blocking=True)
    x_next = examples.x_next[rows].transpose(0, 1).flatten(0, 1).to(device, non_blocking=True)
    own = conditioning[torch.arange(len(rows)).repeat(states)]
    begin, end = plan.levels[steps.repeat(2)], plan.levels[steps.repeat(2) + 1]
    row = solver_row(plan.plan, steps.tolist())
    scale = expand(1 / (math.sqrt(2) * transition(row.solver, begin, end, row.noise_level).std), x_next)

    def scaled_mean() -> Tensor:
        output = model.predict(x, plan.levels[steps.repeat(states)], own, plan.guidance)
        start, output = (tensor.repeat(2 // states, *[1] * (x.ndim - 1)) for tensor in (x, output))
        mean = step(
            row.solver,
            start,
            output,
            begin,
            end,
            parameterization=model.parameterization,
            noise_level=row.noise_level,
            x_next=x_next,
        ).mean
        return mean * scale.to(mean)

    means: dict[str, Tensor | None] = {REFERENCE: None}
    if compare:
        with torch.no_grad(), model.using(REFERENCE):
            means[REFERENCE] = scaled_mean()
    means[POLICY] = scaled_mean()
    target, policy, reference = x_next * scale.to(x_next), means[POLICY], means[REFERENCE]
    assert policy is not None
    references = [None, None] if reference is None else reference.chunk(2)
    sides = zip(policy.chunk(2), target.chunk(2), references, strict=True)
    return [Denoised(mean, goal, other, reduction=reduction) for mean, goal, other in sides], begin[: len(rows)]
