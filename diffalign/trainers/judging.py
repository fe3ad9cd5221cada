"""From latents to the loss of what rewards say of their images, with the gradient all the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.diffusion.recipe import Recipe
from diffalign.diffusion.unroll import in_slices
from diffalign.losses.refl import PUBLISHED_THRESHOLDS, get_reward_loss
from diffalign.losses.srpo import relative_reward
from diffalign.models import DiffusionModel
from diffalign.rewards.base import Reward, ask
from diffalign.structures import Prompt


@dataclass(frozen=True)
class Seen:
    """What the rewards are to judge. latents: (B, C, h, w). group: (B,), the prompt's. weight: (B,), of each loss.

    inverted: control words are swapped. word_weight: SRPO's k.
    """

    latents: Tensor
    prompts: Sequence[Prompt]
    group: Tensor
    weight: Tensor
    inverted: bool = False
    word_weight: float = 0.0


class Judge:
    """Decodes and judges. weights, thresholds: of ``rewards``, by name.

    slice_size: images that are decoded and judged at once, 0 for all of a batch; the gradient is the same.
    """

    def __init__(
        self,
        model: DiffusionModel,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        thresholds: Mapping[str, float],
        recipe: Recipe,
        slice_size: int,
        decode_dtype: torch.dtype,
    ) -> None:
        self.model, self.rewards, self.weights, self.recipe = model, rewards, weights, recipe
        self.loss, self.thresholds = get_reward_loss(recipe.reward_loss), thresholds
        self.slice_size, self.decode_dtype = slice_size, decode_dtype

    def __call__(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss, and the mean of each reward."""
        count = len(seen.latents)
        heard: list[dict[str, Tensor]] = []

        def loss(latents: Tensor, rows: slice) -> Tensor:
            losses, rewards = self._losses(latents, seen, rows)
            heard.append(rewards)
            return (seen.weight[rows] * losses).sum() / count

        sliced = 0 < self.slice_size < count
        total = in_slices(loss, seen.latents, self.slice_size) if sliced else loss(seen.latents, slice(None))
        means = {name: torch.cat([one[name] for one in heard]).mean() for name in self.rewards}
        weighted = torch.stack([self.weights[name] * value for name, value in means.items()]).sum()
        return total, {**{f"reward/{name}": value for name, value in means.items()}, "reward/mean": weighted}

    def _losses(self, latents: Tensor, seen: Seen, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the rewards' losses for some rows, (b,), and each reward, (b,), a constant."""
        dtype = self.decode_dtype
        with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
            images = self.model.decode(latents)
        losses, rewards = latents.new_zeros(len(latents)), {}
        for name, reward in self.rewards.items():
            value = self._reward(reward, images, seen, seen.prompts[rows])
            options: dict[str, Any] = {"threshold": self.thresholds[name]} if self.loss.threshold else {}
            options |= {"groups": seen.group[rows].to(value.device)} if self.loss.groups else {}
            losses = losses + self.weights[name] * self.loss.function(value, **options)
            rewards[name] = value.detach()
        return losses, rewards

    def _reward(self, reward: Reward, images: Tensor, seen: Seen, prompts: Sequence[Prompt]) -> Tensor:
        """What a reward says, relative to control words where the recipe has some: (b,)."""
        metadata, texts = [prompt.metadata for prompt in prompts], [prompt.text for prompt in prompts]
        if self.recipe.words is None:
            return ask(reward, images, texts, metadata)[0]
        words = self.recipe.words[::-1] if seen.inverted else self.recipe.words
        wanted, unwanted = (ask(reward, images, [f"{w} {text}" for text in texts], metadata)[0] for w in words)
        return relative_reward(wanted, unwanted, seen.word_weight)


def thresholds(recipe: Recipe, rewards: Mapping[str, Reward], given: Mapping[str, float]) -> dict[str, float]:
    """That of each reward, as given, else as published; empty where the recipe's loss has none.

    ValueError where one is missing, or given for no reward.
    """
    if not get_reward_loss(recipe.reward_loss).threshold:
        return {}
    if unknown := [name for name in given if name not in rewards]:
        raise ValueError(f"thresholds: {', '.join(unknown)} is none of the rewards {', '.join(rewards)}")
    known = {name: given.get(name, PUBLISHED_THRESHOLDS.get(reward.name)) for name, reward in rewards.items()}
    if missing := [name for name, value in known.items() if value is None]:
        raise ValueError(
            f"the loss {recipe.reward_loss!r} needs a threshold of {', '.join(missing)}, in its units: write "
            f"thresholds: {{{missing[0]}: ...}}, somewhat above what the base scores"
        )
    return {name: value for name, value in known.items() if value is not None}
