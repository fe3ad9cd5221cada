"""Scores images with every reward; one bad sample never costs the batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.structures import Prompt, Scores


class RewardWarning(UserWarning):
    """A reward failed on some samples, whose scores are NaN."""


def score(rewards: Mapping[str, Reward] | Sequence[Reward], images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """Every reward on images (B, 3, H, W), float, [0, 1], one per prompt: named scores, each (B,) float32 on the CPU.

    Names are the mapping's keys, or the rewards' own. A reward that raises is asked again sample by sample; the samples
    on which it raises again, or returns no finite number, get NaN, with a ``RewardWarning`` that names them. So do
    images that are not finite. No gradient is kept.

    ValueError: images and prompts differ in number, two rewards share a name, or a result is not of shape (B,).
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts: pass one prompt per image")
    named = rewards if isinstance(rewards, Mapping) else {reward.name: reward for reward in rewards}
    if len(named) != len(rewards):
        raise ValueError(f"rewards share a name: {[reward.name for reward in rewards]}; pass a mapping with names")
    with torch.no_grad():
        return Scores({name: _score_one(name, reward, images, prompts) for name, reward in named.items()})


def _score_one(name: str, reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    values, error = _values(name, reward, images, prompts)
    finite = images.isfinite().flatten(1).all(1).cpu() & values.isfinite()
    if failed := [prompt.text for prompt, good in zip(prompts, finite.tolist(), strict=True) if not good]:
        cause = f"{type(error).__name__}: {error}" if error else "an image or its score is not finite"
        warnings.warn(
            f"reward {name!r} failed on {len(failed)} of {len(prompts)} samples ({cause}); "
            f"they count as NaN: {', '.join(map(repr, dict.fromkeys(failed)))}",
            RewardWarning,
            stacklevel=4,
        )
    return torch.where(finite, values, math.nan)


def _values(name: str, reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, Exception | None]:
    """The scores, and the last error of the samples that failed."""
    try:
        result = reward(images, [p.text for p in prompts], [p.metadata for p in prompts])
    except Exception as error:  # rewards are user code: what they raise is unknown
        if len(prompts) == 1:
            return torch.tensor([math.nan]), error
        # Out of memory, or one bad sample: alone, the others can still be scored.
        parts = [_values(name, reward, images[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))]
        return torch.cat([part for part, _ in parts]), next((e for _, e in reversed(parts) if e), None)
    return _checked(name, result, len(prompts)), None


def _checked(name: str, result: Tensor, count: int) -> Tensor:
    values = torch.as_tensor(result).detach().to("cpu", torch.float32)
    if values.shape != (count,):
        raise ValueError(
            f"reward {name!r} returned shape {tuple(values.shape)} for {count} images: return one number each"
        )
    return values
