"""What a run of ReFL costs: its gradient paths are drawn here as the run will draw them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from diffalign.diffusion.reward_gradient_presets import Recipe
from diffalign.diffusion.trajectory import GradientPath
from diffalign.rng import KeyedRNG
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.sampler import micro_batches
from diffalign.trainers.cost import Cost, Share, Work, guided
from diffalign.trainers.refl.config import ReFLConfig
from diffalign.trainers.refl.hacking_monitor import PROBES
from diffalign.trainers.refl.initial_states import draw_courses, places


def _images(config: ReFLConfig, share: Share) -> int:
    return config.num_groups * config.group_size // share.world


def _batches(config: ReFLConfig, share: Share, iteration: int) -> list[tuple[int, tuple[GradientPath, ...]]]:
    """List (number of images, gradient paths) of each batch that is sampled together."""
    images, recipe, noise = _images(config, share), config.recipe.resolve(), KeyedRNG(config.seed)
    first = share.rank * images
    return [
        (
            len(range(images)[rows]),
            draw_courses(recipe, noise, iteration, divmod(first + rows.start, config.group_size)),
        )
        for rows in micro_batches(images, config.rollout_batch_size)
    ]


@lru_cache
def _stored(folder: Path) -> tuple[int, ...]:
    """Return the steps whose states a rollout buffer on disk stores."""
    buffer = RolloutBuffer.load(folder)
    return tuple(buffer.step[: buffer.nodes_per_sample].tolist())


def _start(config: ReFLConfig, recipe: Recipe, latest: int) -> int:
    """Return the step at which a sampling starts that is needed from step ``latest`` on."""
    if config.train_rollouts:
        return max((step for step in _stored(config.train_rollouts) if step <= latest), default=latest)
    return recipe.first


def _recorded(config: ReFLConfig, recipe: Recipe) -> Work:
    """Return the evaluations of a recorded call of an image."""
    free = 1 if recipe.guidance == "detached" and guided(config) == 2 else 0
    training = 1 if recipe.guidance == "off" else guided(config) - free
    again = training + free if config.step_checkpointing else 0
    return Work(training=training, comparing=free + again)


def _path(config: ReFLConfig, recipe: Recipe, path: GradientPath) -> Work:
    """Return the evaluations of a gradient path of an image, its regulariser included."""
    recorded = sum(move.gradient for move in path.moves)
    call = _recorded(config, recipe)
    alike = 1 if recipe.guidance == "off" else guided(config)
    comparing = recorded * call.comparing + (len(path.moves) - recorded) * guided(config)
    comparing += recorded * alike if recipe.regulariser == "reference" else 0
    images = recipe.regulariser == "pretraining"
    return Work(training=recorded * call.training + images, comparing=comparing, judged=1)


def _iteration(config: ReFLConfig, share: Share, iteration: int, updates: int) -> Work:
    recipe, total = config.recipe.resolve(), Work()
    for count, paths in _batches(config, share, iteration):
        kept = places(paths, recipe.num_steps)
        steps = kept[-1] - _start(config, recipe, kept[0])
        one = sum((_path(config, recipe, path) for path in paths), Work(generated=1))
        total += count * (one + Work(sampling=steps * guided(config)))
    return total


def _checks(config: ReFLConfig, share: Share) -> Work:
    """Return the work of the probe: the first path of the first batch, before and after the first update."""
    recipe = config.recipe.resolve()
    count, paths = _batches(config, share, 0)[0]
    recorded = sum(move.gradient for move in paths[0].moves)
    alike = 1 if recipe.guidance == "off" else guided(config)
    calls = recorded * alike + (len(paths[0].moves) - recorded) * guided(config)
    return Work(comparing=2 * min(config.train_batch_size, count) * calls)


def _eval_steps(config: ReFLConfig) -> int:
    return config.eval_num_steps or config.recipe.num_steps


def _kept(config: ReFLConfig) -> bool:
    """Return whether the base's weights are kept to compare with."""
    recipe = config.recipe.resolve()
    return bool(config.lora.rank or recipe.negative or recipe.regulariser == "reference" or config.base_share)


def _watched(config: ReFLConfig, held_out: int) -> int:
    """Return the evaluations of the distance to the reference: a sampling, and both weight sets along it."""
    return 3 * min(held_out, PROBES) * _eval_steps(config) * guided(config) if _kept(config) else 0


def _lines(config: ReFLConfig, share: Share) -> list[str]:
    images, recipe = _images(config, share), config.recipe.resolve()
    sampled, batch = (
        min(config.rollout_batch_size, images),
        min(config.train_batch_size, config.rollout_batch_size, images),
    )
    sizes, paths = zip(*_batches(config, share, 0), strict=True)
    parts = sum(-(-size // batch) for size in sizes)
    stops = [f"early stopping may end it after {config.early_stopping} evaluations"] if config.early_stopping else []
    return [
        f"{config.num_groups} prompts x {config.group_size} images = {config.num_groups * config.group_size} images "
        f"per optimizer step over {share.world} process(es): {images} each",
        f"sampling: {-(-images // sampled)} micro-batch(es) of {sampled} images, at most {recipe.num_steps} steps",
        f"each optimizer step accumulates {parts * len(paths[0])} passes: {parts} micro-batch(es) of {batch} "
        f"images x {len(paths[0])} path(s)",
        *stops,
    ]


def _latents(config: ReFLConfig, latent: tuple[int, ...], share: Share) -> int:
    steps = config.recipe.num_steps
    nodes = sum(count * len(places(paths, steps)) for count, paths in _batches(config, share, 0))
    return nodes * torch.Size(latent).numel() * torch.float32.itemsize


def _passes(config: ReFLConfig) -> tuple[int, int]:
    recipe = config.recipe.resolve()
    return config.rollout_batch_size, config.train_batch_size * (1 if recipe.guidance == "off" else guided(config))


COST = Cost(
    updates=lambda config: 1,
    iteration=_iteration,
    checks=_checks,
    eval_steps=_eval_steps,
    batches=_lines,
    passes=_passes,
    stored=_latents,
    watched=_watched,
)
