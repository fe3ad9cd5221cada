"""Score a batch; an exception affects only the samples that cause it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.rewards.base import Reward, RewardUnavailable, ask, needs_groups
from diffalign.structures import Prompt


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, H, W), their prompts and group ids (B,), and the latents (B, C, ...) of generated images.

    Either images or latents may be None.
    """

    images: Tensor | None
    prompts: Sequence[Prompt]
    groups: Tensor
    latents: Tensor | None = None

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        images, latents = (None if part is None else part[rows] for part in (self.images, self.latents))
        return Batch(images, [self.prompts[i] for i in rows], self.groups[rows], latents)

    def parts(self, whole_groups: bool) -> list[list[int]]:
        """Split the rows into samples, or into groups."""
        if not whole_groups:
            return [[i] for i in range(len(self.prompts))]
        return [(self.groups == label).nonzero()[:, 0].tolist() for label in self.groups.unique()]


@torch.no_grad()
def guarded(name: str, reward: Reward, batch: Batch) -> tuple[dict[str, Tensor], Exception | None]:
    """Score a batch, and retry sample by sample (group by group for a group reward) after an exception.

    Returns:
        Scores by ``name`` and extras by "name/extra", each (B,), float32, on the CPU, with NaN for samples on which the
        reward raised again; and the last of these exceptions, or None.

    Raises:
        RewardUnavailable: the reward cannot score any sample.
    """
    count = len(batch.prompts)
    try:
        return _table(name, reward, batch), None
    except RewardUnavailable:
        raise
    except Exception as error:  # rewards are user code and may raise anything
        parts = batch.parts(needs_groups(reward))
        if len(parts) <= 1:
            return {name: torch.full((count,), math.nan)}, error
        # Out of memory, or one bad sample: the others can still be scored alone.
        return _merge([(rows, *guarded(name, reward, batch[rows])) for rows in parts], count)


def _table(name: str, reward: Reward, batch: Batch) -> dict[str, Tensor]:
    texts, metadata = [p.text for p in batch.prompts], [p.metadata for p in batch.prompts]
    values, extras = ask(reward, batch.images, texts, metadata, batch.groups, batch.latents)
    # Only extras of shape (B,) are stored; maps are available to direct callers.
    numbers = {f"{name}/{key}": extra for key, extra in extras.items() if extra.shape == values.shape}
    return {key: found.detach().to("cpu", torch.float32) for key, found in {name: values, **numbers}.items()}


def _merge(
    found: Sequence[tuple[Sequence[int], dict[str, Tensor], Exception | None]], count: int
) -> tuple[dict[str, Tensor], Exception | None]:
    table = {key: torch.full((count,), math.nan) for _, part, _ in found for key in part}
    for rows, part, _ in found:
        for key, values in part.items():
            table[key][rows] = values
    return table, next((error for *_, error in reversed(found) if error), None)
