"""GenAI-Rank (arXiv 2406.13743): best of nine images by VQAScore.

Protocol of linzhiqiu/t2v_metrics@6ecb74f, genai_image_ranking.py: 800 prompts with nine images of one model, scored by
CLIP-FlanT5-XXL; the mean of the nine images, the best of nine, and the mean of the best of each three, by the judge.
Human ratings exist of the published images only, so how often people share a choice is not measured on a user's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from diffalign.benchmarks.protocol import Figures, Judged, Protocol, mean, register_benchmark
from diffalign.benchmarks.skills import COMPARABLE, JUDGES, WHERE, by_skill, read

IMAGES, BEST_OF = 9, 3
PROTOCOL = Protocol(
    title="GenAI-Rank",
    source="arXiv 2406.13743, linzhiqiu/t2v_metrics@6ecb74f",
    size=800,
    images_per_prompt=IMAGES,
    judges=JUDGES,
    prompts="zhiqiulin/GenAI-Image-Ranking-800",
    where=WHERE.format("zhiqiulin/GenAI-Image-Ranking-800", "human_rating.json"),
    comparable=f"{COMPARABLE} Published rankings are of DALL-E 3 and SDXL images with human ratings, which a model of "
    "your own has not.",
    headline="best of 9, all",
    read=partial(read, file="human_rating.json"),
    needs=("skills",),
    layout="{id}/{sample}.jpeg",
)


@register_benchmark("genai_rank", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the best of nine, the mean of the best of each three, and the mean of nine, by skill."""
    ways: dict[str, Callable[[list[float]], float]] = {"best of 9": best, "best of 3": best_of_each, "mean of 9": mean}
    return {f"{name}, {skill}": value for name, way in ways.items() for skill, value in by_skill(judged, way).items()}


def best(values: Sequence[float]) -> float:
    """Return the largest number that is not NaN; NaN if there is none."""
    return max((value for value in values if value == value), default=math.nan)


def best_of_each(values: Sequence[float]) -> float:
    """Return the mean of the best of each three in order."""
    return mean(best(values[start : start + BEST_OF]) for start in range(0, len(values), BEST_OF))
