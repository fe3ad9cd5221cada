"""Estimate how far a benchmark's headline figure would move with other prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from diffalign.benchmarks.protocol import Benchmark, Judged, by

DRAWS = 100


def interval(benchmark: Benchmark, judged: Sequence[Judged], draws: int = DRAWS) -> tuple[float, float] | None:
    """Return a 95 % bootstrap interval of the headline over prompts, drawn within each tag; None if it has no number.

    Images of one prompt stay together.
    """
    rng = random.Random(0)
    tags: list[list[list[Judged]]] = []
    for own in by(judged, "tag").values():
        prompts: dict[int, list[Judged]] = {}
        for one in own:
            prompts.setdefault(one.index, []).append(one)
        tags.append(list(prompts.values()))
    values = []
    for _ in range(draws):
        drawn = [images for prompts in tags for images in rng.choices(prompts, k=len(prompts))]
        again = [replace(one, index=index) for index, images in enumerate(drawn) for one in images]
        values.append(benchmark.summarise(again).get(benchmark.protocol.headline, math.nan))
    found = sorted(value for value in values if not math.isnan(value))
    if len(found) < draws:
        return None
    return found[int(0.025 * draws)], found[min(draws - 1, int(0.975 * draws))]
