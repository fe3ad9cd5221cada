"""A reward on another machine: its client, and the server that offers any reward over HTTP.

The protocol is one request, ``POST /score``: ``{"reward", "prompts", "metadata", "images"}`` (PNG in base64), answered
by ``{"scores": [...]}``, a number or null (no score) per image, with an "error" where one failed. Status 501 says that
no request for this reward can be answered here. ``GET /`` lists the rewards that are offered.
"""

from __future__ import annotations

import hmac
import json
import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Facts, Metadata, Reward, RewardUnavailable, needs_groups, register
from diffalign.rewards.guard import Batch, guarded
from diffalign.rewards.wire import RemoteError, Wire, decode_image, encode_image
from diffalign.structures import Prompt

LARGEST_REQUEST = 1 << 30  # bytes
UNAVAILABLE = HTTPStatus.NOT_IMPLEMENTED


@dataclass(frozen=True)
class RemoteReward:
    """The reward ``reward`` of the server at ``wire.url``: its scores, without extras.

    batch_size: images per request. Images whose request fails have no score (NaN), and a warning says why; so have
    those that are not finite, which are not sent. RewardUnavailable: the server says that it can score nothing.
    """

    name: str
    wire: Wire
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
        found = self.wire.map(lambda rows: self._ask(images, prompts, metadata, rows), parts)
        values = torch.full((len(images),), math.nan)
        problems: dict[str, None] = {}
        for rows, result in zip(parts, found, strict=True):
            scores, problem = (None, str(result)) if isinstance(result, RemoteError) else result
            problem = self.wire.clean(problem)
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
        reply = self.wire.post("/score", body)
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list) or len(scores) != len(rows):
            raise RemoteError(f"{self.wire.url} answered {str(reply)[:200]!r}, not a list of {len(rows)} scores")
        return [_number(self.wire.url, value) for value in scores], str(reply.get("error") or "")


@register("remote", Facts("what the reward of another machine does", 1.0))
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
    """The reward ``reward`` of the server at ``url``; see ``Wire.to``."""
    wire = Wire.to(url, token_env, timeout=timeout, retries=retries, concurrency=concurrency)
    return RemoteReward(name, wire, reward, batch_size)


def _number(url: str, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)):
            return float(value)
    except OverflowError:
        pass
    raise RemoteError(f"{url} answered {str(value)[:50]!r} where a number belongs")


class RewardServer(ThreadingHTTPServer):
    """Offers ``rewards`` by name. One request is scored at a time: a model on one device serves one batch at a time.

    port 0 takes a free one; ``server.server_port`` says which. Listens on this machine alone unless ``host`` says more.
    batch_size: images that are scored at once. token: what clients must send, as ``Authorization: Bearer TOKEN``.

    ValueError: a reward that ranks images within a group, which a request does not know.
    """

    daemon_threads = True

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        host: str = "127.0.0.1",
        port: int = 8000,
        batch_size: int = 16,
        token: str | None = None,
    ) -> None:
        if ranks := [name for name, reward in rewards.items() if needs_groups(reward)]:
            raise ValueError(f"{', '.join(ranks)} rank images within a group of one prompt: offer others")
        super().__init__((host, port), _Handler)
        self.rewards = dict(rewards)
        self.batch_size = batch_size
        self.token = token
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.turn = threading.Lock()

    def score(self, body: Any) -> dict[str, Any]:
        """The answer to one request. ValueError: what is wrong with it. RewardUnavailable: no request will do."""
        name, prompts, pictures = _request(body)
        if name not in self.rewards:
            raise RewardUnavailable(f"unknown reward {name!r}; offered: {', '.join(self.rewards)}")
        scores: list[float | None] = [None] * len(pictures)
        errors = []
        with self.turn:
            for rows in _batches(pictures, self.batch_size):
                images = torch.stack([pictures[i] for i in rows]).to(self.device)
                batch = Batch(images, [prompts[i] for i in rows], torch.zeros(len(rows)))
                table, error = guarded(name, self.rewards[name], batch)
                errors += [f"{type(error).__name__}: {error}"] if error else []
                for i, value in zip(rows, table[name].tolist(), strict=True):
                    scores[i] = value if math.isfinite(value) else None
        return {"scores": scores, **({"error": errors[-1]} if errors else {})}


def _request(body: Any) -> tuple[str, list[Prompt], list[Tensor]]:
    """The reward's name, prompts and pictures. ValueError: anything of another type or length."""
    if not isinstance(body, dict):
        raise ValueError('the request must be a JSON object with "reward", "prompts", "metadata" and "images"')
    name, prompts, images = body.get("reward"), body.get("prompts"), body.get("images")
    if not isinstance(name, str):
        raise ValueError(f'"reward" must be a name, got {name!r}')
    if not isinstance(prompts, list) or not isinstance(images, list) or len(prompts) != len(images):
        raise ValueError('"prompts" and "images" must be lists of the same length')
    metadata = body.get("metadata") or [{}] * len(prompts)
    if not isinstance(metadata, list) or len(metadata) != len(prompts):
        raise ValueError(f'"metadata" must be a list of {len(prompts)} objects, one for each prompt')
    for wanted, items in (("prompts", prompts), ("metadata", metadata)):
        if wrong := [item for item in items if not isinstance(item, str if wanted == "prompts" else dict)]:
            raise ValueError(f'"{wanted}" holds {wrong[0]!r}: write texts as prompts, objects as metadata')
    texts = [Prompt(text, data) for text, data in zip(prompts, metadata, strict=True)]
    return name, texts, [decode_image(image) for image in images]


def _batches(pictures: Sequence[Tensor], size: int) -> list[list[int]]:
    """Positions of pictures, up to ``size`` of one resolution at once."""
    groups: dict[torch.Size, list[int]] = {}
    for i, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(i)
    return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]


class _Handler(BaseHTTPRequestHandler):
    """Requests in, JSON out; the server's own failures are answers too, never a dropped connection."""

    server: RewardServer
    timeout = 60  # seconds between bytes: a client that falls silent does not keep its thread

    def do_GET(self) -> None:
        """What is offered."""
        if self._allowed():
            self._answer(HTTPStatus.OK, {"rewards": list(self.server.rewards)})

    def do_POST(self) -> None:
        """Scores."""
        if not self._allowed():
            return None
        if self.path != "/score":
            return self._answer(HTTPStatus.NOT_FOUND, {"error": f"no {self.path!r} here: POST /score"})
        try:
            answer = self.server.score(json.loads(self._body()))
        except RewardUnavailable as error:
            return self._answer(UNAVAILABLE, {"error": str(error)})
        except TimeoutError:
            return self._answer(HTTPStatus.REQUEST_TIMEOUT, {"error": "the rest of the request did not come"})
        except ValueError as error:  # bad JSON is one
            return self._answer(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            return self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": problem})
        return self._answer(HTTPStatus.OK, answer)

    def _allowed(self) -> bool:
        given, token = self.headers.get("Authorization", ""), self.server.token
        if token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return True
        self._answer(HTTPStatus.UNAUTHORIZED, {"error": "this server asks for a token: Authorization: Bearer TOKEN"})
        return False

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length") or ""
        if not length.isdecimal() or int(length) > LARGEST_REQUEST:
            raise ValueError(f"Content-Length {length!r}: say how many bytes follow, at most {LARGEST_REQUEST}")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ValueError(f"{len(body)} bytes came of {length}")
        return body

    def _answer(self, status: HTTPStatus, body: Mapping[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: a line per request would bury the warnings of the rewards."""
