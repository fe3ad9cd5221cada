"""Asks a reward so that one bad sample costs itself alone."""

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
    """Images (B, 3, H, W), their prompts and group ids (B,)."""

    images: Tensor
    prompts: Sequence[Prompt]
    groups: Tensor

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        return Batch(self.images[rows], [self.prompts[i] for i in rows], self.groups[rows])

    def parts(self, whole_groups: bool) -> list[list[int]]:
        """The places of each sample, or of each group."""
        if not whole_groups:
            return [[i] for i in range(len(self.prompts))]
        return [(self.groups == label).nonzero()[:, 0].tolist() for label in self.groups.unique()]


@torch.no_grad()
def guarded(name: str, reward: Reward, batch: Batch) -> tuple[dict[str, Tensor], Exception | None]:
    """Scores under ``name``, numbers that a reward adds under "name/extra": each (B,), float32, on the CPU.

    A reward that raises is asked again sample by sample (group by group if it needs groups). Samples on which it raises
    again have NaN, and the last of these errors comes along. RewardUnavailable: it can score nothing.
    """
    count = len(batch.prompts)
    try:
        return _table(name, reward, batch), None
    except RewardUnavailable:
        raise
    except Exception as error:  # rewards are user code: what they raise is unknown
        parts = batch.parts(needs_groups(reward))
        if len(parts) <= 1:
            return {name: torch.full((count,), math.nan)}, error
        # Out of memory, or one bad sample: alone, the others can still be scored.
        return _joined([(rows, *guarded(name, reward, batch[rows])) for rows in parts], count)


def _table(name: str, reward: Reward, batch: Batch) -> dict[str, Tensor]:
    texts, metadata = [p.text for p in batch.prompts], [p.metadata for p in batch.prompts]
    values, extras = ask(reward, batch.images, texts, metadata, batch.groups)
    # Maps and the like are for who calls the reward itself.
    numbers = {f"{name}/{key}": extra for key, extra in extras.items() if extra.shape == values.shape}
    return {key: found.detach().to("cpu", torch.float32) for key, found in {name: values, **numbers}.items()}


def _joined(
    found: Sequence[tuple[Sequence[int], dict[str, Tensor], Exception | None]], count: int
) -> tuple[dict[str, Tensor], Exception | None]:
    table = {key: torch.full((count,), math.nan) for _, part, _ in found for key in part}
    for rows, part, _ in found:
        for key, values in part.items():
            table[key][rows] = values
    return table, next((error for *_, error in reversed(found) if error), None)
