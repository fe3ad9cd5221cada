"""Serve rewards over HTTP: ``diffalign score --serve``. See ``rewards.remote`` for the protocol."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hmac
import ipaddress
import json
import math
import queue
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.device import default_device
from diffalign.rewards.base import Reward, RewardUnavailable, needs_groups
from diffalign.rewards.support.asyncio_http import HTTPError, HTTPServer, Limits, Request
from diffalign.rewards.support.fault_isolation import Batch, guarded
from diffalign.rewards.support.http_client import decode_images
from diffalign.rewards.support.isolation import said
from diffalign.rewards.support.sources import without_paths
from diffalign.structures import Prompt
from diffalign.tokens import printable

MAX_IMAGES = 1024  # per request
MAX_PIXELS = 1 << 26  # per request, over all images: 16 of 2048 x 2048
SMALL = 1 << 18  # bytes below which parsing in the event loop is faster than in another thread
MAX_QUEUED = 512  # requests per reward
# Absolute paths, quoted (with spaces) or bare, but no part of an address such as https://host/path.
PATH = re.compile(
    r"""file:/+[^\s'",;()<>\]]+|(['"])(?:/|~/|[A-Za-z]:[\\/])[^'"\n]*\1"""
    r"""|(?<![\w./])(?<!http:)(?<!https:)(?:~?/|[A-Za-z]:[\\/])[^\s'",;:()<>\]]+"""
)


class RewardServer(HTTPServer):
    """Serve ``rewards`` by name. Each reward has one thread, which handles one request at a time.

    Port 0 picks a free one, available as ``server.server_port``.

    Args:
        rewards: by the names that clients use.
        host: address to listen at; other than loopback only with a token.
        port: 0 to 65535.
        batch_size: images that are scored at once.
        token: required from clients, as ``Authorization: Bearer TOKEN``.
        time_limit: seconds that a request may be queued (503 afterwards), and may run (504 afterwards).
        limits: resource limits.

    Raises:
        ValueError: a group reward, because requests have no groups; a host other than loopback without a token.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        host: str = "127.0.0.1",
        port: int = 8000,
        batch_size: int = 16,
        token: str | None = None,
        time_limit: float = 300.0,
        limits: Limits | None = None,
    ) -> None:
        if ranks := [name for name, reward in rewards.items() if needs_groups(reward)]:
            raise ValueError(f"{', '.join(ranks)} rank images within a group of one prompt: serve pointwise rewards")
        if not token and not _is_local(host):
            raise ValueError(
                f"host {host} is open to other machines: give a token (--token_env VARIABLE, which holds it), or "
                "listen at 127.0.0.1"
            )
        super().__init__(host, port, self._answer, limits or Limits())
        self.rewards, self.batch_size, self.token, self.time_limit = dict(rewards), batch_size, token, time_limit
        self.device = default_device()
        self.lanes = {name: Lane(name) for name in rewards}
        # Parsing large JSON requests takes long and needs no reward.
        self.readers = concurrent.futures.ThreadPoolExecutor(2, "requests")

    def __enter__(self) -> RewardServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.server_close()

    def server_close(self) -> None:
        """Release the port and the threads; a thread that hangs in a reward ends with the process."""
        super().server_close()
        self.readers.shutdown(wait=False, cancel_futures=True)
        for lane in self.lanes.values():
            lane.close()

    async def _answer(self, request: Request) -> Any:
        sent, token = request.headers.get("authorization", ""), self.token
        if token and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
            raise HTTPError(HTTPStatus.UNAUTHORIZED, "this server asks for a token: Authorization: Bearer TOKEN")
        if request.method == "GET":
            return {"rewards": list(self.rewards)}
        if request.method != "POST":
            raise HTTPError(HTTPStatus.NOT_IMPLEMENTED, "use GET to list the rewards, POST /score to score images")
        if request.path != "/score":
            raise HTTPError(HTTPStatus.NOT_FOUND, "POST /score")
        try:
            return await self._score(await request.read())
        except RewardUnavailable as error:
            raise HTTPError(HTTPStatus.NOT_IMPLEMENTED, public_message(str(error))) from error
        except ValueError as error:
            raise HTTPError(HTTPStatus.BAD_REQUEST, public_message(str(error))) from error
        except HTTPError:
            raise
        except Exception as error:
            print(f"reward server: {printable(said(error, 1000), 1000)}", file=sys.stderr)
            raise HTTPError(HTTPStatus.INTERNAL_SERVER_ERROR, public_message(said(error))) from error

    async def _score(self, content: bytes) -> dict[str, Any]:
        if len(content) < SMALL:
            request = ScoreRequest.parse(content)
        else:
            request = await asyncio.get_running_loop().run_in_executor(self.readers, ScoreRequest.parse, content)
        del content
        if request.reward not in self.rewards:
            name = printable(request.reward, 100)
            raise RewardUnavailable(f"unknown reward {name!r}; offered: {', '.join(self.rewards)}")
        return await self._run_in_lane(self.lanes[request.reward], lambda: self._score_request(request))

    async def _run_in_lane(self, lane: Lane, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run ``work`` in a lane. HTTPError: 503 if it is not started in time or the server stops, 504 on timeout."""
        job = lane.submit(work)
        stop = asyncio.ensure_future(self.stopping.wait())
        started, result = asyncio.wrap_future(job.started), asyncio.wrap_future(job.result)

        try:
            await asyncio.wait((started, stop), timeout=self.time_limit, return_when=asyncio.FIRST_COMPLETED)
            if started.done():
                await asyncio.wait((result, stop), timeout=self.time_limit, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait((result,), timeout=0.9 * self.limits.stop if stop.done() else 0)
            if result.done():
                return result.result()
            if started.done() and not stop.done():
                what = f"{lane.name} took more than {self.time_limit:g} seconds: ask for fewer images at once"
                raise HTTPError(HTTPStatus.GATEWAY_TIMEOUT, what)
            why = "the server stops" if stop.done() else f"{lane.name} is busy"
            raise HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, f"{why}: try again")
        finally:
            job.dropped = True
            for waiting in (stop, started, result):
                waiting.cancel()

    def _score_request(self, request: ScoreRequest) -> dict[str, Any]:
        """Score a request. RewardUnavailable: the reward cannot score any request. ValueError: invalid images."""
        decoded = request.decode()
        scores: list[float | None] = [None] * len(decoded)
        errors = []

        for rows in _batches(decoded, self.batch_size):
            images = torch.stack([decoded[i] for i in rows]).to(self.device).float() / 255
            batch = Batch(images, [request.prompts[i] for i in rows], torch.zeros(len(rows)))
            table, error = guarded(request.reward, self.rewards[request.reward], batch)
            errors += [public_message(said(error))] if error else []
            for i, value in zip(rows, table[request.reward].tolist(), strict=True):
                scores[i] = value if math.isfinite(value) else None

        return {"scores": scores, **({"error": errors[-1]} if errors else {})}


@dataclass
class Job:
    """Queued work of a lane. ``started`` is done once it runs; ``dropped``: no client waits for it any more."""

    work: Callable[[], Any]
    started: Future[None]
    result: Future[Any]
    dropped: bool = False


class Lane:
    """Thread and queue of one reward."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.current: Job | None = None
        self.waiting: queue.Queue[Job | None] = queue.Queue(MAX_QUEUED)
        # A daemon thread, because a pool's threads are joined at exit, even those that hang in a reward.
        threading.Thread(target=self._run, name=f"reward {name}", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Job:
        """Queue ``work``. HTTPError 503: the queue is full, or the reward still runs a request that timed out."""
        current, job = self.current, Job(work, Future(), Future())
        if current is not None and current.dropped:
            why = f"{self.name} still works on a request that took too long"
            raise HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, f"{why}: try again")
        try:
            self.waiting.put_nowait(job)
        except queue.Full as error:
            raise HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.name} is busy: try again") from error
        return job

    def close(self) -> None:
        """Discard queued work, and end the thread once it is idle."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.waiting.get_nowait()
        self.waiting.put_nowait(None)

    def _run(self) -> None:
        while (job := self.waiting.get()) is not None:
            if job.dropped or not job.started.set_running_or_notify_cancel():
                continue
            self.current = job
            job.started.set_result(None)
            try:
                value, error = job.work(), None
            except BaseException as raised:  # sys.exit() in a reward must not end the lane
                value, error = None, raised
            self.current = None
            if not job.result.set_running_or_notify_cancel():
                continue
            if error is None:
                job.result.set_result(value)
            else:
                job.result.set_exception(error if isinstance(error, Exception) else RuntimeError(said(error)))


@dataclass(frozen=True)
class ScoreRequest:
    """A valid request: the reward's name, prompts, and images in base64."""

    reward: str
    prompts: Sequence[Prompt]
    images: Sequence[Any]

    @classmethod
    def parse(cls, content: bytes) -> ScoreRequest:
        """Parse the body of a request. Raises ValueError for wrong types or lengths."""
        try:
            body = json.loads(content)
        except RecursionError as error:
            raise ValueError("the request is nested too deeply") from error
        if not isinstance(body, dict):
            raise ValueError('the request must be a JSON object with "reward", "prompts", "metadata" and "images"')

        name, prompts, images = body.get("reward"), body.get("prompts"), body.get("images")
        if not isinstance(name, str):
            raise ValueError(f'"reward" must be a name, got {_short(name)}')
        if not isinstance(prompts, list) or not isinstance(images, list) or len(prompts) != len(images):
            raise ValueError('"prompts" and "images" must be lists of the same length')
        if len(images) > MAX_IMAGES:
            raise ValueError(f"{len(images)} images are too many for one request: send at most {MAX_IMAGES}")
        metadata = body.get("metadata") or [{}] * len(prompts)
        if not isinstance(metadata, list) or len(metadata) != len(prompts):
            raise ValueError(f'"metadata" must be a list of {len(prompts)} objects, one for each prompt')
        for key, items in (("prompts", prompts), ("metadata", metadata)):
            if wrong := [item for item in items if not isinstance(item, str if key == "prompts" else dict)]:
                raise ValueError(f'"{key}" holds {_short(wrong[0])}: write texts as prompts, objects as metadata')

        pairs = zip(prompts, map(without_paths, metadata), strict=True)
        return cls(name, [Prompt(text, data) for text, data in pairs], images)

    def decode(self) -> list[Tensor]:
        """Decode the images to (3, H, W), uint8. Raises ValueError for invalid images or too many pixels."""
        return decode_images(self.images, MAX_PIXELS)


def public_message(text: str) -> str:
    """Prepare a message for clients: on one line, bounded, without absolute paths of this machine."""
    text = PATH.sub("...", text)
    for folder in (str(Path.home()), str(Path.cwd()), sys.prefix):  # also inside other words
        text = text.replace(folder, "...") if len(folder) > 1 else text
    return printable(text)


def _short(value: Any) -> str:
    return printable(repr(value)[:200], 80)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _batches(images: Sequence[Tensor], size: int) -> list[list[int]]:
    """Group indices of images into batches of one resolution, up to ``size`` each."""
    groups: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]
