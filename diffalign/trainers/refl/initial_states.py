"""Initial states of sampling for direct reward gradients: noise, noised real images, or states of a rollout buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffalign.data.buckets import Size
from diffalign.data.crops import CropParams, SizeConditioning, frame
from diffalign.data.epoch_order import take
from diffalign.data.unpaired import LabelledData, load_labelled
from diffalign.diffusion.parameterization import add_noise
from diffalign.diffusion.plan import Plan, Row
from diffalign.diffusion.reward_gradient_presets import Recipe, draw
from diffalign.diffusion.trajectory import GradientPath
from diffalign.models import DiffusionModel
from diffalign.models.editing import sized_input
from diffalign.rng import KeyedRNG
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.sampler import Draw, SamplingPlan, sample
from diffalign.runtime.run import Run
from diffalign.structures import Conditioning, Input, Level, Prompt, StepResult
from diffalign.trainers.aspect_buckets import make_buckets
from diffalign.trainers.refl.config import ReFLConfig

Samples = Sequence[tuple[int, int]]  # (group, index in the group) of each sample of an iteration


@dataclass(frozen=True)
class Start:
    """B samples at one sampling step.

    Attributes:
        x: (B, C, h, w).
        place: Index of the level.
        prompts: B prompts.
        size: (height, width) of the images in pixels; None for the model's.
    """

    x: Tensor
    place: int
    prompts: list[Prompt]
    size: tuple[int, int] | None = None


class Starts(Protocol):
    """A source of initial states."""

    def __call__(self, iteration: int, samples: Samples, latest: int) -> Start:
        """Return initial states of some samples of an iteration, at level ``latest`` or an earlier one."""

    def inputs_of(self, iteration: int, samples: Samples) -> list[Input]:
        """Return the model's inputs for the ``Start`` of these samples."""


class NoiseStarts:
    """Start from noise, with a prompt per group; each epoch takes all prompts in a new order."""

    def __init__(self, prompts: Sequence[Prompt], num_groups: int, noise: KeyedRNG, shape: Sequence[int]) -> None:
        self.prompts, self.num_groups, self.noise, self.shape = prompts, num_groups, noise, shape

    def __call__(self, iteration: int, samples: Samples, latest: int) -> Start:
        """Draw the initial noise of samples."""
        x = self.noise.normal_batch(self.shape, "refl/start", [(iteration, *own) for own in samples])
        return Start(x, 0, self._prompts(iteration, samples))

    def inputs_of(self, iteration: int, samples: Samples) -> list[Input]:
        """Return the input of each sample's group."""
        return [prompt.input for prompt in self._prompts(iteration, samples)]

    def _prompts(self, iteration: int, samples: Samples) -> list[Prompt]:
        order = _order(len(self.prompts), self.num_groups, iteration, self.noise, "prompts")
        return [self.prompts[order[group]] for group, _ in samples]


class BufferStarts:
    """Start from stored states of a rollout buffer that any trainer saved, with its prompts.

    Raises:
        ValueError: The buffer has another latent shape or number of steps, or too few images in a group.
    """

    def __init__(
        self, folder: Path, num_groups: int, group_size: int, noise: KeyedRNG, shape: Sequence[int], num_steps: int
    ) -> None:
        self.folder, self.num_groups, self.noise = folder, num_groups, noise
        self.buffer = buffer = RolloutBuffer.load(folder)
        if tuple(buffer.x.shape[1:]) != tuple(shape):
            found = tuple(buffer.x.shape[1:])
            raise ValueError(f"{folder} holds latents of shape {found}, this model's are {tuple(shape)}: use its model")
        if (steps := int(buffer.step.max())) != num_steps:
            raise ValueError(f"{folder} holds samplings of {steps} steps: set recipe.num_steps: {steps}")
        owner = buffer.group[buffer.leaves].tolist()
        self.members = {g: [i for i, other in enumerate(owner) if other == g] for g in dict.fromkeys(owner)}
        if small := [g for g, members in self.members.items() if len(members) < group_size]:
            raise ValueError(f"{folder}: group {small[0]} has {len(self.members[small[0]])} images: lower group_size")

    def __call__(self, iteration: int, samples: Samples, latest: int) -> Start:
        """Return the last stored states that are not after ``latest``. Raises ValueError if none are stored."""
        stored = self.buffer.step[: self.buffer.nodes_per_sample].tolist()
        if not (usable := [step for step in stored if step <= latest]):
            raise ValueError(
                f"{self.folder} keeps states at steps {', '.join(map(str, stored))}, and the recipe begins at "
                f"{latest}: use one that sees recovered, or a buffer of a plan that trains earlier steps"
            )
        own = self._groups(iteration, samples)
        rows = torch.tensor([self.members[g][member] for g, (_, member) in zip(own, samples, strict=True)])
        nodes = self.buffer.nodes(rows, usable[-1])
        return Start(self.buffer.x[nodes], usable[-1], self._prompts(iteration, samples))

    def inputs_of(self, iteration: int, samples: Samples) -> list[Input]:
        """Return the inputs of samples, from the buffer."""
        return [prompt.input for prompt in self._prompts(iteration, samples)]

    def _prompts(self, iteration: int, samples: Samples) -> list[Prompt]:
        return [self.buffer.prompts[group] for group in self._groups(iteration, samples)]

    def _groups(self, iteration: int, samples: Samples) -> list[int]:
        """Return the index of each sample's group in the buffer."""
        groups = list(self.members)
        order = _order(len(groups), self.num_groups, iteration, self.noise, "prompts")
        return [groups[order[group]] for group, _ in samples]


class Pictures:
    """Real images with captions: centre-cropped, read once per iteration, and encoded to latents on each call.

    An iteration's images have one size: the model's, or with ``aspect_buckets`` that of a bucket.

    Args:
        run: The training, whose configuration names the data; only liked images are used.
        count: Images per iteration.

    Raises:
        ValueError: The data have no liked image.
    """

    def __init__(self, run: Run[ReFLConfig], count: int) -> None:
        paths, step = run.config.train_images, run.config.aspect_buckets
        self.data: LabelledData = load_labelled(*paths, settings=run.config.data)
        self.model, self.noise, self.count = run.model, run.rng, count
        self.liked = self.data.liked_indices
        if not self.liked:
            raise ValueError(f"train_images: {', '.join(paths)} hold no image that is liked")
        self.buckets = make_buckets(run, self.data, self.liked, step, count, "images") if step else None
        self._iteration, self._read = -1, dict[int, tuple[Tensor, SizeConditioning, Prompt]]()

    @torch.no_grad()
    def __call__(self, iteration: int, numbers: Sequence[int]) -> tuple[Tensor, list[Prompt], list[SizeConditioning]]:
        """Return latents (B, C, h, w), prompts and sizes of the images ``numbers`` of the ``count`` of an iteration."""
        framed, sizes, prompts = zip(*self._framed(iteration, numbers), strict=True)
        pixels = torch.stack(framed).float() / 255
        latents = self.model.encode_images(pixels.to(self.model.device)).float().cpu()
        return latents, list(prompts), list(sizes)

    def inputs_of(self, iteration: int, numbers: Sequence[int]) -> list[Input]:
        """Return the captions of images, with source images of their size for models that edit."""
        framed = self._framed(iteration, numbers)
        return [sized_input(self.model, prompt, sizes.target_size) for _, sizes, prompt in framed]

    def _framed(self, iteration: int, numbers: Sequence[int]) -> list[tuple[Tensor, SizeConditioning, Prompt]]:
        """Return pixels, size conditioning and prompt of each image; images of the current iteration are cached."""
        if iteration != self._iteration:
            self._iteration, self._read = iteration, {}
        size, order = self._order(iteration)
        for number in numbers:
            if number not in self._read:
                one, images = self.data.load(self.liked[order[number]])
                self._read[number] = (*frame(images[0], size, CropParams()), one.prompt)
        return [self._read[number] for number in numbers]

    def _order(self, iteration: int) -> tuple[tuple[int, int], list[int]]:
        """Return the size of an iteration's images and their places among the liked ones."""
        if self.buckets is not None:
            return self.buckets.take(iteration)
        return self.model.default_resolution, _order(len(self.liked), self.count, iteration, self.noise, "images")


class ImageStarts:
    """Start from real images, noised to a level: ImageReFL (arXiv 2505.22569)."""

    def __init__(self, pictures: Pictures, levels_at: Callable[[Size | None], Level], place: int) -> None:
        self.pictures, self.levels_at, self.place = pictures, levels_at, place

    def __call__(self, iteration: int, samples: Samples, latest: int) -> Start:
        """Noise the image of each sample's group, with noise of its own per sample."""
        latents, prompts, sizes = self.pictures(iteration, [group for group, _ in samples])
        noise = self.pictures.noise.normal_batch(
            latents.shape[1:], "refl/start", [(iteration, *own) for own in samples]
        )
        level = self.levels_at(size := sizes[0].target_size)[self.place]
        return Start(add_noise(latents, noise, level), self.place, prompts, size)

    def inputs_of(self, iteration: int, samples: Samples) -> list[Input]:
        """Return the captions of the images."""
        return self.pictures.inputs_of(iteration, [group for group, _ in samples])


def _order(count: int, wanted: int, iteration: int, noise: KeyedRNG, stream: str) -> list[int]:
    permutation: Callable[[int], Tensor] = lambda epoch: noise.permutation(count, stream, epoch)  # noqa: E731
    return take(count, wanted, iteration, permutation)


@dataclass(frozen=True)
class Batch:
    """B samples that were sampled together, up to the steps that their gradient paths need.

    Attributes:
        courses: Gradient paths.
        samples: (group, sample index) of each sample.
        prompts: B prompts.
        conditioning: A row per sample.
        buffer: A node per sample and stored step.
        iteration: Index of the iteration.
        size: (height, width) of the images in pixels; None for the model's.
    """

    courses: tuple[GradientPath, ...]
    samples: Samples
    prompts: list[Prompt]
    conditioning: Conditioning
    buffer: RolloutBuffer
    iteration: int = 0
    size: Size | None = None

    def state(self, rows: Tensor, place: int) -> Tensor:
        """Return the latents of samples at a stored step: (b, C, h, w)."""
        return self.buffer.x[self.buffer.nodes(rows, place)]


def draw_courses(recipe: Recipe, noise: KeyedRNG, iteration: int, first: tuple[int, int]) -> tuple[GradientPath, ...]:
    """Draw the gradient paths of a batch, keyed by the (group, index) of its first sample."""
    generator = noise.generator("refl/course", iteration, *first)
    return draw(recipe, iteration, lambda low, high: int(generator.integers(low, high)))


def places(courses: Sequence[GradientPath], num_steps: int) -> list[int]:
    """Return the steps at which latents must be stored for some gradient paths, ascending."""
    kept = {place for course in courses for place in course.states}
    return sorted(kept | {num_steps for course in courses if course.renoise})


def sampling_plan(recipe: Recipe) -> Plan:
    """Return the steps of samplings up to where the gradient begins: DDIM's with the recipe's eta, or the ODE's."""
    row = Row("ddim", recipe.eta, trained=False) if recipe.eta else Row("ode", 0.0, trained=False)
    return Plan((row,) * recipe.num_steps)


def advance(
    model: DiffusionModel,
    route: SamplingPlan,
    conditioning: Conditioning,
    start: Start,
    buffer: RolloutBuffer,
    draw_noise: Draw | None = None,
) -> None:
    """Sample from ``start`` to the last step that ``buffer`` stores, and fill it, without gradients.

    Args:
        model: The model.
        route: How to sample.
        conditioning: A row per sample.
        start: Initial states.
        buffer: Receives the latents of its stored steps.
        draw_noise: Maps the index of a stochastic step to its noise.
    """
    kept = buffer.step[: buffer.nodes_per_sample].tolist()

    def keep(place: int, x: Tensor) -> None:
        if place in kept:
            buffer.x[buffer.nodes(slice(None), place)] = x.to(buffer.x)

    def observe(index: int, result: StepResult) -> None:
        keep(index + 1, result.x_next)

    x = start.x.to(model.device, torch.float32, non_blocking=True)
    keep(start.place, x)
    sample(model, route, conditioning, x, draw_noise, observe, range(start.place, kept[-1]))
