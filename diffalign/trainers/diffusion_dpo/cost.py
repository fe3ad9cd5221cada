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
from diffalign.trainers.diffusion_dpo.step_pairs import compared_steps


def _steps(config: DiffusionDPOConfig, iteration: int) -> tuple[int, ...]:
    return compared_steps(config.plan, config.siblings.resolve(), config.seed, iteration)


def _examples(config: DiffusionDPOConfig, share: Share, iteration: int = 0) -> int:
    """Return the pairs or single images of an iteration; online, the largest possible number."""
    if not config.online:
        return config.num_pairs // share.world
    if config.pairs == "siblings":
        pairs = 1 if config.data.rollouts.rule == "best_worst" else math.comb(config.group_size, 2)
        return config.num_groups // share.world * pairs * len(_steps(config, iteration))
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
    """Return the evaluations that each example takes: siblings share one, and steps are evaluated with guidance."""
    if config.pairs == "siblings":
        return (1 if config.compares_children else 2) * guided(config)
    return 2 if get_loss(config.loss).paired else 1


def _iteration(config: DiffusionDPOConfig, share: Share, iteration: int, updates: int) -> Work:
    count = _examples(config, share, iteration)
    training = -(-count // _updates(config)) * updates * _sides(config)
    if config.compares_children:
        sampling = _children(config, share, iteration)
    else:
        sampling = rollout_work(config, share, iteration) if config.online else _self_play(config, count)
    return sampling + Work(training=training, comparing=training if config.compares else 0)


def _children(config: DiffusionDPOConfig, share: Share, iteration: int) -> Work:
    """Return the work of sampling paths up to their last compared step, with the children of each compared state.

    A nudge evaluates the winner with a gradient, and where it goes on once more.
    """
    groups, steps = config.num_groups // share.world, _steps(config, iteration)
    judged = groups * len(steps) * config.group_size
    sampling = groups * (1 + steps[-1] + 1 - len(steps)) + judged
    nudged = groups * len(steps) if config.siblings.resolve().nudge else 0
    again = groups * (len(steps) - 1) if nudged else 0
    return Work(
        generated=judged,
        sampling=(sampling + again) * guided(config),
        training=nudged * guided(config),
        judged=nudged,
    )


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
    batch, noun = min(config.train_batch_size, each), "pairs" if get_loss(config.loss).paired else "images"
    most = "at most " if config.online else ""
    drawn = min(config.rollout_batch_size, count)
    losers = [
        f"sampling of losers: {-(-count // drawn)} micro-batch(es) of {drawn} images, {config.plan.num_steps} steps"
    ]
    sampled = _paths(config, share) if config.compares_children else rollout_batches(config, share)
    return [
        *(sampled if config.online else losers if config.losers == "reference" else []),
        f"training: {most}{count * share.world} {noun} per iteration over {share.world} process(es): {count} each",
        f"each of {_updates(config)} optimizer step(s) accumulates {-(-each // batch)} passes of {batch} {noun}",
    ]


def _paths(config: DiffusionDPOConfig, share: Share) -> list[str]:
    steps, paths = _steps(config, 0), config.num_groups // share.world
    each = min(paths, max(1, config.rollout_batch_size // config.group_size))
    return [
        f"{config.num_groups} prompts, a path each, over {share.world} process(es): {paths} each, with "
        f"{config.group_size} children at {len(steps)} steps",
        f"sampling: {-(-paths // each)} micro-batch(es) of {each} paths, {steps[-1] + 1} of "
        f"{config.plan.num_steps} steps",
    ]


def _stored(config: DiffusionDPOConfig, latent: tuple[int, ...], share: Share) -> int:
    size = torch.Size(latent).numel() * torch.float32.itemsize
    images = 2 if get_loss(config.loss).paired else 1
    if config.compares_children:
        states = config.num_groups // share.world * len(_steps(config, 0))
        return (states * (1 + config.group_size) + _examples(config, share) * 3) * size
    pairs = _examples(config, share) * (4 if config.pairs == "siblings" else images) * size
    if not config.online:
        return pairs
    plan = make_plan(config.plan, 0, config.seed, trees=True)
    return on_device(bytes_needed(plan.tree(0), own_trees(config, share), latent, torch.float32), pairs)


COST = Cost(
    updates=_updates,
    iteration=_iteration,
    checks=_checks,
    eval_steps=rollout_eval_steps,
    batches=_batches,
    passes=lambda config: (config.rollout_batch_size, config.train_batch_size * _sides(config)),
    stored=_stored,
)
