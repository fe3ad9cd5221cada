"""SPIN-Diffusion (arXiv 2402.10210): liked images against what an earlier self of the model draws of their prompts.

The reference is that earlier self, as in the paper, where it is refreshed (``reference_steps``) once per iteration of
the method; the loss of pairs is any.

Departures from the paper: 1. losers are drawn anew for each optimizer step, not once per iteration; 2. they remain
latents, and are not decoded and encoded again.
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
from diffalign.trainers.collector import RolloutConfig
from diffalign.trainers.diffusion_dpo.batches import Source
from diffalign.trainers.diffusion_dpo.latents import Examples


class SelfPlaySource:
    """Pairs of a liked image and one that the reference draws of the same prompt. winners: gives the liked images."""

    def __init__(self, winners: Source, trainer: Trainer) -> None:
        self.winners, self.trainer = winners, trainer

    def __call__(self, iteration: int) -> tuple[Examples, Metrics]:
        """The winners of one optimizer step with their losers."""
        examples, metrics = self.winners(iteration)
        assert examples.latents.shape[1] == 1
        height, width = self.trainer.model.default_resolution
        own = SizeConditioning((height, width), (0, 0), (height, width))
        sizes = None if examples.sizes is None else [(told, own) for (told,) in examples.sizes]
        latents = torch.cat([examples.latents, self._draw(examples, iteration)[:, None].cpu()], 1)
        return replace(examples, latents=latents, sizes=sizes), metrics

    def _draw(self, examples: Examples, iteration: int) -> Tensor:
        """Final latents, (P, C, h, w)."""
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
