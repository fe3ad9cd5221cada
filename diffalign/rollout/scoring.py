"""Score images with rewards; a sample on which a reward fails gets NaN, and the others keep their scores."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from diffalign.rewards.base import Reward, needs_groups, wanted, wants_latents
from diffalign.rewards.support.fault_isolation import Batch, guarded_parts
from diffalign.rewards.support.isolation import named, said
from diffalign.rollout.background import one_thread, start
from diffalign.structures import Prompt, Scores


class RewardWarning(UserWarning):
    """A reward failed on some samples, whose scores are NaN."""


def score(
    rewards: Mapping[str, Reward] | Sequence[Reward],
    images: Tensor | None,
    prompts: Sequence[Prompt],
    groups: Tensor | None = None,
    latents: Tensor | None = None,
    *,
    device: torch.device | None = None,
    batch_size: int | None = None,
) -> Scores:
    """Score images with every reward, without gradients.

    A reward that raises, ``SystemExit`` and the like included, is called again sample by sample (group by group if it
    needs groups). Samples on which it raises again or returns no finite number get NaN, with a ``RewardWarning`` that
    names them, and so do images that are not finite.

    Args:
        rewards: Rewards by name, or rewards that have names.
        images: (B, 3, H, W), float, [0, 1]; None if all rewards want latents.
        prompts: B prompts.
        groups: (B,), labels of whole groups, for rewards that need them; default: images of one prompt are a group.
        latents: (B, C, ...), final latents of a model, for rewards that want them; None for images of files.
        device: Where to move what a reward is called with; None to leave it.
        batch_size: Images per call; group rewards are called once with all images. None: one call.

    Returns:
        Scores by name, each (B,) float32 on the CPU; further numbers that a reward returns are named "reward/extra".

    Raises:
        ValueError: Images and prompts differ in number, or two rewards share a name.
        RewardUnavailable: A ValueError too: a reward can score nothing, because weights or a package are missing or
            its result is no list of numbers.
    """
    problems: list[str] = []
    try:
        return _score(rewards, images, latents, prompts, groups, problems, device, batch_size)
    finally:
        _warn(problems)


def _warn(problems: list[str]) -> None:
    for problem in problems:
        warnings.warn(problem, RewardWarning, stacklevel=3)


def _score(
    rewards: Mapping[str, Reward] | Sequence[Reward],
    images: Tensor | None,
    latents: Tensor | None,
    prompts: Sequence[Prompt],
    groups: Tensor | None,
    problems: list[str],
    device: torch.device | None = None,
    batch_size: int | None = None,
) -> Scores:
    """Score as ``score`` does, and collect warnings in ``problems``, for the caller's thread to raise."""
    for samples in (images, latents):
        if samples is not None and len(samples) != len(prompts):
            raise ValueError(f"{len(samples)} images for {len(prompts)} prompts: pass one prompt per image")
    named = rewards.items() if isinstance(rewards, Mapping) else [(reward.name, reward) for reward in rewards]
    table = dict(named)
    if len(table) != len(named):
        raise ValueError(f"rewards share a name: {[name for name, _ in named]}; pass a mapping with names")
    if groups is None:
        place = {prompt.input: i for i, prompt in enumerate(prompts)}
        groups = torch.tensor([place[prompt.input] for prompt in prompts])
    found: dict[str, Tensor] = {}
    for name, reward in table.items():
        batch = Batch(images, prompts, groups.cpu(), latents)
        found |= _score_one(name, reward, batch, problems, device, batch_size)
    return Scores(found)


def check_unscored(share: float, limit: float, hint: str = "") -> None:
    """Raise ValueError if rewards failed on a larger share of the images than ``limit``.

    Args:
        share: Share of the images without a score.
        limit: Largest share to accept.
        hint: Text to append to the message.
    """
    if share > limit:
        raise ValueError(
            f"rewards failed on {share:.0%} of the images, more than max_unscored {limit:.0%}: "
            "fix the reward (warnings above name the samples), or raise max_unscored" + hint
        )


class ScoreBook:
    """Score the micro-batches of a rollout; rewards that need whole groups are computed after the last one.

    A micro-batch may be scored in a background thread, which ends with the context. Rewards are called by one thread at
    a time, in the order of the micro-batches, and at most one micro-batch is being scored.

    Args:
        rewards: Rewards by name.
        keep_images: Whether to keep the images.

    Attributes:
        images: The images added so far, on the CPU, if kept or needed by a reward of whole groups.
        latents: Their latents, likewise, if a reward of whole groups wants them.
    """

    def __init__(self, rewards: Mapping[str, Reward], keep_images: bool = False) -> None:
        self.at_once = {name: reward for name, reward in rewards.items() if not needs_groups(reward)}
        self.waiting = {name: reward for name, reward in rewards.items() if needs_groups(reward)}
        self.keep_images = keep_images or bool(self.waiting)
        self.images: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.prompts: list[Prompt] = []
        self.parts: list[Scores] = []
        self._device: torch.device | None = None
        self._thread = one_thread("rewards")
        self._running: Future[Scores] | None = None
        self._problems: list[str] = []

    def __enter__(self) -> ScoreBook:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the thread, and end it."""
        self._thread.shutdown()

    def add(
        self, images: Tensor | None, prompts: Sequence[Prompt], aside: bool = False, latents: Tensor | None = None
    ) -> None:
        """Score a micro-batch, after waiting for the previous one.

        Errors and warnings of rewards in the background are raised by the next ``add``, or by ``scores``.

        Args:
            images: (b, 3, H, W); None if all rewards want latents.
            prompts: b prompts.
            aside: Whether to score in the background.
            latents: (b, C, ...), for rewards that want them.
        """
        self._wait()
        if aside:
            call = partial(_score, self.at_once, prompts=prompts, groups=None, problems=self._problems)
            self._running = start(self._thread, call, images, latents)
        else:
            self.parts.append(score(self.at_once, images, prompts, latents=latents))
        self.prompts += prompts
        self._device = next((samples.device for samples in (images, latents) if samples is not None), None)
        if self.keep_images and images is not None:
            self.images.append(images.cpu())
        if latents is not None and any(map(wants_latents, self.waiting.values())):
            self.latents.append(latents.cpu())

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        try:
            self.parts.append(running.result())
        finally:
            _warn(self._problems)
            self._problems = []

    def scores(self, groups: Tensor) -> Scores:
        """Return the scores of all images that were added.

        Args:
            groups: (B,), group of each image.

        Returns:
            Scores by name, (B,); an extra is NaN for the micro-batches without it.
        """
        self._wait()
        late = self._late(groups) if self.waiting else Scores({})
        sizes = [len(next(iter(part.values.values()), ())) for part in self.parts]
        names = dict.fromkeys(name for part in self.parts for name in part)
        found = {
            name: torch.cat(
                [
                    part[name] if name in part.values else torch.full((size,), math.nan)
                    for part, size in zip(self.parts, sizes, strict=True)
                ]
            )
            for name in names
        }
        return Scores({**found, **late.values})

    def _late(self, groups: Tensor) -> Scores:
        """Score whole groups, on the device of the micro-batches."""
        images, latents = (torch.cat(parts) if parts else None for parts in (self.images, self.latents))
        return score(self.waiting, images, self.prompts, groups, latents, device=self._device)


def _score_one(
    name: str,
    reward: Reward,
    batch: Batch,
    problems: list[str],
    device: torch.device | None,
    batch_size: int | None,
) -> dict[str, Tensor]:
    size = None if needs_groups(reward) else batch_size
    table, error = guarded_parts(name, reward, batch, size, device)
    seen, prompts, values = wanted(reward, batch.images, batch.latents), batch.prompts, table[name]
    finite = seen.isfinite().flatten(1).all(1).cpu() & values.isfinite()
    if failed := [prompt.text for prompt, good in zip(prompts, finite.tolist(), strict=True) if not good]:
        cause = said(error) if error else "an image or its score is not finite"
        problems.append(
            f"reward {name!r} failed on {len(failed)} of {len(prompts)} samples ({cause}); "
            f"they count as NaN: {named(failed)}"
        )
    return {key: torch.where(finite, found, math.nan) for key, found in table.items()}
