"""What a run of forward-process RL costs, and which outputs its passes need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.diffusion.plan import make_plan
from diffalign.losses.registry import get_forward_objective
from diffalign.models.weights import POLICY, REFERENCE
from diffalign.rollout.buffer import bytes_needed
from diffalign.trainers.cost import (
    Cost,
    Share,
    Work,
    on_device,
    own_images,
    rollout_batches,
    rollout_eval_steps,
    rollout_updates,
    rollout_work,
)
from diffalign.trainers.forward_rl.config import ForwardRLConfig
from diffalign.trainers.forward_rl.copies import ROLES, weight_sets
from diffalign.trainers.forward_rl.lag import Lag


@dataclass(frozen=True)
class Needs:
    """Outputs that a run needs besides the policy's; roles are "old", "ema", "reference" and "guided" (reference).

    Attributes:
        lags: Role -> lag, of the roles "sample", "old" and "ema" that the run has.
        sets: Roles of the passes with gradients.
        statistic: The objective's statistic over groups or over times, if it wants one.
        over: What the statistic's mean is over: "group" or "image".
        statistic_sets: Roles of the passes that compute it.
        first_pass: Whether the statistic takes passes of its own, because passes do not have whole groups, or all times
            of their images.
        filters: Whether images with zero advantage are skipped.
    """

    lags: dict[str, Lag]
    sets: frozenset[str]
    statistic: Callable[..., Tensor] | None
    over: str
    statistic_sets: frozenset[str]
    first_pass: bool
    filters: bool

    @property
    def reference(self) -> bool:
        """Whether the base model is needed."""
        return bool({"reference", "guided"} & (self.sets | self.statistic_sets))


def whole(config: ForwardRLConfig, processes: int, over: str) -> bool:
    """Return whether every pass has whole groups of images or, over an "image", all of its times."""
    if over == "image":
        return config.train_times_per_forward >= config.times_per_image
    sizes = (config.train_batch_size, config.num_groups * config.group_size // processes)
    return config.updates_per_rollout == 1 and not any(size % config.group_size for size in sizes)


def needs(config: ForwardRLConfig, processes: int) -> Needs:
    """Return what a configuration needs over so many processes; what has weight 0 is not needed."""
    method = config.method
    objective = get_forward_objective(method.objective)
    options = objective.resolve(method.objective_options)
    guided = method.reference_guidance is not None
    anchored = {"ema": method.ema_weight > 0, "guided": method.reference_weight > 0 and guided}
    reference = objective.reference or (method.reference_weight > 0 and not guided)
    own = {"old": objective.wants("old", options), "reference": reference, **anchored}

    statistic = objective.statistic if objective.wants("statistic", options) else None
    statistic_sets = frozenset(role for role in ("old", "reference") if objective.wants(f"statistic_{role}", options))
    sets = frozenset(role for role, needed in own.items() if needed)
    first_pass = statistic is not None and not whole(config, processes, objective.statistic_over)
    if not first_pass:
        sets |= statistic_sets
    roles = {"sample"} | ((sets | statistic_sets) & {"old", "ema"})
    lags: dict[str, Any] = {role: getattr(method, name) for role, name in ROLES.items() if role in roles}
    plain = objective.skips_zero(options) and not (method.reference_weight or method.ema_weight)
    filters = plain and config.filter_zero_advantage
    return Needs(lags, sets, statistic, objective.statistic_over, statistic_sets, first_pass, filters)


def _compared(config: ForwardRLConfig, required: Needs, roles: frozenset[str]) -> int:
    """Return the evaluations per image and time of the weight sets of roles, besides the policy's."""
    names = weight_sets(required.lags, config.updates_per_rollout)
    sets = {REFERENCE if role == "reference" else names[role] for role in roles - {"guided"}} - {POLICY}
    scale = config.method.reference_guidance or 0
    return len(sets) + ((2 if scale > 1 else 1) if "guided" in roles else 0)


def _iteration(config: ForwardRLConfig, share: Share, iteration: int, updates: int) -> Work:
    required = needs(config, share.world)
    count = own_images(config, share) * updates // config.updates_per_rollout * config.times_per_image
    comparing = _compared(config, required, required.sets)
    if required.first_pass:
        comparing += 1 + _compared(config, required, required.statistic_sets)
    return rollout_work(config, share, iteration) + Work(training=count, comparing=count * comparing)


def _checks(config: ForwardRLConfig, share: Share) -> Work:
    """Return the work of comparing lagged copies with the policy, and of the probes around the first update."""
    rows = min(config.train_batch_size, own_images(config, share)) * min(
        config.train_times_per_forward, config.times_per_image
    )
    required = needs(config, share.world)
    lagged = _compared(config, required, frozenset(required.lags) - {"sample"})
    return Work(comparing=rows * (2 + (1 + lagged if lagged else 0)))


def _batches(config: ForwardRLConfig, share: Share) -> list[str]:
    required, times = needs(config, share.world), config.times_per_image
    count = own_images(config, share) // config.updates_per_rollout
    batch, per_pass = min(config.train_batch_size, count), min(config.train_times_per_forward, times)
    most = "at most " if required.filters else ""
    passes = -(-count // batch) * -(-times // per_pass)
    compared = _compared(config, required, required.sets)
    first = 1 + _compared(config, required, required.statistic_sets) if required.first_pass else 0
    return [
        *rollout_batches(config, share),
        f"training: {config.updates_per_rollout} optimizer step(s) per iteration, {most}{count} images each and "
        "process",
        f"each accumulates {most}{passes} passes of {batch} images at {per_pass} of {times} times",
        f"per image: {times} x (1 training + {compared + first} comparing) evaluations",
    ]


def _stored(config: ForwardRLConfig, latent: tuple[int, ...], share: Share) -> int:
    """Return the bytes of the final latents, and of those that other processes send for an update."""
    plan, count = make_plan(config.plan, 0, config.seed), own_images(config, share)
    received = count // config.updates_per_rollout if needs(config, share.world).filters and share.world > 1 else 0
    own, more = (bytes_needed(plan, n, latent, torch.float32, steps=(len(plan),)) for n in (count, received))
    return on_device(own, more)


COST = Cost(
    updates=rollout_updates,
    iteration=_iteration,
    checks=_checks,
    eval_steps=rollout_eval_steps,
    batches=_batches,
    passes=lambda config: (
        config.rollout_batch_size,
        config.train_batch_size * min(config.train_times_per_forward, config.times_per_image),
    ),
    stored=_stored,
)
