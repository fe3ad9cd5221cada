"""UnifiedReward 2.0 (arXiv 2503.05236) and UnifiedReward-Think (arXiv 2505.03318) on an OpenAI-compatible server.

``vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --served-model-name UnifiedReward`` is how the authors serve it.
Questions are the published ones, images are sent as JPEG of quality 95, and answers are decoded greedily.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.rewards.base import RewardCard, register
from diffalign.rewards.support.http_client import RemoteError
from diffalign.rewards.support.prompts import fill, published_template
from diffalign.rewards.vlm_judge import NUMBER, AxesJudge, PairwiseJudge, connect

AXES = ("alignment", "coherence", "style")
JPEG = 95
MAX_TOKENS = 4096
PAIR = rf"score\s*:\s*image\s*1\s*:\s*{NUMBER}\s*image\s*2\s*:\s*{NUMBER}"  # after the name of an axis
SUM_ERROR = 0.05  # by which the two scores of an axis may miss their sum of 1


def pair_share(text: str, axis: str) -> float:
    """Parse the first image's share of an axis from an answer. Raises RemoteError if there is none."""
    found = re.search(rf"{axis}\s*{PAIR}", text, re.IGNORECASE)
    if found:
        first, second = float(found[1]), float(found[2])
        if min(first, second) >= 0 and math.isclose(first + second, 1, abs_tol=SUM_ERROR):
            return first / (first + second)
    raise RemoteError(f"the judge said {text[:200]!r}, without two {axis} scores that sum to 1")


@dataclass(frozen=True)
class UnifiedPairs(PairwiseJudge):
    """Preference by UnifiedReward 2.0's relative scores of two images, averaged over axes."""

    axes: tuple[str, ...] = AXES

    def preference(self, prompt: str, images: Sequence[str]) -> float:
        """Return the mean share of the first image."""
        text = self.endpoint.ask(fill(self.question, prompt), images).text
        return sum(pair_share(text, axis) for axis in self.axes) / len(self.axes)


@dataclass(frozen=True)
class UnifiedThink(PairwiseJudge):
    """Preference by UnifiedReward-Think, which reasons, and names the better image in <answer> tags."""

    def preference(self, prompt: str, images: Sequence[str]) -> float:
        """Return 1 if the first image is better, else 0."""
        answer = self.endpoint.ask(fill(self.question, prompt), images)
        found = re.fullmatch(r"\s*image\s*([12])\s*is\s*better\W*", answer.verdict, re.IGNORECASE)
        if not found:
            raise RemoteError(f"the judge said {answer.text[-200:]!r}, without an image that is better")
        return float(found[1] == "1")


def _axes(name: str, axis: str) -> tuple[str, ...]:
    if axis != "mean" and axis not in AXES:
        raise ValueError(f"reward {name!r}: axis must be one of mean, {', '.join(AXES)}, got {axis!r}")
    return AXES if axis == "mean" else (axis,)


CODE = "MIT (its code)"
WEIGHTS, THINK = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b", "CodeGoat24/UnifiedReward-Think-qwen3vl-8b"
RATING = RewardCard("human preference", 0.1, "arXiv 2503.05236", WEIGHTS, CODE, 8770, served=True)
PAIRS = RewardCard("share of its group that an image beats", 0.05, "arXiv 2503.05236", WEIGHTS, CODE, 8770, served=True)
REASONED = RewardCard(
    "share of its group that an image beats", 0.05, "arXiv 2505.03318", THINK, CODE, 8770, served=True
)


@register("unified_reward", RATING)
def unified_reward(
    name: str,
    url: str,
    model: str = "UnifiedReward",
    axis: str = "mean",
    token_env: str | None = None,
    timeout: float = 160.0,
    retries: int = 4,
    concurrency: int = 8,
    max_tokens: int = MAX_TOKENS,
) -> AxesJudge:
    """Build the judge that rates alignment, coherence and style from 1 to 5; ``axis``: one of them, or "mean"."""
    chosen = _axes(name, axis)
    endpoint = connect(url, model, token_env, timeout, retries, concurrency, max_tokens, jpeg=JPEG)
    weights = {one: float(one in chosen) for one in AXES}
    return AxesJudge(name, endpoint, published_template("unified_reward"), weights, 1.0, 5.0)


@register("unified_reward_pairs", PAIRS)
def unified_reward_pairs(
    name: str,
    url: str,
    model: str = "UnifiedReward",
    axis: str = "mean",
    most_pairs: int = 28,
    token_env: str | None = None,
    timeout: float = 160.0,
    retries: int = 4,
    concurrency: int = 8,
    max_tokens: int = MAX_TOKENS,
) -> Any:
    """Build the judge that compares the images of a group; ``axis``: alignment, coherence, style or "mean"."""
    endpoint = connect(url, model, token_env, timeout, retries, concurrency, max_tokens, jpeg=JPEG)
    return UnifiedPairs(name, endpoint, published_template("unified_reward_pairs"), most_pairs, axes=_axes(name, axis))


@register("unified_reward_think", REASONED)
def unified_reward_think(
    name: str,
    url: str,
    model: str = "UnifiedReward",
    most_pairs: int = 28,
    token_env: str | None = None,
    timeout: float = 160.0,
    retries: int = 4,
    concurrency: int = 8,
    max_tokens: int = MAX_TOKENS,
) -> Any:
    """Build the judge that compares the images of a group after reasoning."""
    endpoint = connect(url, model, token_env, timeout, retries, concurrency, max_tokens, jpeg=JPEG)
    return UnifiedThink(name, endpoint, published_template("unified_reward_think"), most_pairs)
