"""HPDv2 test (arXiv 2306.09341): HPSv2.1 over four styles of 800 prompts.

Protocol of tgxs002/HPSv2@866735e: one image per prompt; a style scores the mean of the means of its chunks of 80
images, with the standard deviation of these means; HPSv2.1 times 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import pstdev

from diffalign.benchmarks.protocol import Figures, Judge, Judged, Protocol, by, mean, register_benchmark
from diffalign.data.prompt_source import LISTED, STYLES
from diffalign.data.prompts import load_prompts
from diffalign.structures import Prompt

CHUNK = 80
NAME = "hpdv2_benchmark"


def read(source: str) -> list[Prompt]:
    """Read the four files of the hub data set, of a folder with them, or any prompts with a "tag"."""
    folder = Path(source)
    if source != NAME and not folder.is_dir():
        return load_prompts(source)
    where = f"{LISTED[NAME].source}?file=benchmark/{{}}.json" if source == NAME else f"{folder}/{{}}.json"
    styles = {style: load_prompts(where.format(style)) for style in STYLES}
    return [
        Prompt(one.text, {"tag": style, "place": place})
        for style, own in styles.items()
        for place, one in enumerate(own)
    ]


PROTOCOL = Protocol(
    title="HPDv2 test",
    source="arXiv 2306.09341, tgxs002/HPSv2@866735e",
    size=3200,
    images_per_prompt=1,
    judges={"hpsv2.1": Judge("hpsv2.1")},
    prompts=NAME,
    where="the prompts come from the hub (zhwang/HPDv2, Apache-2.0)",
    comparable="Comparable with figures of HPSv2.1; those of HPSv2.0 are on another scale.",
    headline="overall",
    read=read,
    needs=("tag", "place"),
    layout="{tag}/{place:05d}.jpg",
)


@register_benchmark("hpdv2", PROTOCOL)
def summarise(judged: Sequence[Judged]) -> Figures:
    """Return the mean of the styles, and each style with the standard deviation of its chunks, times 100."""
    means: Figures = {}
    spread: Figures = {}
    for style, own in by(judged, "tag").items():
        values = [one.answer("hpsv2.1") for one in sorted(own, key=lambda one: (one.index, one.sample))]
        chunks = [mean(values[start : start + CHUNK]) for start in range(0, len(values), CHUNK)]
        means[style] = 100 * mean(chunks)
        spread[f"{style}, std of chunks"] = 100 * pstdev(chunks)
    return {"overall": mean(means.values()), **means, **spread}
