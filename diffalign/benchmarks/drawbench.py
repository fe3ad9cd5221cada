"""DrawBench panel: 200 prompts, one image each, the means of five rewards; the common table of the RL papers.

There HPSv2.1 is divided by 100, and CLIPScore is a cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.benchmarks.panel import JUDGES, SCALE, means
from diffalign.benchmarks.protocol import Figures, Judged, Protocol, register_benchmark

PROTOCOL = Protocol(
    title="DrawBench panel",
    source="arXiv 2205.11487 (prompts); the common table of the RL papers",
    size=200,
    images_per_prompt=1,
    judges=JUDGES,
    prompts="drawbench",
    where="the prompts come from the hub (sayakpaul/drawbench, Apache-2.0)",
    comparable=f"Comparable at equal resolution, steps and guidance: {SCALE}.",
    headline="pickscore",
)


@register_benchmark("drawbench", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the mean of every reward."""
    return means(judged)
