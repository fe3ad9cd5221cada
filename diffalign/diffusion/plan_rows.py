"""The rows of a plan: the solver and noise level of each step, and whether it is trained or branches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffalign.diffusion.steps import Transition, transition
from diffalign.structures import Level

ODE_SOLVERS = ("ode", "dpmpp_2m")
# The stochastic solvers, each with the noise level that its paper trains with.
PUBLISHED_NOISE_LEVEL: dict[str, float] = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "ddim": 1.0}

# A trained step with less noise has no density to speak of: float32 latents of 4 are rounded to 2e-7.
SMALLEST_STD = 1e-5
# The largest ratio of the noise after a step that keeps less than none to the noise before it.
GROWTH = 1.2


@dataclass(frozen=True)
class Row:
    """One step of a rollout.

    solver: one of ``ODE_SOLVERS`` or a stochastic kind of ``TRANSITIONS``; noise_level: its a or eta, 0 for an ODE.
    trained: whether the policy gradient uses the step. weight: factor of its loss.
    branch: children of each node at the start of the step, each with noise of its own.
    """

    solver: str
    noise_level: float
    trained: bool
    weight: float = 1.0
    branch: int = 1


@dataclass(frozen=True)
class Plan:
    """A row per step, in the order of the rollout.

    anchors: if not empty, a group has trees of different plans, see ``tree``: their common trunk is the ODE, and each
        branches once, at one of these steps.
    strides: steps of the grid that the ODE after an anchor takes at once; each child is finished once per stride.
    """

    rows: tuple[Row, ...]
    anchors: tuple[int, ...] = ()
    strides: tuple[int, ...] = (1,)

    def __len__(self) -> int:
        return len(self.rows)

    def tree(self, sample: int) -> Plan:
        """Return the plan of a tree by its index in the group: with anchors, only one of them is stochastic."""
        if not self.anchors:
            return self
        anchor = self.anchors[sample % len(self.anchors)]
        rows = (row if step == anchor else self.rows[-1] for step, row in enumerate(self.rows))
        return Plan(tuple(rows), strides=self.strides)

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """The indices of the trained rows, ascending."""
        return tuple(step for step, row in enumerate(self.rows) if row.trained)

    def validate(self, levels: Level) -> None:
        """Refuse a plan that cannot be run or trained on these N + 1 levels.

        ValueError: another number of levels; no trained row; an unknown solver, or one that these levels or the noise
        level rule out; a trained or branching row without a density; a row whose numbers are not finite, or that keeps
        less than no noise (see ``_check_kept``).
        """
        if len(levels) != len(self.rows) + 1:
            raise ValueError(f"{len(self.rows)} steps need {len(self.rows) + 1} levels, got {len(levels)}")
        if not self.trained_steps:
            raise ValueError("the plan trains no step: mark at least one stochastic row as trained")
        for step in range(len(self.rows)):
            self._check_step(step, levels)

    def check_branches(self, levels: Level) -> None:
        """Refuse a step that branches and draws no noise on these levels: its children would be identical.

        Raises:
            ValueError: Such a step, or a branch factor below 1.
        """
        for step, row in enumerate(self.rows):
            if row.branch != 1:
                self._check_step(step, levels)

    def _check_step(self, step: int, levels: Level) -> None:
        row = self.rows[step]
        try:
            _check_row(row, levels[step], levels[step + 1])
        except ValueError as error:
            raise ValueError(f"step {step} of the plan ({row.solver!r}): {error}") from error


def _check_row(row: Row, level: Level, next_level: Level) -> None:
    known = (*ODE_SOLVERS, *PUBLISHED_NOISE_LEVEL)
    if row.solver not in known:
        raise ValueError(f"unknown solver; known: {', '.join(known)}")
    if row.branch < 1:
        raise ValueError(f"a branch factor is at least 1, got {row.branch}")
    # For noise and density a multistep ODE solver is the ODE: it has neither.
    move = transition("ode" if row.solver in ODE_SOLVERS else row.solver, level, next_level, row.noise_level)
    _check_kept(row, move, level, next_level)
    if move.std >= SMALLEST_STD or not (row.trained or row.branch > 1):
        return
    use = f"trained or branching, but draws no noise from sigma {level.sigma:.4g} to {next_level.sigma:.4g}"
    if row.noise_level == 0:
        raise ValueError(f"{use}: use a stochastic solver ({', '.join(PUBLISHED_NOISE_LEVEL)}) with a noise level")
    raise ValueError(f"{use}: leave this step untrained with branch 1, it ends at a level without noise")


def _check_kept(row: Row, move: Transition, level: Level, next_level: Level) -> None:
    """Refuse a step whose coefficients are not finite, or that keeps less than none of the noise.

    A step keeps ``m_noise`` of the predicted noise. An Euler-Maruyama step that is too long for its diffusion subtracts
    more noise than the sample has (m_noise < 0), which adds noise again.

    One such step is published and accepted: SD3's schedules end with sigma' = .009 before 0, and Flow-GRPO's step to
    that level keeps -.08 of the noise and draws .22, of a total of .28 before it (10 steps, a = .7). Its density is
    right, and the sample has no more noise after it than before, up to ``GROWTH``.
    """
    span = f"from sigma {level.sigma:.4g} to {next_level.sigma:.4g}"
    if not all(value.isfinite() for value in (move.m_x0, move.m_noise, move.std)):
        raise ValueError(f"its coefficients {span} are not finite: use another solver, or another schedule")
    if move.m_noise >= 0:
        return
    left = torch.hypot(move.m_noise, move.std)
    if next_level.sigma > 0 and left <= GROWTH * level.sigma:
        return
    # Euler-Maruyama steps keep sigma' - c a^2 of the noise, with the noise level a.
    largest = row.noise_level * (next_level.sigma / (next_level.sigma - move.m_noise)).sqrt()
    cure = f"a noise_level of at most {math.floor(largest * 100) / 100:g}" if largest >= 0.01 else "'ode' for this step"
    raise ValueError(
        f"it keeps {move.m_noise:.3g} of the noise {span} and draws {move.std:.3g}, so that it leaves more than it "
        f"should: use {cure}, more steps, or 'cps' or 'ddim', which keep what they do not draw"
    )
