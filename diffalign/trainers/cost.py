"""Costs of algorithms: images through the denoiser and bytes stored, computed from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

import torch

from diffalign.diffusion.plan import make_plan
from diffalign.rollout.anchored import anchored_evaluations
from diffalign.rollout.config import RolloutConfig
from diffalign.rollout.generate import shared_steps
from diffalign.rollout.pinned_memory import pinned
from diffalign.rollout.sampler import micro_batches
from diffalign.rollout.tree import paths, trees_per_group


@dataclass(frozen=True)
class Work:
    """Number of images through the denoiser; guidance that takes two evaluations counts as two.

    Attributes:
        generated: Images that are sampled to train on.
        sampling: Evaluations without gradients that sample them.
        training: Evaluations with a backward pass.
        comparing: Forward passes of the reference, of recomputed calls and of the checks at the first step.
        evaluating: Evaluations that sample held-out images and monitor the training.
        judged: Images decoded and scored with a gradient; no evaluations of the denoiser.
    """

    generated: int = 0
    sampling: int = 0
    training: int = 0
    comparing: int = 0
    evaluating: int = 0
    judged: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __rmul__(self, count: int) -> Work:
        return Work(*(count * number for number in astuple(self)))

    @property
    def evaluations(self) -> int:
        """Total number of evaluations of the denoiser."""
        return self.sampling + self.training + self.comparing + self.evaluating


@dataclass(frozen=True)
class Share:
    """Rank of a process among ``world`` processes."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Cost:
    """Cost functions of an algorithm. ``config`` is a validated configuration.

    Attributes:
        updates: ``updates(config)``: optimizer steps per iteration.
        iteration: ``iteration(config, share, iteration, updates)``: upper bound on the work of so many updates of an
            iteration; images without an advantage and groups without a pair cost less.
        checks: ``checks(config, share)``: work of the checks around the first step.
        eval_steps: ``eval_steps(config)``: sampling steps of an evaluation.
        batches: ``batches(config, share)``: lines that describe how an iteration is split.
        passes: ``passes(config)``: images per pass (while sampling, while training).
        stored: ``stored(config, latent shape, share)``: bytes of an iteration's data on the device.
        watched: ``watched(config, held_out)``: evaluations besides the images of so many held-out prompts.
    """

    updates: Callable[[Any], int]
    iteration: Callable[[Any, Share, int, int], Work]
    checks: Callable[[Any, Share], Work]
    eval_steps: Callable[[Any], int]
    batches: Callable[[Any, Share], list[str]]
    passes: Callable[[Any], tuple[int, int]]
    stored: Callable[[Any, tuple[int, ...], Share], int]
    watched: Callable[[Any, int], int] = lambda config, held_out: 0


def guided(config: Any) -> int:
    """Return the evaluations per image and sampling step; the guidance scale is the weight of the positive output."""
    return 2 if (config.guidance_scale or 0) > 1 else 1


def own_images(config: RolloutConfig, share: Share) -> int:
    """Return this process's images per iteration."""
    return config.num_groups * config.group_size // share.world


def own_trees(config: RolloutConfig, share: Share) -> int:
    """Return this process's trees per iteration; images, if the plan does not branch."""
    return own_images(config, share) // config.plan.leaves


@lru_cache
def _nodes_of_a_rollout(trees: int, first: int, per_group: int, batch: int, shared: int, after: int) -> int:
    """Count sampled nodes; a group takes its ``shared`` first steps once per micro-batch.

    after: nodes per tree after the shared steps, one per step in a chain.
    """
    total = 0
    for rows in micro_batches(trees, batch):
        own = range(first, first + trees)[rows]
        total += shared * len({row // per_group for row in own}) + after * len(own)
    return total


def rollout_work(config: RolloutConfig, share: Share, iteration: int) -> Work:
    """Return the work of sampling a rollout: each node of each tree once."""
    trees, plan = own_trees(config, share), make_plan(config.plan, iteration, config.seed, trees=True)
    if plan.anchors:
        evaluations = anchored_evaluations(plan, config.num_groups // share.world, trees)
        return Work(generated=own_images(config, share), sampling=evaluations * guided(config))
    shared = shared_steps(plan) if config.shared_start else 0
    after = sum(paths(plan, step) for step in range(shared, len(plan)))
    per_group, first = trees_per_group(plan, config.group_size), share.rank * trees
    nodes = _nodes_of_a_rollout(trees, first, per_group, config.rollout_batch_size, shared, after)
    return Work(generated=own_images(config, share), sampling=nodes * guided(config))


def on_device(buffer: int, more: int) -> int:
    """Return the bytes on the device of a buffer and the data derived from it; 0 if both are in pinned memory."""
    outside = torch.cuda.is_available() and pinned(buffer, torch.device("cuda"))
    return 0 if outside else buffer + more


def rollout_batches(config: RolloutConfig, share: Share) -> list[str]:
    """Describe the batches of a rollout."""
    count, batch = own_images(config, share), min(config.rollout_batch_size, own_images(config, share))
    return [
        f"{config.num_groups} prompts x {config.group_size} images = {config.num_groups * config.group_size} images "
        f"per iteration over {share.world} process(es): {count} each",
        f"sampling: {-(-count // batch)} micro-batch(es) of {batch} images, {config.plan.num_steps} steps",
    ]


def rollout_updates(config: RolloutConfig) -> int:
    """Return the optimizer steps per rollout."""
    return config.updates_per_rollout


def rollout_eval_steps(config: RolloutConfig) -> int:
    """Return the sampling steps of an evaluation."""
    return config.eval_num_steps or config.plan.num_steps
