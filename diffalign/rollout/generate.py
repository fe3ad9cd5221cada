"""Generates samples and fills the buffer, in micro-batches whose size changes no prompt and no noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.diffusion.plan import Plan
from diffalign.models import DiffusionModel
from diffalign.rng import KeyedRNG
from diffalign.rollout import pinned_memory
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.sampler import SamplingPlan, micro_batches, sample
from diffalign.structures import Conditioning, StepResult

# Convolutions at image size fall out of a processor's cache in larger slices, and fill a GPU's memory.
DECODE_SLICE = 32


@dataclass(frozen=True)
class NoiseKeys:
    """Where the noise of each sample comes from: (stream, iteration, group, sample, step).

    Samples of a group share their start noise when ``shared_start`` leaves the sample out of its address.
    """

    noise: KeyedRNG
    stream: str
    iteration: int
    group: Tensor
    sample: Tensor
    shared_start: bool = False

    def __getitem__(self, rows: slice) -> NoiseKeys:
        return NoiseKeys(
            self.noise, self.stream, self.iteration, self.group[rows], self.sample[rows], self.shared_start
        )

    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.group.tolist(), self.sample.tolist(), strict=True))

    def start(self, shape: tuple[int, ...]) -> Tensor:
        """The noise at the first level: (B, *shape), float32, CPU."""
        sample_part = [(group,) if self.shared_start else (group, sample) for group, sample in self._pairs()]
        return self.noise.normal_batch(shape, f"{self.stream}/start", [(self.iteration, *part) for part in sample_part])

    def step(self, shape: tuple[int, ...], index: int) -> Tensor:
        """The noise of stochastic step ``index``: (B, *shape), float32, CPU."""
        addresses = [(self.iteration, *pair, index) for pair in self._pairs()]
        return self.noise.normal_batch(shape, f"{self.stream}/step", addresses)


def decode(model: DiffusionModel, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images of latents, float32, without gradients, in slices; the decoder computes in ``dtype`` where it may."""
    with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        return torch.cat([model.decode(part) for part in latents.split(DECODE_SLICE)])


def rollouts(
    model: DiffusionModel,
    route: SamplingPlan,
    conditioning: Conditioning,
    addresses: NoiseKeys,
    buffer: RolloutBuffer,
    size: int,
    decode_dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[slice, Tensor]]:
    """Fills ``buffer`` micro-batch by micro-batch, and yields each one's samples and images as soon as they are there.

    conditioning: a row per group. size: the micro-batch. decode_dtype: what the VAE computes in. Images: (b, 3, H, W),
    float32.
    """
    shape = tuple(buffer.x.shape[1:])
    shared = shared_steps(route.plan) if addresses.shared_start else 0
    for rows in micro_batches(len(addresses.group), size):
        part = addresses[rows]
        start = _after_shared_steps(model, route, conditioning, part, buffer, shared)
        _store_latents(buffer, rows, shared, start)

        def observe(index: int, result: StepResult, rows: slice = rows) -> None:
            _store(buffer, rows, index, result)

        final = sample(
            model,
            route,
            conditioning[part.group],
            start,
            draw=lambda index, part=part: part.step(shape, index),
            observe=observe,
            steps=range(shared, len(route.plan)),
        )
        yield rows, decode(model, final, decode_dtype)


def shared_steps(plan: Plan) -> int:
    """How many steps lie before the first stochastic one: until then, samples with the same start are one."""
    return next((index for index, row in enumerate(plan.rows) if row.noise_level), 0)


def _after_shared_steps(
    model: DiffusionModel,
    route: SamplingPlan,
    conditioning: Conditioning,
    part: NoiseKeys,
    buffer: RolloutBuffer,
    count: int,
) -> Tensor:
    """The latents of a micro-batch at level ``count``; the steps up to there are made once per group."""
    shape = tuple(buffer.x.shape[1:])
    if count == 0:
        return part.start(shape).to(model.device, buffer.x.dtype, non_blocking=True)
    groups, own = part.group.unique(return_inverse=True)
    once = replace(part, group=groups, sample=torch.zeros_like(groups))
    start = once.start(shape).to(model.device, buffer.x.dtype, non_blocking=True)
    return sample(model, route, conditioning[groups], start, steps=range(count))[own]


def _store_latents(buffer: RolloutBuffer, rows: slice, step: int, x: Tensor) -> None:
    if (buffer.step[: buffer.nodes_per_sample] == step).any():
        pinned_memory.put(buffer.x, buffer.nodes(rows, step), x)


def _store(buffer: RolloutBuffer, rows: slice, index: int, result: StepResult) -> None:
    if not (buffer.step[: buffer.nodes_per_sample] == index + 1).any():
        return
    nodes = buffer.nodes(rows, index + 1)
    pinned_memory.put(buffer.x, nodes, result.x_next)
    if buffer.trained[nodes[0]]:
        buffer.log_prob[nodes] = result.log_prob.to(buffer.device)
        buffer.put_means(nodes, result.mean)


def generate(
    model: DiffusionModel, route: SamplingPlan, conditioning: Conditioning, own: Tensor, addresses: NoiseKeys, size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Samples and images of a route that nothing is trained on, e.g. the ODE of an evaluation. See ``rollouts``.

    own: (B,), the row of ``conditioning``, which may be on the CPU, of each sample.
    """
    shape = model.latent_shape()
    for rows in micro_batches(len(own), size):
        part = addresses[rows]
        start = part.start(shape).to(model.device, non_blocking=True)
        told = conditioning[own[rows]].to(model.device, non_blocking=True)
        final = sample(model, route, told, start, draw=lambda index, part=part: part.step(shape, index))
        yield rows, decode(model, final)
