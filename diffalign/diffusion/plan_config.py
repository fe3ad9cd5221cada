"""Configuration of a rollout's plan: a preset and overrides."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import ClassVar

from diffalign.config import Checked, Given, option


@dataclass(frozen=True)
class PlanConfig(Checked):
    """A preset of ``PRESETS`` and overrides; None keeps the preset's own value.

    ``make_plan`` refuses an option that the preset does not read.
    """

    bare_field: ClassVar[str] = "preset"

    preset: str = option(
        "flow_grpo", "flow_grpo, flow_grpo_fast, mix_grpo, dance_grpo, cps, cps_fast, first_steps or ode"
    )
    num_steps: int = option(10, "sampling steps of a rollout", ge=2, le=10_000, hint="the last step is not trained")
    solver: str | None = option(None, "stochastic solver: flow_sde, dance_sde, cps or ddim; default: the preset's")
    noise_level: float | None = option(
        None, "noise level of the stochastic steps; default: that of the solver's paper", ge=0
    )
    window_size: int | None = option(None, "number of consecutive stochastic steps", ge=1)
    window_range: tuple[int, int] | None = option(
        None, "steps LOW,HIGH (exclusive) that a random window may cover; default: the first half", ge=0
    )
    shift_every: int | None = option(None, "iterations between two shifts of a sliding window", ge=1)
    window_stride: int | None = option(None, "steps that a sliding window shifts by", ge=1)
    ode_solver: str | None = option(None, "solver of the deterministic steps: ode or dpmpp_2m")
    branch: tuple[int, ...] | None = option(
        None,
        "children of each node at the first, second ... stochastic step, such as 2,1,2; group_size is a multiple of "
        "their product; default: chains",
        ge=1,
    )
    _: KW_ONLY
    given: InitVar[Given] = None

    @property
    def leaves(self) -> int:
        """Images of a tree: the product of the branch factors, 1 for chains."""
        return math.prod(self.branch or ())
