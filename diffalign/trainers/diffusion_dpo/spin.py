"""SPIN-Diffusion (arXiv 2402.10210): liked images against samples of an earlier checkpoint for the same prompts.

The reference is that checkpoint; the paper refreshes it (``reference_steps``) once per iteration of the method. Any
loss of pairs can be used.

Departures from the paper: 1. losers are sampled for each optimizer step, not once per iteration; 2. they stay latents,
without a round trip through the VAE.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffalign.data.crops import SizeConditioning
from diffalign.diffusion.plan import make_plan
from diffalign.models.weights import REFERENCE
from diffalign.rollout.generate import NoiseKeys
from diffalign.rollout.sampler import SamplingPlan, micro_batches, sample
from diffalign.runtime.run import Run
from diffalign.trainers.diffusion_dpo.batches import PreferenceBatch, Source
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig
from diffalign.trainers.diffusion_dpo.latents import Examples


class SelfPlaySource(Source):
    """Pair liked images with samples of the reference for the same prompts. winners: source of the liked images."""

    def __init__(self, run: Run[DiffusionDPOConfig], winners: Source) -> None:
        self.run, self.winners = run, winners

    def sample(self, iteration: int) -> PreferenceBatch:
        """Return the pairs of one optimizer step."""
        batch = self.winners.sample(iteration)
        examples = batch.ranked
        assert isinstance(examples, Examples)
        assert examples.latents.shape[1] == 1
        known = examples.sizes
        size = self.run.model.default_resolution if known is None else known[0][0].target_size
        own = SizeConditioning(size, (0, 0), size)
        sizes: list[tuple[SizeConditioning, ...]] | None = None if known is None else [(*size, own) for size in known]
        latents = torch.cat([examples.latents, self._losers(examples, iteration, size)[:, None].cpu()], 1)
        return PreferenceBatch(replace(examples, latents=latents, sizes=sizes), metrics=batch.metrics)

    def _losers(self, examples: Examples, iteration: int, size: tuple[int, int]) -> Tensor:
        """Sample the losers at the (height, width) of the winners; return their latents, (P, C, *spatial)."""
        run, config, model = self.run, self.run.config, self.run.model
        levels = model.levels(config.plan.num_steps, config.schedule, size)
        plan = SamplingPlan(make_plan(config.plan, iteration, config.seed), levels, run.guidance)
        number = torch.tensor(examples.number)
        keys = NoiseKeys(run.rng, "self play", iteration, number, torch.zeros_like(number))
        shape, latents = model.latent_shape(size), []
        run.prompts.prepare(examples.texts, empty=True)
        with model.using(REFERENCE):
            for rows in micro_batches(len(number), config.rollout_batch_size):
                part, conditioning = keys[rows], model.at_size(run.prompts(examples.texts[rows]), size)
                start = part.start(shape).to(model.device, non_blocking=True)
                draw = lambda index, part=part: part.step(shape, index)  # noqa: E731
                latents.append(sample(model, plan, conditioning, start, draw=draw))
        return torch.cat(latents)
