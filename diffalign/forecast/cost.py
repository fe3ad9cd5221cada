"""How much a run computes: images through the denoiser, counted from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

from diffalign.models import DiffusionModel
from diffalign.runtime.progress import crossed


@dataclass(frozen=True)
class Work:
    """Images through the denoiser; where guidance makes two evaluations of one, both count.

    generated: images that are made to train on. sampling: without gradients, to make them. training: forward and
    backward. comparing: forward only, for the reference, recomputed calls and the checks of the first step. evaluating:
    without gradients, to make held-out images and to watch them. judged: images that are decoded with a gradient; these
    do not pass the denoiser.
    """

    generated: int = 0
    sampling: int = 0
    training: int = 0
    comparing: int = 0
    evaluating: int = 0
    judged: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __rmul__(self, count: int) -> Work:
        return Work(*(count * number for number in astuple(self)))

    @property
    def evaluations(self) -> int:
        """All that pass the denoiser."""
        return self.sampling + self.training + self.comparing + self.evaluating


@dataclass(frozen=True)
class Share:
    """One of ``world`` processes."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Method:
    """What a forecast must know of a trainer; ``args`` is its configuration, already valid.

    updates: optimizer steps per iteration. iteration: the work of so many updates of an iteration, at most: images
    without an advantage and groups without a pair cost less. checks: that of the first step's checks. eval_steps: of an
    evaluation. batches: lines on how an iteration is cut. passes: images per pass (while sampling, while training).
    stored: bytes of latents that a process keeps on its device for an iteration. copies: how many copies of the trained
    weights. watched: evaluations beside the images of so many held-out prompts, each time. train: makes a model
    trainable. grad_through: parts that gradients come back through.
    """

    updates: Callable[[Any], int]
    iteration: Callable[[Any, Share, int, int], Work]
    checks: Callable[[Any, Share], Work]
    eval_steps: Callable[[Any], int]
    batches: Callable[[Any, Share], list[str]]
    passes: Callable[[Any], tuple[int, int]]
    stored: Callable[[Any, tuple[int, int, int], Share], int]
    copies: Callable[[Any], int]
    watched: Callable[[Any, int], int] = lambda args, held_out: 0
    train: Callable[[Any, DiffusionModel], None] = lambda args, model: model.train(args.lora)
    grad_through: tuple[str, ...] = ()


def run_work(method: Method, args: Any, share: Share, held_out: int) -> Work:
    """A whole run's, of one process. held_out: prompts that evaluations sample, over all processes."""
    total = method.checks(args, share)
    for iteration, updates in iterations(args.max_train_steps, method.updates(args)):
        total += method.iteration(args, share, iteration, updates)
    own = len(range(held_out)[share.rank :: share.world])
    each = own * args.eval_images_per_prompt * method.eval_steps(args) * guided(args) + method.watched(args, held_out)
    return total + Work(evaluating=each * evaluations(args, method.updates(args)))


def iterations(steps: int, updates: int) -> Iterator[tuple[int, int]]:
    """(iteration, how many of its updates the run still takes)."""
    for first in range(0, steps, updates):
        yield first // updates, min(updates, steps - first)


def evaluations(args: Any, updates: int) -> int:
    """How often the held-out prompts are sampled: at the start, every ``eval_steps``, and at the end."""
    ends = [iteration * updates + done for iteration, done in iterations(args.max_train_steps, updates)]
    starts = [0, *ends[:-1]]
    return 1 + sum(
        end == ends[-1] or crossed(start, end, args.eval_steps) for start, end in zip(starts, ends, strict=True)
    )


def guided(args: Any) -> int:
    """Evaluations per image and step of a sampling; args: with the weight of the positive output as guidance scale."""
    return 2 if (args.guidance_scale or 0) > 1 else 1
