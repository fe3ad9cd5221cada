"""Configuration of a rollout's plan: a preset and what differs from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class PlanConfig:
    """A preset and its options; None stands for the preset's own value.

    preset: a key of ``PRESETS``. num_steps: N, at least 2.
    solver: the stochastic solver. noise_level: its dial; None for the level that the solver's paper trains with.
    window_size: number of consecutive stochastic steps. window_range: [low, high), where a random window may lie; None
        for (0, N // 2). shift_every: iterations before a sliding window moves on, by window_stride steps.
    ode_solver: "ode" or "dpmpp_2m", for the steps outside the window.
    An option that the preset does not read is refused by ``make_plan``, not ignored.
    """

    bare_field: ClassVar[str] = "preset"

    preset: str = "flow_grpo"
    num_steps: int = 10
    solver: str | None = None
    noise_level: float | None = None
    window_size: int | None = None
    window_range: tuple[int, int] | None = None
    shift_every: int | None = None
    window_stride: int | None = None
    ode_solver: str | None = None
