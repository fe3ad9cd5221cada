"""The panel of rewards that preference-tuning papers print together.

A base without classifier-free guidance is far below what users see: both are sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.benchmarks.protocol import Figures, Judge, Judged, mean, median

REWARDS = ("pickscore", "clipscore", "hpsv2.1", "aesthetic", "image_reward")
JUDGES = {name: Judge(name) for name in REWARDS}
SCALE = "PickScore on the scale of about 22, CLIPScore as a cosine of ViT-L/14, HPSv2.1 as a fraction"


def means(judged: Sequence[Judged]) -> Figures:
    """Return the mean of every reward."""
    return {name: mean(one.answer(name) for one in judged) for name in _asked(judged)}


def medians(judged: Sequence[Judged]) -> Figures:
    """Return the median of every reward."""
    return {f"{name}, median": median(one.answer(name) for one in judged) for name in _asked(judged)}


def _asked(judged: Sequence[Judged]) -> list[str]:
    return list(dict.fromkeys(name for one in judged for name in one.answers))
