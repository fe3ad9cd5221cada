"""What a run of ReFL computes: the courses that it will draw, drawn here."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from diffalign.diffusion.reward_gradient_presets import Recipe
from diffalign.diffusion.trajectory import GradientPath
from diffalign.forecast.cost import Method, Share, Work, guided
from diffalign.models import DiffusionModel
from diffalign.rng import KeyedRNG
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.sampler import micro_batches
from diffalign.trainers.refl.algorithm import ReFLTrainer
from diffalign.trainers.refl.config import ReFLConfig
from diffalign.trainers.refl.hacking_monitor import PROBES
from diffalign.trainers.refl.initial_states import draw_courses, places


def _images(args: ReFLConfig, share: Share) -> int:
    return args.num_groups * args.group_size // share.world


def _batches(args: ReFLConfig, share: Share, iteration: int) -> list[tuple[int, tuple[GradientPath, ...]]]:
    """(images, courses) of each batch that is sampled together."""
    images, recipe, noise = _images(args, share), args.recipe.resolve(), KeyedRNG(args.seed)
    first = share.rank * images
    return [
        (
            len(range(images)[rows]),
            draw_courses(recipe, noise, iteration, divmod(first + rows.start, args.group_size)),
        )
        for rows in micro_batches(images, args.rollout_batch_size)
    ]


@lru_cache
def _stored(folder: Path) -> tuple[int, ...]:
    """The steps whose states a rollout buffer on disk keeps."""
    buffer = RolloutBuffer.load(folder)
    return tuple(buffer.step[: buffer.nodes_per_sample].tolist())


def _begin(args: ReFLConfig, recipe: Recipe, latest: int) -> int:
    """Where samplings begin that are needed from place ``latest`` on."""
    if args.train_rollouts:
        return max((step for step in _stored(args.train_rollouts) if step <= latest), default=latest)
    return recipe.first


def _taught(args: ReFLConfig, recipe: Recipe) -> Work:
    """The evaluations of a recorded call of an image."""
    free = 1 if recipe.guidance == "detached" and guided(args) == 2 else 0
    training = 1 if recipe.guidance == "off" else guided(args) - free
    again = training + free if args.step_checkpointing else 0
    return Work(training=training, comparing=free + again)


def _unrolled(args: ReFLConfig, recipe: Recipe, course: GradientPath) -> Work:
    """The evaluations of a course of an image, its regulariser included."""
    recorded = sum(move.gradient for move in course.moves)
    call = _taught(args, recipe)
    alike = 1 if recipe.guidance == "off" else guided(args)
    comparing = recorded * call.comparing + (len(course.moves) - recorded) * guided(args)
    comparing += recorded * alike if recipe.regulariser == "reference" else 0
    images = recipe.regulariser == "pretraining"
    return Work(training=recorded * call.training + images, comparing=comparing, judged=1)


def _iteration(args: ReFLConfig, share: Share, iteration: int, updates: int) -> Work:
    recipe, total = args.recipe.resolve(), Work()
    for count, courses in _batches(args, share, iteration):
        kept = places(courses, recipe.num_steps)
        steps = kept[-1] - _begin(args, recipe, kept[0])
        one = sum((_unrolled(args, recipe, course) for course in courses), Work(generated=1))
        total += count * (one + Work(sampling=steps * guided(args)))
    return total


def _checks(args: ReFLConfig, share: Share) -> Work:
    """The first course of the first batch, on both sides of the first update."""
    recipe = args.recipe.resolve()
    count, courses = _batches(args, share, 0)[0]
    recorded = sum(move.gradient for move in courses[0].moves)
    alike = 1 if recipe.guidance == "off" else guided(args)
    calls = recorded * alike + (len(courses[0].moves) - recorded) * guided(args)
    return Work(comparing=2 * min(args.train_batch_size, count) * calls)


def _eval_steps(args: ReFLConfig) -> int:
    return args.eval_num_steps or args.recipe.num_steps


def _kept(args: ReFLConfig) -> bool:
    """Whether the base's weights are there to compare with."""
    recipe = args.recipe.resolve()
    return bool(args.lora.rank or recipe.negative or recipe.regulariser == "reference" or args.base_share)


def _watched(args: ReFLConfig, held_out: int) -> int:
    """The distance to the reference: a sampling, and both weight sets along it."""
    return 3 * min(held_out, PROBES) * _eval_steps(args) * guided(args) if _kept(args) else 0


def _lines(args: ReFLConfig, share: Share) -> list[str]:
    images, recipe = _images(args, share), args.recipe.resolve()
    sampled, batch = min(args.rollout_batch_size, images), min(args.train_batch_size, args.rollout_batch_size, images)
    sizes, courses = zip(*_batches(args, share, 0), strict=True)
    parts = sum(-(-size // batch) for size in sizes)
    stops = [f"early stopping may end it after {args.early_stopping} evaluations"] if args.early_stopping else []
    return [
        f"{args.num_groups} prompts x {args.group_size} images = {args.num_groups * args.group_size} images per "
        f"optimizer step over {share.world} process(es): {images} each",
        f"sampling: {-(-images // sampled)} micro-batch(es) of {sampled} images, at most {recipe.num_steps} steps",
        f"each optimizer step accumulates {parts * len(courses[0])} passes: {parts} micro-batch(es) of {batch} "
        f"images x {len(courses[0])} course(s)",
        *stops,
    ]


def _latents(args: ReFLConfig, latent: tuple[int, int, int], share: Share) -> int:
    steps = args.recipe.num_steps
    nodes = sum(count * len(places(courses, steps)) for count, courses in _batches(args, share, 0))
    return nodes * torch.Size(latent).numel() * torch.float32.itemsize


def _copies(args: ReFLConfig) -> int:
    reference = args.lora.rank == 0 and (args.recipe.resolve().regulariser == "reference" or args.base_share > 0)
    return (args.ema_decay > 0) + reference + (args.early_stopping > 0)


def _train(args: ReFLConfig, model: DiffusionModel) -> None:
    # A negative prompt is a few kilobytes, and needs text encoders to begin at.
    if not args.recipe.resolve().negative:
        model.train(args.lora)


def _passes(args: ReFLConfig) -> tuple[int, int]:
    recipe = args.recipe.resolve()
    return args.rollout_batch_size, args.train_batch_size * (1 if recipe.guidance == "off" else guided(args))


REFL = Method(
    updates=lambda args: 1,
    iteration=_iteration,
    checks=_checks,
    eval_steps=_eval_steps,
    batches=_lines,
    passes=_passes,
    stored=_latents,
    copies=_copies,
    watched=_watched,
    train=_train,
    grad_through=ReFLTrainer.grad_through,
)
