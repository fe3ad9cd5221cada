"""A reward on another machine, asked over HTTP; ``server`` is what offers it there.

The protocol is one request, ``POST /score``: ``{"reward", "prompts", "metadata", "images"}`` (PNG in base64), answered
by ``{"scores": [...]}``, a number or null (no score) per image, with an "error" where one failed. Status 501 says that
no request for this reward can be answered here. ``GET /`` lists the rewards that are offered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Metadata, RewardCard, RewardUnavailable, register
from diffalign.rewards.support.http_client import HTTPClient, RemoteError, encode_image
from diffalign.rewards.support.reward_server import RewardServer, _Handler

__all__ = ["RemoteReward", "RewardServer", "_Handler", "remote"]
UNAVAILABLE = HTTPStatus.NOT_IMPLEMENTED


@dataclass(frozen=True)
class RemoteReward:
    """The reward ``reward`` of the server at ``client.url``: its scores, without extras.

    batch_size: images per request. Images whose request fails have no score (NaN), and a warning says why; so have
    those that are not finite, which are not sent. RewardUnavailable: the server says that it can score nothing.
    """

    name: str
    client: HTTPClient
    reward: str
    batch_size: int = 16
    differentiable: bool = False
    range: tuple[float, float] = (-math.inf, math.inf)

    def __post_init__(self) -> None:
        """ValueError for a batch of none."""
        if self.batch_size < 1:
            raise ValueError(f"reward {self.name!r}: batch_size is {self.batch_size}; write 1 or more")

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU."""
        seen = images.isfinite().flatten(1).all(1).nonzero()[:, 0].tolist()
        parts = [seen[i : i + self.batch_size] for i in range(0, len(seen), self.batch_size)]
        found = self.client.map(lambda rows: self._ask(images, prompts, metadata, rows), parts)
        values = torch.full((len(images),), math.nan)
        problems: dict[str, None] = {}
        for rows, result in zip(parts, found, strict=True):
            scores, problem = (None, str(result)) if isinstance(result, RemoteError) else result
            problem = self.client.clean(problem)
            if isinstance(result, RemoteError) and result.status == UNAVAILABLE:
                raise RewardUnavailable(problem)
            if problem:
                problems[problem] = None
            if scores:
                values[rows] = torch.tensor(scores, dtype=torch.float32)
        for problem in problems:
            warnings.warn(f"reward {self.name!r}: {problem}", stacklevel=2)
        return values

    def _ask(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata, rows: Sequence[int]
    ) -> tuple[list[float], str]:
        """Scores of these rows, and why some have none."""
        body = {
            "reward": self.reward,
            "prompts": [prompts[i] for i in rows],
            "metadata": [dict(metadata[i]) for i in rows],
            "images": [encode_image(images[i]) for i in rows],
        }
        reply = self.client.post("/score", body)
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list) or len(scores) != len(rows):
            raise RemoteError(f"{self.client.url} answered {str(reply)[:200]!r}, not a list of {len(rows)} scores")
        return [_number(self.client.url, value) for value in scores], str(reply.get("error") or "")


@register("remote", RewardCard("what the reward of another machine does", 1.0))
def remote(
    name: str,
    url: str,
    reward: str,
    batch_size: int = 16,
    token_env: str | None = None,
    timeout: float = 60.0,
    retries: int = 4,
    concurrency: int = 8,
) -> RemoteReward:
    """The reward ``reward`` of the server at ``url``; see ``HTTPClient.for_url``."""
    client = HTTPClient.for_url(url, token_env, timeout=timeout, retries=retries, concurrency=concurrency)
    return RemoteReward(name, client, reward, batch_size)


def _number(url: str, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)):
            return float(value)
    except OverflowError:
        pass
    raise RemoteError(f"{url} answered {str(value)[:50]!r} where a number belongs")
