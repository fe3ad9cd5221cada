"""What a run of Flow-GRPO costs."""

from __future__ import annotations

import torch

from diffalign.diffusion.plan import Plan, make_plan
from diffalign.rollout.buffer import bytes_needed
from diffalign.rollout.prune import kept_per_level
from diffalign.rollout.tree import parents_per_tree, paths, transitions_per_tree
from diffalign.trainers.cost import (
    Cost,
    Share,
    Work,
    guided,
    on_device,
    own_images,
    own_trees,
    rollout_batches,
    rollout_eval_steps,
    rollout_updates,
    rollout_work,
)
from diffalign.trainers.flow_grpo.config import FlowGRPOConfig


def _evaluations(config: FlowGRPOConfig, plan: Plan, trees: int) -> int:
    """Return the evaluations that replay every transition of some trees once; children of one parent share one.

    With ``width_pruning: best_worst`` it is the most: kept images may come from fewer states than there could be.
    """
    if config.width_pruning == "none":
        return trees * parents_per_tree(plan) * guided(config)
    parents = sum(min(_kept(config, plan, step), _kept(config, plan, step + 1)) for step in plan.trained_steps)
    return trees * parents * guided(config)


def _kept(config: FlowGRPOConfig, plan: Plan, level: int) -> int:
    return kept_per_level(plan, config.width_pruning, level, config.width_pruning_ratio)


def _iteration(config: FlowGRPOConfig, share: Share, iteration: int, updates: int) -> Work:
    plan, trees = make_plan(config.plan, iteration, config.seed, trees=True), own_trees(config, share)
    training = updates * _evaluations(config, plan, trees // config.updates_per_rollout)
    comparing = training if config.kl_beta > 0 else 0
    comparing += _evaluations(config, plan, trees) if config.old_log_prob == "recompute" else 0
    return rollout_work(config, share, iteration) + Work(training=training, comparing=comparing)


def _checks(config: FlowGRPOConfig, share: Share) -> Work:
    """Return the work of replaying all trained steps of a batch, and one of them before and after the first update."""
    plan, size = make_plan(config.plan, 0, config.seed, trees=True), config.train_batch_size
    trees = own_trees(config, share) // max(1, len(plan.anchors))
    nodes = {
        step: min(size, trees * paths(plan.tree(index), step + 1)) for index, step in enumerate(plan.trained_steps)
    }
    evaluations = {step: -(-count // plan.rows[step].branch) for step, count in nodes.items()}
    return Work(comparing=(sum(evaluations.values()) + 2 * evaluations[plan.trained_steps[0]]) * guided(config))


def _batches(config: FlowGRPOConfig, share: Share) -> list[str]:
    plan, images = make_plan(config.plan, 0, config.seed, trees=True), own_images(config, share)
    count, trees = images // config.updates_per_rollout, own_trees(config, share) // config.updates_per_rollout
    batch, trained = min(config.train_batch_size, count), len(plan.trained_steps)
    times = min(config.train_times_per_forward, trained)
    most = "at most " if config.filters else ""
    left_out = ["images without an advantage are left out, and the others dealt evenly"] if config.filters else []
    head = (
        f"training: {config.updates_per_rollout} optimizer step(s) per iteration, {most}{count} images each and process"
    )
    if config.plan.leaves > 1:
        return [*rollout_batches(config, share), head, _transitions(config, plan, trees)]
    return [
        *rollout_batches(config, share),
        head,
        f"each accumulates {most}{-(-count // batch) * -(-trained // times)} passes: {-(-count // batch)} "
        f"micro-batch(es) of {batch} images x {trained} trained steps" + (f", {times} in a pass" if times > 1 else ""),
        *left_out,
    ]


def _transitions(config: FlowGRPOConfig, plan: Plan, trees: int) -> str:
    """Describe how many transitions of trees are trained, and in how many evaluations."""
    each, shared = transitions_per_tree(plan), parents_per_tree(plan)
    most = "at most " if config.width_pruning == "best_worst" else ""
    if config.width_pruning != "none":
        each = sum(_kept(config, plan, step + 1) for step in plan.trained_steps)
        shared = _evaluations(config, plan, 1) // guided(config)
    return (
        f"each trains {trees * each} transitions of {trees} trees, in {most}{trees * shared} evaluations: those from "
        "one state share one"
    )


def _stored(config: FlowGRPOConfig, latent: tuple[int, ...], share: Share) -> int:
    """Return the bytes of the buffer, and of the rows that other processes send for an update."""
    plan, means = make_plan(config.plan, 0, config.seed, trees=True), config.means
    trees = own_trees(config, share)
    received = trees // config.updates_per_rollout if config.filters and share.world > 1 else 0
    own, more = (bytes_needed(plan.tree(0), n, latent, torch.float32, means=means) for n in (trees, received))
    return on_device(own, more)


COST = Cost(
    updates=rollout_updates,
    iteration=_iteration,
    checks=_checks,
    eval_steps=rollout_eval_steps,
    batches=_batches,
    passes=lambda config: (
        config.rollout_batch_size,
        config.train_batch_size * config.train_times_per_forward * guided(config),
    ),
    stored=_stored,
)
