"""Pick-a-Pic test: the 500 unique prompts of its test split, one image each, means and medians of five rewards.

The tables of the DPO family use these prompts; the DPO paper prints medians.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.benchmarks.panel import JUDGES, SCALE, means, medians
from diffalign.benchmarks.protocol import Figures, Judged, Protocol, register_benchmark

PROTOCOL = Protocol(
    title="Pick-a-Pic test",
    source="arXiv 2305.01569, split test_unique",
    size=500,
    images_per_prompt=1,
    judges=JUDGES,
    prompts="liuhuohuo2/pick-a-pic-v2?split=test_unique&column=caption&metadata=&unique=true",
    where="the prompts come from the hub (liuhuohuo2/pick-a-pic-v2, a copy of v2 by others, split test_unique, MIT)",
    comparable=f"Comparable at equal resolution, steps and guidance: {SCALE}. These are of v2; papers differ in v1 or "
    "v2, test or validation_unique, and HPSv2.1 is often printed times 100.",
    headline="pickscore",
)


@register_benchmark("pickapic", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the mean and the median of every reward."""
    return {**means(judged), **medians(judged)}
