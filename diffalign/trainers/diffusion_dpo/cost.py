"""What a run of Diffusion-DPO costs."""

from __future__ import annotations

import math

import torch

from diffalign.diffusion.plan import make_plan
from diffalign.losses.registry import get_loss
from diffalign.rollout.buffer import bytes_needed
from diffalign.trainers.cost import (
    Cost,
    Share,
    Work,
    guided,
    on_device,
    own_trees,
    rollout_batches,
    rollout_eval_steps,
    rollout_work,
)
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig


def _examples(config: DiffusionDPOConfig, share: Share) -> int:
    """Return the pairs or single images of an iteration; online, the largest possible number."""
    if not config.online:
        return config.num_pairs // share.world
    kind, groups, best_worst = (
        get_loss(config.loss),
        config.num_groups // share.world,
        config.data.rollouts.rule == "best_worst",
    )
    if kind.paired:
        return groups * (1 if best_worst else math.comb(config.group_size, 2))
    # Of all pairs, every image is in one, and every image but the worst wins one.
    return groups * ((2 if best_worst else config.group_size) - kind.liked_only)


def _sides(config: DiffusionDPOConfig) -> int:
    return 2 if get_loss(config.loss).paired else 1


def _iteration(config: DiffusionDPOConfig, share: Share, iteration: int, updates: int) -> Work:
    count = _examples(config, share)
    training = -(-count // _updates(config)) * updates * _sides(config)
    sampling = rollout_work(config, share, iteration) if config.online else _self_play(config, count)
    return sampling + Work(training=training, comparing=training if config.compares else 0)


def _self_play(config: DiffusionDPOConfig, count: int) -> Work:
    """Return the work of sampling losers with the reference."""
    if config.losers == "data":
        return Work()
    return Work(generated=count, sampling=count * config.plan.num_steps * guided(config))


def _checks(config: DiffusionDPOConfig, share: Share) -> Work:
    rows = min(config.train_batch_size, _examples(config, share)) * _sides(config)
    return Work(comparing=2 * rows * (2 if config.compares else 1))


def _updates(config: DiffusionDPOConfig) -> int:
    return config.updates_per_rollout if config.online else 1


def _batches(config: DiffusionDPOConfig, share: Share) -> list[str]:
    count = _examples(config, share)
    each = -(-count // _updates(config))
    batch, noun = min(config.train_batch_size, each), "pairs" if _sides(config) == 2 else "images"
    most = "at most " if config.online else ""
    drawn = min(config.rollout_batch_size, count)
    losers = [
        f"sampling of losers: {-(-count // drawn)} micro-batch(es) of {drawn} images, {config.plan.num_steps} steps"
    ]
    return [
        *(rollout_batches(config, share) if config.online else losers if config.losers == "reference" else []),
        f"training: {most}{count * share.world} {noun} per iteration over {share.world} process(es): {count} each",
        f"each of {_updates(config)} optimizer step(s) accumulates {-(-each // batch)} passes of {batch} {noun}",
    ]


def _stored(config: DiffusionDPOConfig, latent: tuple[int, ...], share: Share) -> int:
    pairs = _examples(config, share) * _sides(config) * torch.Size(latent).numel() * torch.float32.itemsize
    if not config.online:
        return pairs
    plan = make_plan(config.plan, 0, config.seed, trees=True)
    return on_device(bytes_needed(plan, own_trees(config, share), latent, torch.float32), pairs)


COST = Cost(
    updates=_updates,
    iteration=_iteration,
    checks=_checks,
    eval_steps=rollout_eval_steps,
    batches=_batches,
    passes=lambda config: (config.rollout_batch_size, config.train_batch_size * _sides(config)),
    stored=_stored,
)
