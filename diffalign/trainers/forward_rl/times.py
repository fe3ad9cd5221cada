"""Training times of final images: on the rollout's own grid, or continuous, in strata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from diffalign.models import DiffusionModel
from diffalign.rng import KeyedRNG
from diffalign.structures import Level
from diffalign.trainers.forward_rl.config import GRIDS
from diffalign.trainers.forward_rl.presets import Method

STREAM = "forward_rl/times"


def strata(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """Split the integers from ``first`` to ``last`` - 1 into ``count`` consecutive ranges (low, high), high exclusive.

    Raises:
        ValueError: Fewer integers than ranges.
    """
    if last - first < count:
        raise ValueError(f"{last - first} steps do not fill {count} strata: lower num_times or raise time_fraction")
    bounds = np.floor(np.linspace(first, last, count + 1) + 1e-9).astype(int).tolist()
    return list(pairwise(bounds))


@dataclass(frozen=True)
class TrainingTimes:
    """Times of each image of an iteration.

    Attributes:
        method: How times are drawn.
        count: K, times per image.
        grid_steps: Steps of the rollout, from the noisiest, that a grid has.
        levels: Levels of the rollout.
        model: Gives the levels of continuous times.
    """

    method: Method
    count: int
    grid_steps: int
    levels: Level
    model: DiffusionModel

    def draw(self, rng: KeyedRNG, keys: Sequence[tuple[int, ...]]) -> Tensor:
        """Draw times: (n, K), indices of the rollout's levels, or positions in [0, 1], float64; equal keys share them.

        Args:
            rng: Keyed random numbers.
            keys: Address of each image.
        """
        drawn = {key: self._draw(rng.generator(STREAM, *key)) for key in dict.fromkeys(keys)}
        return torch.from_numpy(np.stack([drawn[key] for key in keys]))

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        method, count = self.method, self.count
        if method.times == "grid":
            return generator.permutation(self.grid_steps)[:count]
        if method.times in ("stratified", "stratified_all"):
            first = int(method.times == "stratified")
            return np.array([generator.integers(*part) for part in strata(first, self.grid_steps, count)])
        if method.times == "stratified_with_first":
            return np.array([0, *(generator.integers(*part) for part in strata(1, self.grid_steps, count - 1))])
        return generator.permutation(self._positions(generator.random(count)))

    def _positions(self, uniform: np.ndarray) -> np.ndarray:
        """Map a uniform number in each of K strata to a position in [time_min, 1]."""
        method = self.method
        share = (np.arange(self.count) + uniform) / self.count
        if method.times == "logit_normal":
            normal = [NormalDist().inv_cdf(min(max(one, 1e-12), 1 - 1e-12)) for one in share]
            position = 1 / (1 + np.exp(-(method.time_mean + method.time_std * np.array(normal))))
        else:
            position = method.time_min + (1 - method.time_min) * share
        shift = method.time_shift
        return np.clip(shift * position / (1 + (shift - 1) * position), method.time_min, 1)

    def level(self, drawn: Tensor) -> Level:
        """Return the levels of drawn times (B,)."""
        if self.method.times in GRIDS:
            return self.levels[drawn]
        return self.model.level_at(drawn * self.model.num_train_timesteps)
