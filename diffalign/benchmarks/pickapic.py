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
    prompts="yuvalkirstain/pickapic_v1_no_images?split=test_unique&column=caption&metadata=&unique=true",
    where="the prompts come from the hub (yuvalkirstain/pickapic_v1_no_images, split test_unique, MIT)",
    comparable=f"Comparable at equal resolution, steps and guidance: {SCALE}. Papers differ in v1 or v2, test or "
    "validation_unique, and HPSv2.1 is often printed times 100.",
    headline="pickscore",
)


@register_benchmark("pickapic", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the mean and the median of every reward."""
    return {**means(judged), **medians(judged)}
