"""Configuration of a rollout's plan: a preset and overrides."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import ClassVar

from diffalign.config import Checked, Given, option

# Branch factors of the presets that sample trees: a factor for each of their branching steps, or one for all.
TREES: dict[str, tuple[int, ...]] = {
    "tempflow_branch": (6,),
    "g2": (12,),
    "tree_rpo": (2, 2, 2, 2),
}
ANCHORED = ("tempflow_branch", "g2")  # presets whose trees begin in one ODE per prompt
SPLITS = (0, 3, 6, 9)  # of branch_grpo, for 20 steps
STRIDES: dict[str, tuple[int, ...]] = {"g2": (1, 2)}


@dataclass(frozen=True)
class PlanConfig(Checked):
    """A preset of ``PRESETS`` and overrides; None keeps the preset's own value.

    ``make_plan`` refuses an option that the preset does not read.
    """

    bare_field: ClassVar[str] = "preset"

    preset: str = option(
        "flow_grpo",
        "flow_grpo, flow_grpo_fast, mix_grpo, dance_grpo, cps, cps_fast, first_steps, fdfo or ode; of trees: "
        "branch_grpo, tempflow_branch, g2 or tree_rpo",
    )
    num_steps: int = option(10, "sampling steps of a rollout", ge=2, le=10_000, hint="the last step is not trained")
    solver: str | None = option(None, "stochastic solver: flow_sde, dance_sde, cps or ddim; default: the preset's")
    noise_level: float | None = option(
        None, "noise level of the stochastic steps; default: that of the solver's paper", ge=0
    )
    window_size: int | None = option(None, "number of consecutive stochastic steps", ge=1)
    window_range: tuple[int, int] | None = option(
        None,
        "steps LOW,HIGH (exclusive) that a random window may cover; default: the first half. tempflow_branch and g2 "
        "branch at these steps; default: all but the last, the first half",
        ge=0,
    )
    shift_every: int | None = option(None, "iterations between two shifts of a sliding window", ge=1)
    window_stride: int | None = option(None, "steps that a sliding window shifts by", ge=1)
    ode_solver: str | None = option(None, "solver of the deterministic steps: ode or dpmpp_2m")
    branch: tuple[int, ...] | None = option(
        None,
        "children of each node at the first, second ... stochastic step, such as 2,1,2 (branch_grpo: at each of its "
        "split_steps; tempflow_branch, g2: one number); group_size is a multiple of their product; default: chains",
        ge=1,
    )
    split_steps: tuple[int, ...] | None = option(
        None, "steps at which branch_grpo branches; default: 0,3,6,9 before the last", ge=0
    )
    prune_steps: tuple[int, int] | None = option(
        None,
        "steps LOW,HIGH (exclusive) that branch_grpo does not train; they slide to the noise by one every shift_every "
        "iterations",
        ge=0,
    )
    prune_stop: int | None = option(None, "lowest LOW that prune_steps slides to", ge=0)
    strides: tuple[int, ...] | None = option(
        None, "ODE steps of the grid that each of g2's finishes takes at once; default: 1,2", ge=1
    )
    noise_growth: float | None = option(
        None,
        "growth of tree_rpo's noise level over its window: the last step has 1 + noise_growth times the first's",
        ge=0,
        infinite=False,
    )
    _: KW_ONLY
    given: InitVar[Given] = None

    @property
    def splits(self) -> tuple[int, ...]:
        """The steps at which branch_grpo branches: its default ones, unless the plan is too short for them."""
        default = tuple(step for step in SPLITS if step < self.num_steps - 1)
        return default if self.split_steps is None else self.split_steps

    @property
    def anchored(self) -> bool:
        """Whether the trees of a prompt begin in one ODE."""
        return self.preset in ANCHORED

    @property
    def leaves(self) -> int:
        """Images of a tree: the product of the branch factors, 1 for chains."""
        return math.prod(self.factors) * len(self.strides or STRIDES.get(self.preset, (1,)))

    @property
    def factors(self) -> tuple[int, ...]:
        """Branch factors of the plan's branching steps; empty for chains."""
        if self.branch is not None:
            return self.branch
        if self.preset == "branch_grpo":
            return (2,) * len(self.splits)
        if self.preset == "tree_rpo" and self.window_size is not None:
            return (2,) * self.window_size
        return TREES.get(self.preset, ())
