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
from diffalign.runtime.loop import Metrics
from diffalign.trainers.base import Trainer
from diffalign.trainers.diffusion_dpo.batches import Source
from diffalign.trainers.diffusion_dpo.latents import Examples
from diffalign.trainers.rollout_config import RolloutConfig


class SelfPlaySource:
    """Pair liked images with samples of the reference for the same prompts. winners: source of the liked images."""

    def __init__(self, winners: Source, trainer: Trainer) -> None:
        self.winners, self.trainer = winners, trainer

    def __call__(self, iteration: int) -> tuple[Examples, Metrics]:
        """Return the pairs of one optimizer step."""
        examples, metrics = self.winners(iteration)
        assert examples.latents.shape[1] == 1
        height, width = self.trainer.model.default_resolution
        own = SizeConditioning((height, width), (0, 0), (height, width))
        sizes = None if examples.sizes is None else [(winner, own) for (winner,) in examples.sizes]
        latents = torch.cat([examples.latents, self._draw(examples, iteration)[:, None].cpu()], 1)
        return replace(examples, latents=latents, sizes=sizes), metrics

    def _draw(self, examples: Examples, iteration: int) -> Tensor:
        """Sample the losers; return their latents, (P, C, h, w)."""
        trainer, args, model = self.trainer, self.trainer.args, self.trainer.model
        assert isinstance(args, RolloutConfig)
        levels = model.levels(args.plan.num_steps, args.schedule)
        route = SamplingPlan(make_plan(args.plan, iteration, args.seed), levels, trainer.guidance)
        number = torch.tensor(examples.number)
        addresses = NoiseKeys(trainer.noise, "self play", iteration, number, torch.zeros_like(number))
        shape, drawn = model.latent_shape(), []
        trainer.encoded.prepare(examples.texts, empty=True)
        with model.using(REFERENCE):
            for rows in micro_batches(len(number), args.rollout_batch_size):
                part, conditioning = addresses[rows], trainer.encoded(examples.texts[rows])
                start = part.start(shape).to(model.device, non_blocking=True)
                draw = lambda index, part=part: part.step(shape, index)  # noqa: E731
                drawn.append(sample(model, route, conditioning, start, draw=draw))
        return torch.cat(drawn)
