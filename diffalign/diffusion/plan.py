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

from diffalign.diffusion.plan_config import SPLITS, STRIDES, PlanConfig
from diffalign.diffusion.plan_rows import ODE_SOLVERS as ODE_SOLVERS
from diffalign.diffusion.plan_rows import PUBLISHED_NOISE_LEVEL as PUBLISHED_NOISE_LEVEL
from diffalign.diffusion.plan_rows import Plan as Plan
from diffalign.diffusion.plan_rows import Row as Row
from diffalign.diffusion.tree_plans import (
    anchored_plan,
    anchors,
    first_half,
    grown,
    prunings,
    sliding_down,
    split_plan,
)

MAX_STEPS = 10_000  # more than any schedule has levels
MIN_NOISE_LEVEL, MAX_NOISE_LEVEL = 1e-6, 100.0  # beyond them densities have no finite value in float32

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
    # arXiv 2603.12893: the churn gamma = .0025 of its Euler steps, see ``losses.fdfo``.
    "fdfo": Preset(_all_but_last, {"solver": "cps", "noise_level": 2 / math.pi * math.acos(1 / 1.0025)}),
    # Trees: see ``tree_plans``.
    "branch_grpo": Preset(
        prunings,
        {
            "solver": "dance_sde",
            "split_steps": SPLITS,
            "prune_steps": None,
            "prune_stop": 0,
            "shift_every": 30,
        },
        sliding_down,
    ),
    "tempflow_branch": Preset(anchors, {"solver": "flow_sde", "window_range": None, "ode_solver": "ode"}),
    "g2": Preset(
        first_half,
        {"solver": "flow_sde", "window_range": None, "ode_solver": "ode", "strides": STRIDES["g2"]},
    ),
    "tree_rpo": Preset(
        _sliding_windows,
        {
            "solver": "flow_sde",
            "window_size": 4,
            "window_stride": 1,
            "shift_every": 25,
            "ode_solver": "ode",
            "noise_growth": 0.25,
        },
        _in_turn,
    ),
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
    if "split_steps" in options:
        return split_plan(config, options, window, _sde(options))
    if config.anchored:
        return anchored_plan(config, options, window, _sde(options))
    factors = config.factors
    if len(factors) > len(window):
        raise ValueError(
            f"plan.branch has {len(factors)} factors, and the plan {len(window)} stochastic steps: only steps with "
            "noise can branch; give at most a factor per stochastic step"
        )
    branches = dict(zip(window, factors, strict=False))
    growth, last = options.get("noise_growth") or 0.0, max(len(window) - 1, 1)
    ode = Row(options.get("ode_solver", "ode"), 0.0, False)
    return Plan(
        tuple(
            grown(replace(_sde(options), branch=branches.get(step, 1)), growth * (step - window.start) / last)
            if step in window
            else ode
            for step in range(config.num_steps)
        )
    )


def possible_plans(config: PlanConfig, *, trees: bool = False) -> tuple[Plan, ...]:
    """Return every plan that an iteration may have, whatever its number and the seed. Arguments: see ``make_plan``."""
    options = _resolve(config)
    _check_options(options)
    if not trees and config.leaves > 1:
        what = "plan.branch" if config.branch else f"plan.preset {config.preset!r}"
        raise ValueError(f"{what} samples trees, and this trainer reads chains only: leave {what} out")
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
