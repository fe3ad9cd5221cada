"""What each trainer computes; a new one joins by a line of ``METHODS``."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from diffalign.diffusion.plan import make_plan
from diffalign.forecast.cost import Method, Share, Work, guided
from diffalign.forecast.refl import REFL
from diffalign.losses.registry import get_loss
from diffalign.rollout.buffer import bytes_needed
from diffalign.rollout.generate import shared_steps
from diffalign.rollout.pinned_memory import pinned
from diffalign.rollout.sampler import micro_batches
from diffalign.trainers.collector import RolloutConfig
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig
from diffalign.trainers.flow_grpo.config import FlowGRPOConfig

# Rollouts -----------------------------------------------------------------------------------------------------------


def _images(args: RolloutConfig, share: Share) -> int:
    return args.num_groups * args.group_size // share.world


@lru_cache
def _steps_of_a_rollout(images: int, first: int, group_size: int, batch: int, steps: int, shared: int) -> int:
    """Images times steps; a group makes the steps that it shares once per micro-batch."""
    total = 0
    for rows in micro_batches(images, batch):
        groups = {(first + row) // group_size for row in range(images)[rows]}
        total += shared * len(groups) + (steps - shared) * len(range(images)[rows])
    return total


def _rollout(args: RolloutConfig, share: Share, iteration: int) -> Work:
    images, plan = _images(args, share), make_plan(args.plan, iteration, args.seed)
    shared = shared_steps(plan) if args.shared_start else 0
    first = share.rank * images
    steps = _steps_of_a_rollout(images, first, args.group_size, args.rollout_batch_size, len(plan), shared)
    return Work(generated=images, sampling=steps * guided(args))


def _stored(buffer: int, more: int) -> int:
    """Bytes on the device of a buffer, and of what is made of it, which is where it is."""
    outside = torch.cuda.is_available() and pinned(buffer, torch.device("cuda"))
    return 0 if outside else buffer + more


def _rollout_batches(args: RolloutConfig, share: Share) -> list[str]:
    images, batch = _images(args, share), min(args.rollout_batch_size, _images(args, share))
    return [
        f"{args.num_groups} prompts x {args.group_size} images = {args.num_groups * args.group_size} images per "
        f"iteration over {share.world} process(es): {images} each",
        f"sampling: {-(-images // batch)} micro-batch(es) of {batch} images, {args.plan.num_steps} steps",
    ]


def _rollout_updates(args: RolloutConfig) -> int:
    return args.updates_per_rollout


def _rollout_eval_steps(args: RolloutConfig) -> int:
    return args.eval_num_steps or args.plan.num_steps


# Flow-GRPO ----------------------------------------------------------------------------------------------------------


def _grpo_iteration(args: FlowGRPOConfig, share: Share, iteration: int, updates: int) -> Work:
    images, trained = _images(args, share), len(make_plan(args.plan, iteration, args.seed).trained_steps)
    training = images * updates // args.updates_per_rollout * trained * guided(args)
    comparing = training if args.kl_beta > 0 else 0
    comparing += images * trained * guided(args) if args.old_log_prob == "recompute" else 0
    return _rollout(args, share, iteration) + Work(training=training, comparing=comparing)


def _grpo_checks(args: FlowGRPOConfig, share: Share) -> Work:
    """Every trained step of a batch before the first update, and one of them on both sides of it."""
    trained = len(make_plan(args.plan, 0, args.seed).trained_steps)
    return Work(comparing=min(args.train_batch_size, _images(args, share)) * (trained + 2) * guided(args))


def _grpo_batches(args: FlowGRPOConfig, share: Share) -> list[str]:
    images = _images(args, share) // args.updates_per_rollout
    batch, trained = min(args.train_batch_size, images), len(make_plan(args.plan, 0, args.seed).trained_steps)
    most = "at most " if args.filters else ""
    left_out = ["images without an advantage are left out, and the others dealt evenly"] if args.filters else []
    return [
        *_rollout_batches(args, share),
        f"training: {args.updates_per_rollout} optimizer step(s) per iteration, {most}{images} images each and process",
        f"each accumulates {most}{-(-images // batch) * trained} passes: {-(-images // batch)} micro-batch(es) of "
        f"{batch} images x {trained} trained steps",
        *left_out,
    ]


def _grpo_stored(args: FlowGRPOConfig, latent: tuple[int, int, int], share: Share) -> int:
    """An update that is dealt samples of other processes has those that it goes through once more."""
    plan, means, images = make_plan(args.plan, 0, args.seed), args.loss == "grpo_guard", _images(args, share)
    again = images // args.updates_per_rollout if args.filters and share.world > 1 else 0
    own, more = (bytes_needed(plan, n, latent, torch.float32, means=means) for n in (images, again))
    return _stored(own, more)


def _grpo_copies(args: FlowGRPOConfig) -> int:
    return (args.ema_decay > 0) + (args.lora.rank == 0 and args.kl_beta > 0)


# Diffusion-DPO ------------------------------------------------------------------------------------------------------


def _examples(args: DiffusionDPOConfig, share: Share) -> int:
    """Pairs or single images of an iteration; of a model's own images, the most that there can be."""
    if not args.online:
        return args.num_pairs // share.world
    kind, groups, best_worst = (
        get_loss(args.loss),
        args.num_groups // share.world,
        args.data.rollouts.rule == "best_worst",
    )
    if kind.paired:
        return groups * (1 if best_worst else math.comb(args.group_size, 2))
    # Of all pairs, every image is in one, and every image but the worst wins one.
    return groups * ((2 if best_worst else args.group_size) - kind.liked_only)


def _sides(args: DiffusionDPOConfig) -> int:
    return 2 if get_loss(args.loss).paired else 1


def _compares(args: DiffusionDPOConfig) -> bool:
    kind = get_loss(args.loss)
    return kind.reference or (kind.paired and args.objective().needs_reference)


def _dpo_iteration(args: DiffusionDPOConfig, share: Share, iteration: int, updates: int) -> Work:
    count = _examples(args, share)
    training = -(-count // _dpo_updates(args)) * updates * _sides(args)
    rollout = _rollout(args, share, iteration) if args.online else _self_play(args, count)
    return rollout + Work(training=training, comparing=training if _compares(args) else 0)


def _self_play(args: DiffusionDPOConfig, count: int) -> Work:
    """The losers that the reference draws, each from a start of its own."""
    if args.losers == "data":
        return Work()
    return Work(generated=count, sampling=count * args.plan.num_steps * guided(args))


def _dpo_checks(args: DiffusionDPOConfig, share: Share) -> Work:
    rows = min(args.train_batch_size, _examples(args, share)) * _sides(args)
    return Work(comparing=2 * rows * (2 if _compares(args) else 1))


def _dpo_updates(args: DiffusionDPOConfig) -> int:
    return args.updates_per_rollout if args.online else 1


def _dpo_batches(args: DiffusionDPOConfig, share: Share) -> list[str]:
    count = _examples(args, share)
    each = -(-count // _dpo_updates(args))
    batch, noun = min(args.train_batch_size, each), "pairs" if _sides(args) == 2 else "images"
    most = "at most " if args.online else ""
    drawn = min(args.rollout_batch_size, count)
    losers = [
        f"sampling of losers: {-(-count // drawn)} micro-batch(es) of {drawn} images, {args.plan.num_steps} steps"
    ]
    return [
        *(_rollout_batches(args, share) if args.online else losers if args.losers == "reference" else []),
        f"training: {most}{count * share.world} {noun} per iteration over {share.world} process(es): {count} each",
        f"each of {_dpo_updates(args)} optimizer step(s) accumulates {-(-each // batch)} passes of {batch} {noun}",
    ]


def _dpo_stored(args: DiffusionDPOConfig, latent: tuple[int, int, int], share: Share) -> int:
    pairs = _examples(args, share) * _sides(args) * torch.Size(latent).numel() * torch.float32.itemsize
    if not args.online:
        return pairs
    plan = make_plan(args.plan, 0, args.seed)
    return _stored(bytes_needed(plan, _images(args, share), latent, torch.float32), pairs)


def _dpo_copies(args: DiffusionDPOConfig) -> int:
    moving = bool(args.reference_decay or args.reference_steps)
    return (args.ema_decay > 0) + (_compares(args) and (moving or args.lora.rank == 0))


# --------------------------------------------------------------------------------------------------------------------

METHODS: dict[str, Method] = {
    "refl": REFL,
    "flow_grpo": Method(
        updates=_rollout_updates,
        iteration=_grpo_iteration,
        checks=_grpo_checks,
        eval_steps=_rollout_eval_steps,
        batches=_grpo_batches,
        passes=lambda args: (args.rollout_batch_size, args.train_batch_size * guided(args)),
        stored=_grpo_stored,
        copies=_grpo_copies,
    ),
    "diffusion_dpo": Method(
        updates=_dpo_updates,
        iteration=_dpo_iteration,
        checks=_dpo_checks,
        eval_steps=_rollout_eval_steps,
        batches=_dpo_batches,
        passes=lambda args: (args.rollout_batch_size, args.train_batch_size * _sides(args)),
        stored=_dpo_stored,
        copies=_dpo_copies,
    ),
}
