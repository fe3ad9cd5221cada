"""ImageDoctor (arXiv 2510.01010) on an OpenAI-compatible server: four scores after reasoning; no heatmaps.

The question is the published one. Images are resized to about 512 x 512 pixels of area, as in the authors' script; the
default weights of the axes are those of their training on this reward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffalign.rewards.base import RewardCard, register
from diffalign.rewards.support.http_client import data_url
from diffalign.rewards.support.preprocess import resize
from diffalign.rewards.support.prompts import published_template
from diffalign.rewards.vlm_judge import AxesJudge, Endpoint, connect

AREA = 512 * 512
AXES = {"semantic alignment": 0.8, "aesthetic": 0.1, "plausibility": 0.1, "overall impression": 0.0}


@dataclass(frozen=True)
class SmallEndpoint(Endpoint):
    """An endpoint that gets images of about ``AREA`` pixels."""

    def encode(self, image: Tensor) -> str:
        """Resize an image (3, H, W), and encode it as a data URL."""
        height, width = image.shape[-2:]
        ratio = math.sqrt(AREA / (height * width))
        size = (max(1, int(height * ratio)), max(1, int(width * ratio)))
        return data_url(resize(image[None], size, quantize=True)[0], self.jpeg)


FACTS = RewardCard(
    "human preference, with fidelity", 0.05, "arXiv 2510.01010", "GYX97/ImageDoctor", "not stated", 8290, served=True
)


@register("image_doctor", FACTS)
def image_doctor(
    name: str,
    url: str,
    model: str = FACTS.weights,
    weights: Mapping[str, float] | None = None,
    token_env: str | None = None,
    timeout: float = 160.0,
    retries: int = 4,
    concurrency: int = 8,
    max_tokens: int = 4096,
) -> AxesJudge:
    """Build the judge. weights: of the axes, by the keys of ``AXES``; axes left out weigh 0."""
    given = AXES if weights is None else {axis: float(weights.get(axis, 0.0)) for axis in AXES}
    if unknown := (weights or {}).keys() - AXES.keys():
        raise ValueError(f"reward {name!r}: no axis {', '.join(sorted(unknown))}; the axes are {', '.join(AXES)}")
    if min(given.values()) < 0 or sum(given.values()) <= 0:
        raise ValueError(f"reward {name!r}: weights must not be negative, and one must be positive")
    plain = connect(url, model, token_env, timeout, retries, concurrency, max_tokens)
    return AxesJudge(name, SmallEndpoint(**vars(plain)), published_template("image_doctor"), given, 0.0, 1.0)
