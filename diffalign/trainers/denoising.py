"""Noise examples and denoise them with the policy and its reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.diffusion.parameterization import add_noise, target
from diffalign.losses.errors import Denoised
from diffalign.models.prompt_cache import PromptEmbeddingCache
from diffalign.models.weights import REFERENCE
from diffalign.rng import KeyedRNG
from diffalign.structures import Conditioning, Level
from diffalign.trainers.diffusion_dpo.config import DiffusionDPOConfig
from diffalign.trainers.diffusion_dpo.latents import Examples


class Denoising:
    """Draw levels, noise and dropped prompts per example and optimizer step, independent of the batch; denoise.

    Args:
        encoded: Prompt embeddings and the model.
        args: Time sampling, prompt dropout and reduction.
        noise: Keyed random numbers.
        compares: Whether the reference predicts as well.
    """

    def __init__(
        self, encoded: PromptEmbeddingCache, args: DiffusionDPOConfig, noise: KeyedRNG, compares: bool
    ) -> None:
        self.model, self.encoded, self.args, self.noise, self.compares = encoded.model, encoded, args, noise, compares

    def __call__(self, examples: Examples, rows: Tensor, step: int) -> tuple[list[Denoised], Level]:
        """Denoise the examples ``rows`` as in optimizer step ``step`` (from 0): K sides, and their levels (P,)."""
        model = self.model
        numbers = [examples.number[i] for i in rows.tolist()]
        latents = examples.latents[rows].to(model.device, non_blocking=True)
        count, sides = latents.shape[:2]
        level = model.level_at(self._times(numbers, step))
        noise = self.noise.normal_batch(latents.shape[2:], "noise", [(step, n) for n in numbers])
        noise = noise.to(model.device, non_blocking=True)
        conditioning = self._conditioning(examples, rows, numbers, step)
        # One batch for all sides, winners first, each with the noise and the level of its example.
        levels = level[torch.arange(count).repeat(sides)]
        x0, noise = latents.transpose(0, 1).flatten(0, 1), noise.repeat(sides, 1, 1, 1)
        x = add_noise(x0, noise, levels)
        goals = target(model.parameterization, x0, noise, levels).chunk(sides)
        mask = None if examples.mask is None else examples.mask[rows].to(model.device, non_blocking=True)
        # The reference first: its activations are freed before the policy's graph is built.
        references = self._reference(x, levels, conditioning, sides)
        outputs = model.predict(x, levels, conditioning).chunk(sides)
        return [
            Denoised(output, goal, reference, mask, reduction=self.args.reduction)
            for output, goal, reference in zip(outputs, goals, references, strict=True)
        ], level

    @torch.no_grad()
    def _reference(self, x: Tensor, levels: Level, conditioning: Conditioning, sides: int) -> Sequence[Tensor | None]:
        if not self.compares:
            return [None] * sides
        with self.model.using(REFERENCE):
            return self.model.predict(x, levels, conditioning).chunk(sides)

    def _times(self, numbers: Sequence[int], step: int) -> Tensor:
        """Sample training times, (P,), float64, one per example and optimizer step."""
        args, end = self.args, self.model.num_train_timesteps
        drawn = [self.noise.generator("time", step, number) for number in numbers]
        if args.times:
            return torch.tensor([args.times[g.integers(len(args.times))] for g in drawn], dtype=torch.float64)
        if args.time_sampling == "uniform":
            return torch.tensor([g.random() for g in drawn], dtype=torch.float64) * end
        normal = torch.tensor([g.standard_normal() for g in drawn], dtype=torch.float64)
        return torch.sigmoid(args.time_mean + args.time_std * normal) * end

    def _conditioning(self, examples: Examples, rows: Tensor, numbers: Sequence[int], step: int) -> Conditioning:
        """Return a row per image, all first sides first; prompts are dropped for both images of a pair."""
        sides = examples.latents.shape[1]
        texts = [examples.texts[i] for i in rows.tolist()]
        dropped = [self.noise.generator("dropout", step, n).random() < self.args.prompt_dropout for n in numbers]
        known = Conditioning.cat([self.encoded(texts), self.encoded.empty])
        place = [len(texts) if gone else i for i, gone in enumerate(dropped)]
        conditioning = known[torch.tensor(place * sides)]
        if examples.sizes is None:
            return conditioning
        sizes = [examples.sizes[i][side] for side in range(sides) for i in rows.tolist()]
        columns = (
            torch.tensor([getattr(s, n) for s in sizes]) for n in ("original_size", "crop_top_left", "target_size")
        )
        return self.model.with_sizes(conditioning, *columns)
