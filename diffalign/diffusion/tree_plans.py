"""Plans of trees: BranchGRPO, TempFlow-GRPO with branches, Granular-GRPO and Dynamic-TreeRPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffalign.diffusion.plan_config import PlanConfig
from diffalign.diffusion.plan_rows import Plan, Row

Options = Mapping[str, Any]


def anchors(options: Options) -> tuple[range, ...]:
    """Branch at every step of ``window_range``, but the last one of the plan, which has little noise."""
    low, high = options["window_range"] or (0, options["num_steps"] - 1)
    return (range(low, high),)


def first_half(options: Options) -> tuple[range, ...]:
    """Branch at every step of ``window_range``, else of the first half."""
    return anchors({**options, "window_range": options["window_range"] or (0, options["num_steps"] // 2)})


def prunings(options: Options) -> tuple[range, ...]:
    """Return the steps that each iteration leaves untrained: none, or those that slide towards the noise."""
    if options["prune_steps"] is None:
        return (range(0),)
    low, high = options["prune_steps"]
    stop = min(options["prune_stop"], low)
    if not low < high < options["num_steps"]:
        raise ValueError(
            f"plan.prune_steps [{low}, {high}) of {options['num_steps']} steps: give LOW,HIGH with LOW below HIGH, and "
            "HIGH below plan.num_steps, as the last step is not trained anyway"
        )
    return tuple(range(low - shift, high - shift) for shift in range(low - stop + 1))


def sliding_down(options: Options, windows: int, iteration: int, seed: int) -> int:
    """Move on every ``shift_every`` iterations, and stay at the last."""
    return int(min(iteration // options["shift_every"], windows - 1))


def grown(row: Row, growth: float) -> Row:
    """Dynamic-TreeRPO (arXiv 2509.23352): noise that grows linearly over a sliding window of tree steps.

    Departures from the paper: its constants are not published, nor its code; no reproduction is claimed. The window
    slides as Mix-GRPO's does, and the growth of the noise over it is an option.
    """
    return replace(row, noise_level=row.noise_level * (1 + growth)) if growth else row


def split_plan(config: PlanConfig, options: Options, pruned: range, row: Row) -> Plan:
    """BranchGRPO (arXiv 2509.06040): noise at every step but the last, and branches at some of them.

    Departures from the released code: 1. one standard deviation serves the sample and its density, where that code
    multiplies the noise of a split's children by 4 in the sample alone; 2. ``prune_steps`` are steps, from 0: a step
    ends at that code's depth less 1.
    """
    splits, factors = config.splits, config.factors
    late = max(splits, default=0) > config.num_steps - 2
    if late or len(factors) != len(splits) or len(set(splits)) < len(splits):
        raise ValueError(
            f"plan.split_steps {', '.join(map(str, splits))} with branch factors {', '.join(map(str, factors))}: give "
            f"a factor per step, each step once, and all below {config.num_steps - 1}, as the last step does not branch"
        )
    if len(pruned) >= config.num_steps - 1:
        raise ValueError("plan.prune_steps leaves no step to train: shorten it")
    branches = dict(zip(splits, factors, strict=True))
    rows = (
        replace(row, trained=step not in pruned, branch=branches.get(step, 1)) for step in range(config.num_steps - 1)
    )
    return Plan((*rows, Row("ode", 0.0, False)))


def anchored_plan(config: PlanConfig, options: Options, window: range, row: Row) -> Plan:
    """TempFlow-GRPO (arXiv 2508.04324) and Granular-GRPO (2510.01982): one noisy step from each state of an ODE.

    Each step of the window has a tree: the ODE's state, ``branch`` children, and the ODE from each to the end; with
    several strides, to several ends. So a reward is that of one step's noise.

    Departures from the papers: 1. the steps of an iteration are trained together, in ``updates_per_rollout`` optimizer
    steps at random, where Granular-GRPO takes one per step; 2. its "singular" noise of the first step is that of
    ``flow_sde``, with sigma' under the root.
    """
    if len(config.factors) != 1:
        raise ValueError(
            f"plan.preset {config.preset!r} branches once: give plan.branch one number, the children of a state"
        )
    if not window:
        raise ValueError("plan.window_range has no step to branch at: give LOW,HIGH with LOW below HIGH")
    strides = tuple(options.get("strides", (1,)))
    if len(set(strides)) < len(strides) or not strides:
        raise ValueError(f"plan.strides {', '.join(map(str, strides))}: give each stride once, and at least one")
    ode, branching = Row(options["ode_solver"], 0.0, False), replace(row, branch=config.factors[0])
    rows = tuple(branching if step in window else ode for step in range(config.num_steps))
    return Plan(rows, tuple(window), strides)
