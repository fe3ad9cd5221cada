"""The loss of ReFL and related methods: unroll samples along a gradient path, score them, regularise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffalign.diffusion.parameterization import add_noise, target
from diffalign.diffusion.trajectory import Denoiser, GradientPath, Unrolled, unroll
from diffalign.losses.leapalign import gap_weights
from diffalign.losses.refl import squared_distance
from diffalign.models.weights import REFERENCE
from diffalign.structures import Conditioning
from diffalign.trainers.refl.initial_states import Batch
from diffalign.trainers.refl.reward_loss import Judge, RewardInputs

if TYPE_CHECKING:
    from diffalign.trainers.refl.algorithm import ReFLTrainer


class RewardGradient:
    """From samples to the loss of what ``judge`` says of them, with what the recipe adds to it."""

    def __init__(self, trainer: ReFLTrainer, judge: Judge) -> None:
        self.trainer, self.judge = trainer, judge
        self.model, self.recipe = trainer.model, trainer.recipe

    def __call__(self, batch: Batch, rows: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of some samples on course ``number`` of their batch, and metrics."""
        course = batch.courses[number]
        found = self.unrolled(batch, rows, number)
        loss, metrics = self._judged(found, batch, rows, course)
        if self.recipe.regulariser != "none":
            kept = self._kept(found, batch, rows)
            metrics["regulariser"] = kept.detach()
            loss = loss + self.recipe.regulariser_weight * kept
        return (loss if self.recipe.grad_scale == 1 else loss * self.recipe.grad_scale), metrics

    def unrolled(self, batch: Batch, rows: Tensor, number: int) -> Unrolled:
        """Some samples on course ``number`` of their batch."""
        course, steps = batch.courses[number], self.recipe.num_steps
        start = batch.state(rows, steps if course.renoise else course.start)
        noise = self._known_noise(batch, rows, number).to(start) if course.renoise else None
        return unroll(
            self.denoiser(batch.conditioning[rows]),
            course,
            self.trainer.levels,
            start,
            parameterization=self.model.parameterization,
            noise=noise,
            truth={place: batch.state(rows, place) for place in course.states} if course.straight_through else None,
            checkpointed=self.trainer.args.step_checkpointing,
        )

    def _known_noise(self, batch: Batch, rows: Tensor, number: int) -> Tensor:
        addresses = [(self.trainer.iteration, *batch.samples[row], number) for row in rows.tolist()]
        return self.trainer.noise.normal_batch(self.model.latent_shape(), "refl/known", addresses)

    def _judged(
        self, found: Unrolled, batch: Batch, rows: Tensor, course: GradientPath
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the rewards, and their means."""
        chosen = rows.tolist()
        seen = RewardInputs(
            found.x,
            [batch.prompts[row] for row in chosen],
            torch.tensor([batch.samples[row][0] for row in chosen]),
            self._weight(found, course),
            course.words,
            course.word_weight,
        )
        loss, metrics = self.judge(seen)
        if found.gaps:
            metrics["gap"] = torch.stack(found.gaps).mean()
        return loss, metrics

    def _weight(self, found: Unrolled, course: GradientPath) -> Tensor:
        """Return the weight of each sample, (b,), without gradient."""
        scale = self.model.guidance_factor(self.trainer.guidance_scale) if self.recipe.compensate else 1.0
        weight = found.x.new_full((len(found.x),), course.weight / scale)
        floor = self.recipe.gap_floor
        return weight if floor is None else weight * gap_weights(found.gaps, floor)

    def _kept(self, found: Unrolled, batch: Batch, rows: Tensor) -> Tensor:
        """Return the regulariser, a mean over samples."""
        if self.recipe.regulariser == "pretraining":
            return self._pretraining(batch, rows).mean()
        with torch.no_grad(), self.model.using(REFERENCE):
            reference = self.denoiser(batch.conditioning[rows])
            outputs = [reference(call.x, call.level, True) for call in found.calls]
        return torch.stack(
            [squared_distance(call.output, other).mean() for call, other in zip(found.calls, outputs, strict=True)]
        ).mean()

    def _pretraining(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return the denoising error of real images, one image per group and one noise per sample: (b,)."""
        assert self.trainer.pictures is not None
        model = self.model
        samples = [batch.samples[row] for row in rows.tolist()]
        latents, prompts, sizes = self.trainer.pictures(self.trainer.iteration, [group for group, _ in samples])
        addresses = [(self.trainer.iteration, *sample) for sample in samples]
        if self.recipe.from_images:
            stream, level = "refl/start", self.trainer.levels[self.recipe.first]
        else:
            drawn = [self.trainer.noise.generator("refl/time", *address).random() for address in addresses]
            stream = "refl/image"
            level = model.level_at(torch.tensor(drawn, dtype=torch.float64) * model.num_train_timesteps)
        noise = self.trainer.noise.normal_batch(latents.shape[1:], stream, addresses).to(model.device)
        latents = latents.to(model.device)
        columns = [
            torch.tensor([getattr(size, name) for size in sizes])
            for name in ("original_size", "crop_top_left", "target_size")
        ]
        conditioning = model.with_sizes(self.trainer.encoded([prompt.text for prompt in prompts]), *columns)
        output = model.predict(add_noise(latents, noise, level), level, conditioning)
        return squared_distance(output, target(model.parameterization, latents, noise, level))

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """The model as ``unroll`` calls it."""
        plain, recorded = self.trainer.guidance, self.trainer.grad_guidance
        return lambda x, level, gradient: self.model.predict(x, level, conditioning, recorded if gradient else plain)
