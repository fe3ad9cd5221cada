"""EditScore (arXiv 2509.23909): a VLM judges an edit by its source and its result, on an OpenAI-compatible server.

One question shows both images, and asks for the success of the edit and for how little else changed; one shows the
result, and asks for naturalness and freedom from artifacts. Each gives two numbers from 0 to 25; the score is the
geometric mean of the two minima, from 0 to 10.

Departures from the published code: 1. answers are decoded greedily, not averaged over sampled passes; 2. an answer
without two numbers scores NaN, where the code guesses; 3. images are not numbered in the chat ("<img1>: ").
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.rewards.base import Extras, Metadata, RewardCard, register
from diffalign.rewards.support.http_client import RemoteError
from diffalign.rewards.support.preprocess import on_images
from diffalign.rewards.support.prompts import fill, published_template
from diffalign.rewards.support.sources import source_images
from diffalign.rewards.vlm_judge import Endpoint, connect, query_all

SCALE, HIGHEST = 25.0, 10.0  # of the judge's numbers, and of the score
AXES = ("prompt_following", "consistency", "perceptual_quality")
CARD = RewardCard("success of an edit, what else changed, and quality", 0.5, "arXiv 2509.23909", served=True)


def two_scores(text: str) -> tuple[float, float]:
    """Parse two numbers from 0 to 25 in "score" of the answer's JSON. Raises RemoteError if they are missing."""
    start, end = text.find("{"), text.rfind("}") + 1
    try:
        found = json.loads(text[start:end].replace("\n", " "))["score"]
    except (ValueError, KeyError, TypeError):  # the reasoning may hold quotation marks
        listed = re.findall(r'"?score"?\s*:\s*\[([^\]]*)\]', text)
        found = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", listed[-1])] if listed else None
    numbers = isinstance(found, list) and all(isinstance(n, (int, float)) and 0 <= n <= SCALE for n in found)
    if not numbers or len(found) != 2:
        raise RemoteError(f'the judge said {text[:200]!r}, not {{"score": [number, number]}} from 0 to {SCALE:g}')
    return float(found[0]), float(found[1])


@dataclass(frozen=True)
class EditScore:
    """Score edits by a judge behind ``endpoint``; the source is "image" in a prompt's metadata."""

    name: str
    endpoint: Endpoint
    semantic: str
    quality: str
    differentiable: bool = False
    range: tuple[float, float] = (0.0, HIGHEST)

    @on_images(*AXES)
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Tensor, Extras]:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU, and the extras ``AXES``."""
        sources = source_images(metadata, (images.shape[-2], images.shape[-1]))

        def query(i: int) -> list[float]:
            result = self.endpoint.encode(images[i])
            both = [self.endpoint.encode(sources[i]), result]
            success, kept = two_scores(self.endpoint.ask(fill(self.semantic, prompts[i]), both).text)
            looks = min(two_scores(self.endpoint.ask(self.quality, [result]).text))
            return [
                HIGHEST / SCALE * number for number in (math.sqrt(min(success, kept) * looks), success, kept, looks)
            ]

        failed = [math.nan] * (1 + len(AXES))
        found = torch.tensor(query_all(self.name, self.endpoint.client, query, range(len(images)), failed)).float()
        return found[:, 0], dict(zip(AXES, found[:, 1:].T, strict=True))


@register("editscore", CARD)
def editscore(
    name: str,
    url: str,
    model: str,
    token_env: str | None = None,
    timeout: float = 60.0,
    retries: int = 4,
    concurrency: int = 8,
    max_tokens: int = 512,
) -> EditScore:
    """Build the judge; see ``HTTPClient.for_url``.

    EditScore-7B is a LoRA: ``vllm serve Qwen/Qwen2.5-VL-7B-Instruct --enable-lora --lora-modules
    editscore=EditScore/EditScore-7B``.
    """
    endpoint = connect(url, model, token_env, timeout, retries, concurrency, max_tokens)
    return EditScore(name, endpoint, published_template("editscore_semantic"), published_template("editscore_quality"))
