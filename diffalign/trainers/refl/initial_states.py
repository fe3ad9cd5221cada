"""Where the samplings of direct reward gradients begin: at noise, at real images, or in a rollout buffer on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffalign.data.config import PreferenceDataConfig
from diffalign.data.crops import CropParams, SizeConditioning, frame
from diffalign.data.epoch_order import take
from diffalign.data.unpaired import LabelledData, load_labelled
from diffalign.diffusion.parameterization import add_noise
from diffalign.diffusion.plan import Plan, Row
from diffalign.diffusion.reward_gradient_presets import Recipe, draw
from diffalign.diffusion.trajectory import GradientPath
from diffalign.models import DiffusionModel
from diffalign.rng import KeyedRNG
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.sampler import Draw, SamplingPlan, sample
from diffalign.structures import Conditioning, Level, Prompt, StepResult

Samples = Sequence[tuple[int, int]]  # (group, member) of each sample of an iteration


@dataclass(frozen=True)
class Start:
    """B samples at one place of their samplings. x: (B, C, h, w). prompts: one each."""

    x: Tensor
    place: int
    prompts: list[Prompt]


class Starts(Protocol):
    """A source of starts."""

    def __call__(self, iteration: int, samples: Samples, latest: int) -> Start:
        """Those of some samples of an iteration, at place ``latest`` or before it."""

    def prompts_of(self, iteration: int, samples: Samples) -> list[Prompt]:
        """The prompts of these samples, as they will be in their ``Start``."""


class NoiseStarts:
    """Start noise, with a prompt per group; each epoch goes through all prompts in a new order."""

    def __init__(self, prompts: Sequence[Prompt], num_groups: int, noise: KeyedRNG, shape: Sequence[int]) -> None:
        self.prompts, self.num_groups, self.noise, self.shape = prompts, num_groups, noise, shape

    def __call__(self, iteration: int, samples: Samples, latest: int) -> Start:
        """Noise."""
        x = self.noise.normal_batch(self.shape, "refl/start", [(iteration, *own) for own in samples])
        return Start(x, 0, self.prompts_of(iteration, samples))

    def prompts_of(self, iteration: int, samples: Samples) -> list[Prompt]:
        """One for each group."""
        order = _order(len(self.prompts), self.num_groups, iteration, self.noise, "prompts")
        return [self.prompts[order[group]] for group, _ in samples]


class BufferStarts:
    """Stored states of a rollout buffer that any trainer wrote, and its prompts.

    ValueError: a buffer of another latent shape or number of steps.
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
        """The last stored states that are not after ``latest``. ValueError where there are none."""
        stored = self.buffer.step[: self.buffer.nodes_per_sample].tolist()
        if not (usable := [step for step in stored if step <= latest]):
            raise ValueError(
                f"{self.folder} keeps states at steps {', '.join(map(str, stored))}, and the recipe begins at "
                f"{latest}: use one that sees recovered, or a buffer of a plan that trains earlier steps"
            )
        own = self._groups(iteration, samples)
        rows = torch.tensor([self.members[g][member] for g, (_, member) in zip(own, samples, strict=True)])
        nodes = self.buffer.nodes(rows, usable[-1])
        return Start(self.buffer.x[nodes], usable[-1], self.prompts_of(iteration, samples))

    def prompts_of(self, iteration: int, samples: Samples) -> list[Prompt]:
        """Those of the buffer."""
        return [self.buffer.prompts[group] for group in self._groups(iteration, samples)]

    def _groups(self, iteration: int, samples: Samples) -> list[int]:
        """The buffer's group of each sample."""
        groups = list(self.members)
        order = _order(len(groups), self.num_groups, iteration, self.noise, "prompts")
        return [groups[order[group]] for group, _ in samples]


class Pictures:
    """Real images with captions, as latents: framed in the middle, read once an iteration, encoded when asked for.

    ValueError: none that is liked.
    """

    def __init__(
        self, paths: Sequence[str], settings: PreferenceDataConfig, model: DiffusionModel, noise: KeyedRNG, count: int
    ) -> None:
        self.data: LabelledData = load_labelled(*paths, settings=settings)
        self.model, self.noise, self.count = model, noise, count
        self.liked = self.data.liked_indices
        if not self.liked:
            raise ValueError(f"train_images: {', '.join(paths)} hold no image that is liked")
        self._iteration, self._read = -1, dict[int, tuple[Tensor, SizeConditioning, Prompt]]()

    @torch.no_grad()
    def __call__(self, iteration: int, numbers: Sequence[int]) -> tuple[Tensor, list[Prompt], list[SizeConditioning]]:
        """Latents (B, C, h, w), prompts and sizes of images ``numbers`` among the ``count`` of an iteration."""
        framed, sizes, prompts = zip(*self._framed(iteration, numbers), strict=True)
        pixels = torch.stack(framed).float() / 255
        latents = self.model.encode_images(pixels.to(self.model.device)).float().cpu()
        return latents, list(prompts), list(sizes)

    def prompts_of(self, iteration: int, numbers: Sequence[int]) -> list[Prompt]:
        """The captions of these images."""
        return [prompt for _, _, prompt in self._framed(iteration, numbers)]

    def _framed(self, iteration: int, numbers: Sequence[int]) -> list[tuple[Tensor, SizeConditioning, Prompt]]:
        """Pixels, sizes and prompt of each image; those of one iteration are kept."""
        if iteration != self._iteration:
            self._iteration, self._read = iteration, {}
        order = _order(len(self.liked), self.count, iteration, self.noise, "images")
        for number in numbers:
            if number not in self._read:
                one, images = self.data.load(self.liked[order[number]])
                self._read[number] = (*frame(images[0], self.model.default_resolution[0], CropParams()), one.prompt)
        return [self._read[number] for number in numbers]


class ImageStarts:
    """Real images, noised to a level: ImageReFL (arXiv 2505.22569)."""

    def __init__(self, pictures: Pictures, levels: Level, place: int) -> None:
        self.pictures, self.levels, self.place = pictures, levels, place

    def __call__(self, iteration: int, samples: Samples, latest: int) -> Start:
        """An image per group, a noise per sample."""
        latents, prompts, _ = self.pictures(iteration, [group for group, _ in samples])
        noise = self.pictures.noise.normal_batch(
            latents.shape[1:], "refl/start", [(iteration, *own) for own in samples]
        )
        return Start(add_noise(latents, noise, self.levels[self.place]), self.place, prompts)

    def prompts_of(self, iteration: int, samples: Samples) -> list[Prompt]:
        """The captions of the images."""
        return self.pictures.prompts_of(iteration, [group for group, _ in samples])


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
    """

    courses: tuple[GradientPath, ...]
    samples: Samples
    prompts: list[Prompt]
    conditioning: Conditioning
    buffer: RolloutBuffer
    iteration: int = 0

    def state(self, rows: Tensor, place: int) -> Tensor:
        """The samples ``rows`` at a place that is kept: (b, C, h, w)."""
        return self.buffer.x[self.buffer.nodes(rows, place)]


def draw_courses(recipe: Recipe, noise: KeyedRNG, iteration: int, first: tuple[int, int]) -> tuple[GradientPath, ...]:
    """The courses of the samples that are sampled together with ``first``, (group, member), the first of them."""
    generator = noise.generator("refl/course", iteration, *first)
    return draw(recipe, iteration, lambda low, high: int(generator.integers(low, high)))


def places(courses: Sequence[GradientPath], num_steps: int) -> list[int]:
    """The places at which samplings must be kept, ascending."""
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
    """Sample from ``start`` to the last place that ``buffer`` keeps, and fill it. No gradients.

    draw_noise(i): the noise of step i, for a route with noise.
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
