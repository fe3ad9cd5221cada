"""Rollout plans: the solver and noise level of each step, and whether the step is trained.

Flow-GRPO and its descendants differ in which steps draw noise and are trained, so a preset is a table: it names the
stochastic steps of an iteration, and every other step follows the ODE.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from diffalign.diffusion.plan_config import PlanConfig
from diffalign.diffusion.steps import Transition, transition
from diffalign.structures import Level

MAX_STEPS = 10_000  # more than any schedule has levels
MIN_NOISE_LEVEL, MAX_NOISE_LEVEL = 1e-6, 100.0  # beyond them densities have no finite value in float32
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
    """A row per step, in the order of the rollout."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

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


Options = Mapping[str, Any]


def _all_but_last(options: Options) -> tuple[range, ...]:
    """Train every step but the last, which has little noise or none (cps, ddim) and so a degenerate density."""
    return (range(options["num_steps"] - 1),)


def _no_step(options: Options) -> tuple[range, ...]:
    return (range(0),)


def _first_steps(options: Options) -> tuple[range, ...]:
    return (range(options["window_size"]),)


def _windows_in_range(options: Options) -> tuple[range, ...]:
    size = options["window_size"]
    low, high = options["window_range"] or (0, options["num_steps"] // 2)
    steps = options["num_steps"]
    if low < 0 or low + size > high:
        raise ValueError(
            f"no window of {size} steps fits in plan.window_range [{low}, {high}) of {steps} steps: widen it, raise "
            "plan.num_steps, or shrink plan.window_size"
        )
    if high >= steps:
        raise ValueError(
            f"plan.window_range [{low}, {high}) reaches the last of {steps} steps, which is not trained: end it at "
            f"{steps - 1}, or raise plan.num_steps"
        )
    return tuple(range(start, start + size) for start in range(low, high - size + 1))


def _sliding_windows(options: Options) -> tuple[range, ...]:
    size, stride = options["window_size"], options["window_stride"]
    starts = range(0, options["num_steps"] - size, stride)
    if not starts:
        raise ValueError(
            f"plan.window_size {size} leaves no untrained last step of {options['num_steps']}: shrink it, or raise "
            "plan.num_steps"
        )
    return tuple(range(start, start + size) for start in starts)


def _only(options: Options, windows: int, iteration: int, seed: int) -> int:
    return 0


def _random(options: Options, windows: int, iteration: int, seed: int) -> int:
    """Draw a window by (seed, iteration): the same for every sample, process and resumed run."""
    address = hashlib.blake2b(f"window/{seed}/{iteration}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(address, "little"))
    return int(torch.randint(0, windows, (), generator=generator))


def _in_turn(options: Options, windows: int, iteration: int, seed: int) -> int:
    """Move on every ``shift_every`` iterations and, after the last full window, back to the first step."""
    return int(iteration // options["shift_every"] % windows)


@dataclass(frozen=True)
class Preset:
    """A rule for the stochastic, trained steps of an iteration.

    Attributes:
        windows: From options to the possible runs of stochastic, trained steps.
        options: The options that the preset reads, with defaults.
        choose: From (options, number of windows, iteration, seed) to the index of the iteration's window.
    """

    windows: Callable[[Options], tuple[range, ...]]
    options: Options
    choose: Callable[[Options, int, int, int], int] = _only


PRESETS: dict[str, Preset] = {
    # arXiv 2505.05470.
    "flow_grpo": Preset(_all_but_last, {"solver": "flow_sde"}),
    "flow_grpo_fast": Preset(
        _windows_in_range,
        {"solver": "flow_sde", "window_size": 2, "window_range": None, "ode_solver": "ode"},
        _random,
    ),
    # arXiv 2507.21802. Departures: 1. windows never reach the last step; 2. after the last window the first follows,
    # for as long as the training lasts; 3. "dpmpp_2m" serves before the window too, and skips no steps after it.
    "mix_grpo": Preset(
        _sliding_windows,
        {"solver": "flow_sde", "window_size": 4, "window_stride": 1, "shift_every": 25, "ode_solver": "ode"},
        _in_turn,
    ),
    # arXiv 2505.07818. Departure: every step is trained at each iteration, not a random 60 %.
    "dance_grpo": Preset(_all_but_last, {"solver": "dance_sde"}),
    # arXiv 2509.05952, and with the window that its authors train in.
    "cps": Preset(_all_but_last, {"solver": "cps"}),
    "cps_fast": Preset(
        _windows_in_range, {"solver": "cps", "window_size": 3, "window_range": None, "ode_solver": "ode"}, _random
    ),
    # No noise after the start: for trainers that need images and no density of them.
    "ode": Preset(_no_step, {"ode_solver": "ode"}),
    "first_steps": Preset(_first_steps, {"solver": "flow_sde", "window_size": 2, "ode_solver": "ode"}),
}


def _resolve(config: PlanConfig) -> dict[str, Any]:
    """Merge the preset's options with those that are set."""
    if config.preset not in PRESETS:
        raise ValueError(f"unknown preset {config.preset!r}; known: {', '.join(PRESETS)}")
    options = PRESETS[config.preset].options
    defaults = {"noise_level": None, **options, "branch": None} if "solver" in options else dict(options)
    given = {option.name: getattr(config, option.name) for option in fields(config)[2:]}
    given = {name: value for name, value in given.items() if value is not None}
    if dead := sorted(given.keys() - defaults.keys()):
        raise ValueError(
            f"plan.preset {config.preset!r} does not read {', '.join(dead)}; it reads {', '.join(defaults)}: "
            "leave out what it does not read, or choose another preset"
        )
    return {**defaults, **given, "num_steps": config.num_steps}


def _check_options(options: Options) -> None:
    if not 2 <= options["num_steps"] <= MAX_STEPS:
        raise ValueError(
            f"num_steps must be at least 2 (the last step is not trained) and at most {MAX_STEPS}, "
            f"got {options['num_steps']}"
        )
    if options.get("solver", "flow_sde") not in PUBLISHED_NOISE_LEVEL:
        raise ValueError(f"solver must be stochastic ({', '.join(PUBLISHED_NOISE_LEVEL)}), got {options['solver']!r}")
    if options.get("ode_solver", "ode") not in ODE_SOLVERS:
        raise ValueError(f"ode_solver must be one of {', '.join(ODE_SOLVERS)}, got {options['ode_solver']!r}")
    noise_level = options.get("noise_level")
    if noise_level and not MIN_NOISE_LEVEL <= noise_level <= MAX_NOISE_LEVEL:
        raise ValueError(
            f"plan.noise_level must lie in [{MIN_NOISE_LEVEL:g}, {MAX_NOISE_LEVEL:g}], got {noise_level}: "
            f"{PUBLISHED_NOISE_LEVEL[options['solver']]} is what the paper of {options['solver']!r} trains with"
        )
    for name in ("window_size", "window_stride", "shift_every"):
        if options.get(name, 1) < 1:
            raise ValueError(f"{name} must be at least 1, got {options[name]}")


def _plan(config: PlanConfig, options: Options, window: range) -> Plan:
    if not window.stop < config.num_steps:
        raise ValueError(
            f"the last of {config.num_steps} steps is not trained, and the plan trains steps up to {window.stop - 1}: "
            "raise plan.num_steps, or shrink plan.window_size"
        )
    factors = options.get("branch") or ()
    if len(factors) > len(window):
        raise ValueError(
            f"plan.branch has {len(factors)} factors, and the plan {len(window)} stochastic steps: only steps with "
            "noise can branch; give at most a factor per stochastic step"
        )
    branches = dict(zip(window, factors, strict=False))
    ode = Row(options.get("ode_solver", "ode"), 0.0, False)
    return Plan(
        tuple(
            replace(_sde(options), branch=branches.get(step, 1)) if step in window else ode
            for step in range(config.num_steps)
        )
    )


def possible_plans(config: PlanConfig, *, trees: bool = False) -> tuple[Plan, ...]:
    """Return every plan that an iteration may have, whatever its number and the seed. Arguments: see ``make_plan``."""
    options = _resolve(config)
    _check_options(options)
    if not trees and any(factor > 1 for factor in options.get("branch") or ()):
        raise ValueError("plan.branch samples trees, and this trainer reads chains only: leave plan.branch out")
    return tuple(_plan(config, options, window) for window in PRESETS[config.preset].windows(options))


def make_plan(config: PlanConfig, iteration: int, seed: int, *, trees: bool = False) -> Plan:
    """Return the plan of one iteration: stochastic, trained rows where the preset says, ODE rows elsewhere.

    The result depends on the arguments alone.

    Args:
        trees: Whether the caller handles plans that branch.

    Raises:
        ValueError: Unknown names, an option that the preset does not read, a window that does not fit before the last
            step, more branch factors than stochastic steps, or a branching plan without ``trees``.
    """
    plans = possible_plans(config, trees=trees)
    return plans[PRESETS[config.preset].choose(_resolve(config), len(plans), iteration, seed)]


def _sde(options: Options) -> Row:
    noise_level = options["noise_level"]
    published = PUBLISHED_NOISE_LEVEL[options["solver"]]
    return Row(options["solver"], published if noise_level is None else noise_level, True)
