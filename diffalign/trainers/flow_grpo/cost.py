"""What a run of Flow-GRPO costs."""

from __future__ import annotations

import torch

from diffalign.diffusion.plan import make_plan
from diffalign.losses.registry import get_objective
from diffalign.rollout.buffer import bytes_needed
from diffalign.trainers.cost import (
    Cost,
    Share,
    Work,
    guided,
    on_device,
    own_images,
    rollout_batches,
    rollout_eval_steps,
    rollout_updates,
    rollout_work,
)
from diffalign.trainers.flow_grpo.config import FlowGRPOConfig


def _iteration(config: FlowGRPOConfig, share: Share, iteration: int, updates: int) -> Work:
    count, trained = own_images(config, share), len(make_plan(config.plan, iteration, config.seed).trained_steps)
    training = count * updates // config.updates_per_rollout * trained * guided(config)
    comparing = training if config.kl_beta > 0 else 0
    comparing += count * trained * guided(config) if config.old_log_prob == "recompute" else 0
    return rollout_work(config, share, iteration) + Work(training=training, comparing=comparing)


def _checks(config: FlowGRPOConfig, share: Share) -> Work:
    """Return the work of replaying all trained steps of a batch, and one of them before and after the first update."""
    trained = len(make_plan(config.plan, 0, config.seed).trained_steps)
    return Work(comparing=min(config.train_batch_size, own_images(config, share)) * (trained + 2) * guided(config))


def _batches(config: FlowGRPOConfig, share: Share) -> list[str]:
    count = own_images(config, share) // config.updates_per_rollout
    batch, trained = min(config.train_batch_size, count), len(make_plan(config.plan, 0, config.seed).trained_steps)
    most = "at most " if config.filters else ""
    left_out = ["images without an advantage are left out, and the others dealt evenly"] if config.filters else []
    return [
        *rollout_batches(config, share),
        f"training: {config.updates_per_rollout} optimizer step(s) per iteration, {most}{count} images each and "
        "process",
        f"each accumulates {most}{-(-count // batch) * trained} passes: {-(-count // batch)} micro-batch(es) of "
        f"{batch} images x {trained} trained steps",
        *left_out,
    ]


def _stored(config: FlowGRPOConfig, latent: tuple[int, ...], share: Share) -> int:
    """Return the bytes of the buffer, and of the rows that other processes send for an update."""
    plan, means, count = (
        make_plan(config.plan, 0, config.seed),
        get_objective(config.loss).means,
        own_images(config, share),
    )
    received = count // config.updates_per_rollout if config.filters and share.world > 1 else 0
    own, more = (bytes_needed(plan, n, latent, torch.float32, means=means) for n in (count, received))
    return on_device(own, more)


def _copies(config: FlowGRPOConfig) -> int:
    return (config.ema_decay > 0) + (config.lora.rank == 0 and config.kl_beta > 0)


COST = Cost(
    updates=rollout_updates,
    iteration=_iteration,
    checks=_checks,
    eval_steps=rollout_eval_steps,
    batches=_batches,
    passes=lambda config: (config.rollout_batch_size, config.train_batch_size * guided(config)),
    stored=_stored,
    copies=_copies,
)
