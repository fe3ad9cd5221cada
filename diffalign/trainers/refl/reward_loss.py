"""Decode latents and compute the differentiable loss of their rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.diffusion import trajectory
from diffalign.diffusion.reward_gradient_presets import Recipe
from diffalign.losses.refl import PUBLISHED_THRESHOLDS
from diffalign.losses.registry import get_reward_loss
from diffalign.losses.srpo import relative_reward
from diffalign.models import DiffusionModel
from diffalign.rewards.base import Metadata, Reward, RewardUnavailable, ask, wanted, wants_latents
from diffalign.rewards.support.isolation import named, said
from diffalign.structures import Prompt


@dataclass(frozen=True)
class RewardInputs:
    """Samples to score, with the weights of their losses.

    Attributes:
        latents: (B, C, h, w), final latents, which carry the gradient.
        prompts: B prompts.
        group: (B,), index of each sample's prompt.
        weight: (B,), factor of each sample's loss.
        words: SRPO's control words, wanted and unwanted; None without.
        word_weight: SRPO's k, as in a ``GradientPath``.
    """

    latents: Tensor
    prompts: Sequence[Prompt]
    group: Tensor
    weight: Tensor
    words: tuple[str, str] | None = None
    word_weight: float = 0.0


@dataclass(frozen=True)
class Shown:
    """Samples as rewards see them: latents (b, C, ...), and images (b, 3, H, W), None if no reward needs them."""

    latents: Tensor
    images: Tensor | None

    def __getitem__(self, rows: slice) -> Shown:
        return Shown(self.latents[rows], None if self.images is None else self.images[rows])

    def __len__(self) -> int:
        return len(self.latents)

    def leave_out(self, scored: Tensor) -> None:
        """Zero the gradient of samples outside ``scored`` (b,): 0 * NaN is NaN."""
        for part in (self.latents, self.images):
            if part is not None and part.requires_grad:
                rows = scored.view(-1, *[1] * (part.ndim - 1))
                part.register_hook(lambda gradient, rows=rows: torch.where(rows, gradient, 0))


class Judge:
    """Decode latents, score the images, and compute the loss of the rewards.

    Args:
        model: Decodes.
        rewards: Differentiable rewards by name.
        weights: Weight of each reward.
        thresholds: Threshold of each reward; empty for a loss without thresholds.
        recipe: Names the loss.
        slice_size: Images decoded and scored at once, 0 for the whole batch; the gradient is the same.
        decode_dtype: Dtype in which the VAE may compute.
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
        self.model, self.rewards, self.weights = model, rewards, weights
        self.loss, self.thresholds = get_reward_loss(recipe.reward_loss), thresholds
        self.slice_size, self.decode_dtype = slice_size, decode_dtype
        self._asked: list[tuple[Sequence[Prompt], Tensor]] = []
        self._error: Exception | None = None

    def __call__(self, seen: RewardInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss and metrics: the mean of each reward over scored samples, and the share of the others.

        A sample for which a reward raises or returns no finite number has no loss and no part in any mean.
        """
        count = len(seen.latents)
        results: list[dict[str, Tensor]] = []

        def loss(latents: Tensor, rows: slice) -> Tensor:
            losses, rewards = self._losses(latents, seen, rows)
            self._asked.append((seen.prompts[rows], rewards["unscored"]))
            results.append(rewards)
            return (seen.weight[rows] * losses).sum() / count

        sliced = 0 < self.slice_size < count
        total = trajectory.in_slices(loss, seen.latents, self.slice_size) if sliced else loss(seen.latents, slice(None))
        found = {name: torch.cat([one[name] for one in results]) for name in (*self.rewards, "unscored")}
        means = {name: found[name].nanmean() for name in self.rewards}
        weighted = torch.stack([self.weights[name] * value for name, value in means.items()]).sum()
        figures = {f"reward/{name}": value for name, value in means.items()}
        return total, {**figures, "reward/mean": weighted, "unscored": found["unscored"].float().mean()}

    def failures(self, some: bool) -> str | None:
        """Return a warning about the samples without a score since the last call, or None.

        Args:
            some: False if no process has such samples, which saves reading the flags from the device.
        """
        asked, error = self._asked, self._error
        self._asked, self._error = [], None
        if not some:
            return None
        flags = torch.cat([flag for _, flag in asked]).tolist()
        texts = [prompt.text for prompts, _ in asked for prompt in prompts]
        failed = [text for text, flag in zip(texts, flags, strict=True) if flag]
        if not failed:
            return None  # those of another process
        cause = said(error) if error else "a score is not finite"
        return f"rewards failed on {len(failed)} of {len(texts)} samples ({cause}); they train nothing: {named(failed)}"

    def _losses(self, latents: Tensor, seen: RewardInputs, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the rewards' losses of some rows, (b,), and rewards by name, (b,), detached.

        The entry "unscored" of the rewards flags the samples without a score.
        """
        shown = self._shown(latents)
        losses, rewards = latents.new_zeros(len(latents)), {}
        scored = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
        for name, reward in self.rewards.items():
            value = self._reward(reward, shown, seen, seen.prompts[rows])
            options: dict[str, Any] = {"threshold": self.thresholds[name]} if self.loss.threshold else {}
            options |= {"groups": seen.group[rows].to(value.device)} if self.loss.groups else {}
            losses = losses + self.weights[name] * self.loss.function(value, **options)
            rewards[name] = value.detach()
            scored = scored & rewards[name].isfinite().to(scored.device)
        shown.leave_out(scored)
        kept = {name: torch.where(scored.to(value.device), value, math.nan) for name, value in rewards.items()}
        return torch.where(scored, losses, 0), {**kept, "unscored": ~scored}

    def _shown(self, latents: Tensor) -> Shown:
        """Decode latents, unless all rewards want them as they are."""
        dtype, latents = self.decode_dtype, latents.view_as(latents)  # a tensor of its own, for its hook
        if all(map(wants_latents, self.rewards.values())):
            return Shown(latents, None)
        with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
            return Shown(latents, self.model.decode(latents))

    def _reward(self, reward: Reward, shown: Shown, seen: RewardInputs, prompts: Sequence[Prompt]) -> Tensor:
        """Score samples with a reward, relative to control words if the recipe has some: (b,)."""
        metadata, texts = [prompt.metadata for prompt in prompts], [prompt.text for prompt in prompts]
        if seen.words is None:
            return self._ask(reward, shown, texts, metadata)
        good, bad = (self._ask(reward, shown, [f"{w} {text}" for text in texts], metadata) for w in seen.words)
        return relative_reward(good, bad, seen.word_weight)

    def _ask(self, reward: Reward, shown: Shown, texts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score samples, (b,); a reward that raises is called one by one, with NaN for those it fails on."""
        try:
            return ask(reward, shown.images, texts, metadata, latents=shown.latents)[0]
        except (RewardUnavailable, torch.OutOfMemoryError):
            raise
        except Exception as error:  # rewards are user code: what they raise is unknown
            self._error = error
            if len(shown) == 1:
                return wanted(reward, shown.images, shown.latents).flatten(1).mean(1) * math.nan
            alone = [
                self._ask(reward, shown[i : i + 1], texts[i : i + 1], metadata[i : i + 1]) for i in range(len(shown))
            ]
            return torch.cat(alone)


def thresholds(recipe: Recipe, rewards: Mapping[str, Reward], given: Mapping[str, float]) -> dict[str, float]:
    """Return the threshold of each reward, as given, else as published; empty if the recipe's loss has none.

    Raises:
        ValueError: A threshold is missing, or names none of the rewards.
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
