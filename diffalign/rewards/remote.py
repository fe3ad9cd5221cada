"""Client of a reward server (``support.reward_server``).

Protocol: ``POST /score`` with ``{"reward", "prompts", "metadata", "images"}`` (PNG in base64) returns
``{"scores": [...]}``, a number or null (no score) per image, and an "error" if an image failed. Status 501 means that
the server cannot score any request for this reward. ``GET /`` lists the rewards of the server.
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
from diffalign.rewards.support.reward_server import RewardServer
from diffalign.rewards.support.sources import portable

__all__ = ["RemoteReward", "RewardServer", "remote"]
UNAVAILABLE = HTTPStatus.NOT_IMPLEMENTED


@dataclass(frozen=True)
class RemoteReward:
    """Score images with a reward of a server; extras are dropped.

    Images of a failed request score NaN, with a warning that names the cause. Images that are not finite are not sent,
    and score NaN. RewardUnavailable is raised if the server answers with status 501.

    Args:
        name: under which scores are stored.
        client: connection to the server.
        reward: name of the reward on the server.
        batch_size: images per request.
        differentiable: False, because gradients are not transferred.
        range: lowest and highest score.
    """

    name: str
    client: HTTPClient
    reward: str
    batch_size: int = 16
    differentiable: bool = False
    range: tuple[float, float] = (-math.inf, math.inf)

    def __post_init__(self) -> None:
        """Check the batch size."""
        if self.batch_size < 1:
            raise ValueError(f"reward {self.name!r}: batch_size is {self.batch_size}; write 1 or more")

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU."""
        finite = images.isfinite().flatten(1).all(1).nonzero()[:, 0].tolist()
        batches = [finite[i : i + self.batch_size] for i in range(0, len(finite), self.batch_size)]
        results = self.client.map(lambda rows: self._request(images, prompts, metadata, rows), batches)

        values = torch.full((len(images),), math.nan)
        problems: dict[str, None] = {}
        for rows, result in zip(batches, results, strict=True):
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

    def _request(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata, rows: Sequence[int]
    ) -> tuple[list[float], str]:
        """Request the scores of these rows; also return the error of the server, if any."""
        body = {
            "reward": self.reward,
            "prompts": [prompts[i] for i in rows],
            "metadata": [portable(metadata[i]) for i in rows],
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
    """Build the client of a reward server; see ``HTTPClient.for_url``."""
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
