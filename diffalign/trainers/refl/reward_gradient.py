"""The loss of ReFL and related methods: unroll samples along a gradient path, score them, regularise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.data.buckets import Size
from diffalign.diffusion.reward_gradient_presets import Recipe
from diffalign.diffusion.trajectory import Denoiser, GradientPath, Unrolled, unroll
from diffalign.losses.leapalign import gap_weights
from diffalign.losses.refl import squared_distance
from diffalign.models.weights import REFERENCE
from diffalign.rollout.forward_process import noised
from diffalign.runtime.run import Run
from diffalign.structures import Conditioning, Guidance, Level
from diffalign.trainers.refl.config import ReFLConfig
from diffalign.trainers.refl.initial_states import Batch, Pictures
from diffalign.trainers.refl.reward_loss import Judge, RewardInputs


class RecipeGuidance:
    """Guidance of a recipe's calls, with the current negative prompt if one is trained."""

    def __init__(self, run: Run[ReFLConfig], recipe: Recipe) -> None:
        self.run, self.kind = run, recipe.guidance

    @property
    def plain(self) -> Guidance:
        """Guidance of every sampling."""
        negative = self.run.model.negative
        if negative is None:
            return self.run.guidance
        return Guidance(self.run.guidance_scale, negative.conditioning(self.run.module()))

    @property
    def recorded(self) -> Guidance | None:
        """Guidance of the calls that gradients pass through."""
        return None if self.kind == "off" else replace(self.plain, detached=self.kind == "detached")


class RewardGradient:
    """Compute the mean loss of samples on a gradient path: rewards, and the recipe's regulariser.

    Args:
        run: The training.
        judge: Decodes latents and computes the loss of their rewards.
        recipe: Which calls carry the gradient, and the regulariser.
        guidance: Guidance of calls with and without gradient.
        levels_at: The recipe's noise levels for images of a size.
        pictures: Real images, for the regulariser "pretraining".
    """

    def __init__(
        self,
        run: Run[ReFLConfig],
        judge: Judge,
        recipe: Recipe,
        guidance: RecipeGuidance,
        levels_at: Callable[[Size | None], Level],
        pictures: Pictures | None,
    ) -> None:
        self.run, self.model, self.judge, self.recipe = run, run.model, judge, recipe
        self.guidance, self.levels_at, self.pictures = guidance, levels_at, pictures

    def __call__(self, batch: Batch, rows: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of some samples on gradient path ``number`` of their batch, and metrics."""
        course = batch.courses[number]
        found = self.unrolled(batch, rows, number)
        loss, metrics = self._judged(found, batch, rows, course)
        if self.recipe.regulariser != "none":
            kept = self._kept(found, batch, rows)
            metrics["regulariser"] = kept.detach()
            loss = loss + self.recipe.regulariser_weight * kept
        return (loss if self.recipe.grad_scale == 1 else loss * self.recipe.grad_scale), metrics

    def unrolled(self, batch: Batch, rows: Tensor, number: int) -> Unrolled:
        """Unroll some samples on gradient path ``number`` of their batch."""
        course, steps = batch.courses[number], self.recipe.num_steps
        start = batch.state(rows, steps if course.renoise else course.start)
        noise = self._known_noise(batch, rows, number, start.shape[1:]).to(start) if course.renoise else None
        return unroll(
            self.denoiser(batch.conditioning[rows]),
            course,
            self.levels_at(batch.size),
            start,
            parameterization=self.model.parameterization,
            noise=noise,
            truth={place: batch.state(rows, place) for place in course.states} if course.straight_through else None,
            checkpointed=self.run.config.step_checkpointing,
        )

    def _known_noise(self, batch: Batch, rows: Tensor, number: int, shape: Sequence[int]) -> Tensor:
        keys = [(batch.iteration, *batch.samples[row], number) for row in rows.tolist()]
        return self.run.rng.normal_batch(shape, "refl/known", keys)

    def _judged(
        self, found: Unrolled, batch: Batch, rows: Tensor, course: GradientPath
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of the rewards, and their means."""
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
        scale = self.model.guidance_factor(self.run.guidance_scale) if self.recipe.compensate else 1.0
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
        assert self.pictures is not None
        model, rng = self.model, self.run.rng
        samples = [batch.samples[row] for row in rows.tolist()]
        groups = [group for group, _ in samples]
        latents, _, sizes = self.pictures(batch.iteration, groups)
        keys = [(batch.iteration, *sample) for sample in samples]
        if self.recipe.from_images:
            stream, level = "refl/start", self.levels_at(sizes[0].target_size)[self.recipe.first]
        else:
            times = [rng.generator("refl/time", *key).random() for key in keys]
            stream = "refl/image"
            level = model.level_at(torch.tensor(times, dtype=torch.float64) * model.num_train_timesteps)

        noise = rng.normal_batch(latents.shape[1:], stream, keys).to(model.device)
        images = noised(model, latents.to(model.device), noise, level)
        names = ("original_size", "crop_top_left", "target_size")
        columns = (torch.tensor([getattr(size, name) for size in sizes]) for name in names)
        inputs = self.pictures.inputs_of(batch.iteration, groups)
        conditioning = model.with_sizes(self.run.prompts(inputs), *columns)
        return squared_distance(model.predict(images.x, level, conditioning), images.target)

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """Return the model as ``unroll`` calls it."""
        plain, recorded = self.guidance.plain, self.guidance.recorded
        return lambda x, level, gradient: self.model.predict(x, level, conditioning, recorded if gradient else plain)
