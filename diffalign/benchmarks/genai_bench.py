"""GenAI-Bench (arXiv 2406.13743): VQAScore by skill.

Protocol of linzhiqiu/t2v_metrics@6ecb74f, genai_bench/evaluate.py: 1600 prompts (527 of them in the paper on VQAScore),
one image each, scored by CLIP-FlanT5-XXL; the mean over the prompts of a skill, where "all" is every prompt that has
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from diffalign.benchmarks.protocol import Figures, Judged, Protocol, mean, register_benchmark
from diffalign.benchmarks.skills import COMPARABLE, JUDGES, WHERE, by_skill, read

PROTOCOL = Protocol(
    title="GenAI-Bench",
    source="arXiv 2406.13743, linzhiqiu/t2v_metrics@6ecb74f",
    size=1600,
    images_per_prompt=1,
    judges=JUDGES,
    prompts="zhiqiulin/GenAI-Bench-1600",
    where=WHERE.format("zhiqiulin/GenAI-Bench-1600", "genai_image.json"),
    comparable=COMPARABLE,
    headline="all",
    read=partial(read, file="genai_image.json"),
    needs=("skills",),
    layout="{id}.jpeg",
)


@register_benchmark("genai_bench", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the mean of all prompts with a skill, and of every skill."""
    return by_skill(judged, mean)
