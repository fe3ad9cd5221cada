"""Sample images and fill a rollout buffer; the size of the micro-batches changes neither prompts nor noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.diffusion.plan import Plan
from diffalign.models import DiffusionModel
from diffalign.rng import KeyedRNG
from diffalign.rollout import pinned_memory
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.sampler import SamplingPlan, Solver, micro_batches, sample
from diffalign.rollout.tree import path_table, paths
from diffalign.structures import Conditioning, StepResult

# Convolutions at image size exceed a CPU's cache in larger slices, and a GPU's memory.
DECODE_SLICE = 32  # images
DECODE_PIXELS = 1 << 20


@dataclass(frozen=True)
class NoiseKeys:
    """The keys of the noise that each sample draws, one entry per sample.

    The initial noise has the key (iteration, group, sample), that of a step (iteration, group, sample, step, *path). In
    a chain the path is empty. Samples of a group have the same initial noise with ``shared_start``.

    Attributes:
        noise: Generator of noise by key.
        stream: Name of the generator's stream.
        iteration: Iteration of the training.
        group: (B,) int64, the index of the prompt.
        sample: (B,) int64, the index of the tree in its group.
        shared_start: Whether the key of the initial noise leaves out the sample.
        path: (B, D) int64, see ``path_table``; None for chains.
    """

    noise: KeyedRNG
    stream: str
    iteration: int
    group: Tensor
    sample: Tensor
    shared_start: bool = False
    path: Tensor | None = None

    def __getitem__(self, rows: slice) -> NoiseKeys:
        """Select samples."""
        path = None if self.path is None else self.path[rows]
        return replace(self, group=self.group[rows], sample=self.sample[rows], path=path)

    def at(self, plan: Plan, level: int) -> NoiseKeys:
        """Return the keys of the nodes at a level, tree after tree and ordered by path, from those of the trees."""
        table = path_table(plan, level)
        trees, width = len(self.group), len(table)
        return replace(
            self,
            group=self.group.repeat_interleave(width),
            sample=self.sample.repeat_interleave(width),
            path=table.repeat(trees, 1),
        )

    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.group.tolist(), self.sample.tolist(), strict=True))

    def start(self, shape: tuple[int, ...]) -> Tensor:
        """Draw the initial noise: (B, *shape), float32, CPU."""
        sample_part = [(group,) if self.shared_start else (group, sample) for group, sample in self._pairs()]
        return self.noise.normal_batch(shape, f"{self.stream}/start", [(self.iteration, *part) for part in sample_part])

    def step(self, shape: tuple[int, ...], index: int) -> Tensor:
        """Draw the noise of stochastic step ``index``: (B, *shape), float32, CPU."""
        pairs = self._pairs()
        taken: list[list[int]] = [[] for _ in pairs] if self.path is None else self.path.tolist()
        keys = [
            (self.iteration, *pair, index, *(child for child in path if child >= 0))
            for pair, path in zip(pairs, taken, strict=True)
        ]
        return self.noise.normal_batch(shape, f"{self.stream}/step", keys)


def decode(model: DiffusionModel, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode latents to float32 images without gradients, in slices; the VAE may compute in ``dtype``."""
    pixels = math.prod(getattr(model, "default_resolution", ()))  # 1 for models without images of a size
    size = max(1, min(DECODE_SLICE, DECODE_PIXELS // pixels))
    with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        return torch.cat([model.decode(part) for part in torch.split(latents, size)])


def rollouts(
    model: DiffusionModel,
    plan: SamplingPlan,
    conditioning: Conditioning,
    keys: NoiseKeys,
    buffer: RolloutBuffer,
    size: int,
    decode_dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[slice, Tensor]]:
    """Sample the trees of a buffer as ``rollout_latents`` does, and yield their images.

    Args:
        decode_dtype: Dtype in which the VAE may compute.

    Yields:
        The leaves of the micro-batch, as a slice of ``buffer.leaves``, and their images: (b, 3, H, W), float32.
    """
    for leaves, final in rollout_latents(model, plan, conditioning, keys, buffer, size):
        yield leaves, decode(model, final, decode_dtype)


def rollout_latents(
    model: DiffusionModel,
    plan: SamplingPlan,
    conditioning: Conditioning,
    keys: NoiseKeys,
    buffer: RolloutBuffer,
    size: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Sample the trees of a buffer and yield their final latents, one micro-batch of leaves at a time.

    Each node is sampled once, in a batch of at most ``size`` nodes of its level, depth first.

    Args:
        conditioning: A row per group.
        keys: An entry per tree of the buffer, in its order.
        size: Largest micro-batch of the model and the VAE.

    Yields:
        The leaves of the micro-batch, as a slice of ``buffer.leaves``, and their latents: (b, C, ...). In a chain a
        leaf is a sample.

    Raises:
        ValueError: ``keys`` does not have an entry per tree of the buffer.
    """
    if len(keys.group) * paths(plan.plan, len(plan.plan)) != len(buffer.leaves):
        raise ValueError(
            f"a buffer of {len(buffer.leaves)} leaves does not hold {len(keys.group)} trees of "
            f"{paths(plan.plan, len(plan.plan))} leaves: allocate it with the plan, and the group and sample, of keys"
        )
    sampler = _TreeSampler(model, plan, conditioning, keys, buffer, size)
    shared = shared_steps(plan.plan) if keys.shared_start else 0
    for trees in micro_batches(len(keys.group), size):
        start = _after_shared_steps(model, plan, conditioning, keys[trees], buffer, shared)
        store(buffer, shared, trees, start)
        yield from sampler.descend(shared, trees, start)


@dataclass(frozen=True)
class _TreeSampler:
    """Sample subtrees depth first. Nodes of a level are slices of ``buffer.level``."""

    model: DiffusionModel
    plan: SamplingPlan
    conditioning: Conditioning
    keys: NoiseKeys
    buffer: RolloutBuffer
    size: int

    def descend(self, first: int, nodes: slice, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the leaves below nodes at level ``first``, with their latents, in micro-batches."""
        rows, shape = self.plan.plan.rows, tuple(x.shape[1:])
        end = next((index + 1 for index in range(first, len(rows)) if rows[index].branch > 1), len(rows))

        def children(index: int) -> slice:
            return slice(nodes.start * rows[index].branch, nodes.stop * rows[index].branch)

        x = sample(
            self.model,
            self.plan,
            self.conditioning[self.keys.at(self.plan.plan, first)[nodes].group],
            x,
            draw=lambda index: self.keys.at(self.plan.plan, index + 1)[children(index)].step(shape, index),
            observe=lambda index, result: store(self.buffer, index + 1, children(index), result.x_next, result),
            steps=range(first, end),
        )

        begin = children(end - 1).start
        for part in micro_batches(len(x), self.size):
            below = slice(begin + part.start, begin + part.stop)
            if end == len(rows):
                yield below, x[part]
            else:
                yield from self.descend(end, below, x[part])


def store(buffer: RolloutBuffer, level: int, nodes: slice, x: Tensor, result: StepResult | None = None) -> None:
    """Write nodes to a buffer if it stores their level, and the density of the step that ended in them."""
    rows = buffer.level(level)[nodes]
    if not len(rows):
        return
    pinned_memory.put(buffer.x, rows, x)
    if result is not None and buffer.trained[rows[0]]:
        assert result.log_prob is not None
        buffer.log_prob[rows] = result.log_prob.to(buffer.log_prob.device)
        buffer.put_means(rows, result.mean)


def shared_steps(plan: Plan) -> int:
    """Count the steps before the first stochastic one, in which samples with the same initial noise are equal."""
    return next((index for index, row in enumerate(plan.rows) if row.noise_level), 0)


def _after_shared_steps(
    model: DiffusionModel,
    plan: SamplingPlan,
    conditioning: Conditioning,
    keys: NoiseKeys,
    buffer: RolloutBuffer,
    count: int,
) -> Tensor:
    """Return the latents of a micro-batch at level ``count``, sampling the steps before it once per group."""
    shape = tuple(buffer.x.shape[1:])
    if count == 0:
        return keys.start(shape).to(model.device, buffer.x.dtype, non_blocking=True)
    groups, own = torch.unique(keys.group, return_inverse=True)
    once = replace(keys, group=groups, sample=torch.zeros_like(groups))
    start = once.start(shape).to(model.device, buffer.x.dtype, non_blocking=True)
    return sample(model, plan, conditioning[groups], start, steps=range(count))[own]


def replay(
    model: DiffusionModel, plan: SamplingPlan, conditioning: Conditioning, buffer: RolloutBuffer, nodes: Tensor
) -> StepResult:
    """Evaluate the stored transitions to trained nodes of one step under the model's current weights.

    Nodes with the same parent share one evaluation of the model.

    Args:
        conditioning: A row per group.
        nodes: (n,), rows of ``buffer.transitions(step)``.

    Raises:
        ValueError: The nodes do not all end the same step, or are not trained.
    """
    index, parent, own = _parents(buffer, nodes)
    x, x_next = buffer.latents(parent), buffer.latents(nodes)
    return plan.replay(model, index, x, conditioning[buffer.group[parent]], x_next, own)


def replay_steps(
    model: DiffusionModel,
    plan: SamplingPlan,
    conditioning: Conditioning,
    buffer: RolloutBuffer,
    parts: Sequence[Tensor],
) -> list[StepResult]:
    """Evaluate stored transitions of several steps in one forward pass, as ``replay`` does those of one.

    Args:
        conditioning: A row per group.
        parts: Rows of ``buffer.transitions(step)``, a tensor per step.

    Returns:
        The result of each part.
    """
    if len(parts) == 1:
        return [replay(model, plan, conditioning, buffer, parts[0])]
    found = [_parents(buffer, nodes) for nodes in parts]
    parents = torch.cat([parent for _, parent, _ in found])
    index = torch.cat([torch.full((len(parent),), index) for index, parent, _ in found])
    x = buffer.latents(parents)
    outputs = model.predict(x, plan.levels[index], conditioning[buffer.group[parents]], plan.guidance)

    results, sizes = [], [len(parent) for _, parent, _ in found]
    for nodes, (step, _, own), start, output in zip(
        parts, found, torch.split(x, sizes), torch.split(outputs, sizes), strict=True
    ):
        rows = own.to(x.device)
        solver = Solver(plan, model.parameterization)
        results.append(solver.step(start[rows], output[rows], step, x_next=buffer.latents(nodes)))
    return results


def _parents(buffer: RolloutBuffer, nodes: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return the step that ends in nodes, their parents without repetition, and the parent of each node."""
    ends = torch.unique(buffer.step[nodes]).tolist()
    if len(ends) != 1 or not buffer.trained[nodes].all():
        raise ValueError(f"nodes at levels {ends}: replay transitions of one trained step, see buffer.transitions")
    parent, own = torch.unique(buffer.parent[nodes], return_inverse=True)
    if len(parent) == len(nodes):
        parent, own = buffer.parent[nodes], torch.arange(len(nodes))  # in the given order, as chains
    return ends[0] - 1, parent, own


def generate(
    model: DiffusionModel, plan: SamplingPlan, conditioning: Conditioning, prompt: Tensor, keys: NoiseKeys, size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Sample chains as ``generate_latents`` does, and yield their images in micro-batches: (b, 3, H, W), float32."""
    for rows, final in generate_latents(model, plan, conditioning, prompt, keys, size):
        yield rows, decode(model, final)


def generate_latents(
    model: DiffusionModel, plan: SamplingPlan, conditioning: Conditioning, prompt: Tensor, keys: NoiseKeys, size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Sample chains that are not stored, such as those of an evaluation, and yield their latents in micro-batches.

    Args:
        conditioning: A row per prompt; it may be on the CPU.
        prompt: (B,), the row of ``conditioning`` of each sample.
        keys: An entry per sample.
        size: Micro-batch.

    Yields:
        The rows of the micro-batch and their final latents: (b, C, ...).

    Raises:
        ValueError: The plan branches.
    """
    if any(row.branch > 1 for row in plan.plan.rows):
        raise ValueError("generate samples one image per key, and the plan branches: use rollouts, or branch 1")
    shape = model.latent_shape()
    for rows in micro_batches(len(prompt), size):
        part = keys[rows]
        start = part.start(shape).to(model.device, non_blocking=True)
        own = conditioning[prompt[rows]].to(model.device, non_blocking=True)

        def draw(index: int, part: NoiseKeys = part) -> Tensor:
            return part.step(shape, index)

        yield rows, sample(model, plan, own, start, draw=draw)
