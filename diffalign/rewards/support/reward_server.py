"""Offer rewards over HTTP: ``diffalign score --serve``. The protocol is that of ``remote``."""

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

from diffalign.rewards.base import Reward, RewardUnavailable, needs_groups
from diffalign.rewards.support.asyncio_http import Handler, HTTPError, HTTPServer, Limits, Request
from diffalign.rewards.support.fault_isolation import Batch, guarded
from diffalign.rewards.support.http_client import decode_images
from diffalign.rewards.support.isolation import said
from diffalign.structures import Prompt
from diffalign.tokens import printable

MAX_IMAGES = 1024  # of a request
MAX_PIXELS = 1 << 26  # of a request, over all of its images: 16 of 2048 x 2048
SMALL = 1 << 18  # bytes of a request that is read faster than handed to another thread
MAX_QUEUED = 512  # requests per reward
# Absolute paths, quoted (with spaces) or bare; of an address such as https://host/path nothing is taken.
PATH = re.compile(
    r"""file:/+[^\s'",;()<>\]]+|(['"])(?:/|~/|[A-Za-z]:[\\/])[^'"\n]*\1"""
    r"""|(?<![\w./])(?<!http:)(?<!https:)(?:~?/|[A-Za-z]:[\\/])[^\s'",;:()<>\]]+"""
)


class RewardServer(HTTPServer):
    """Offers ``rewards`` by name; each is asked by one request at a time, in a thread of its own.

    port 0 takes a free one; ``server.server_port`` says which.

    Args:
        rewards: by the names that clients use.
        host: where to listen; beyond this machine only with a token.
        port: 0 to 65535.
        batch_size: images that are scored at once.
        token: what clients must send, as ``Authorization: Bearer TOKEN``.
        time_limit: seconds that a request may wait for its turn (then it is answered with 503), and take (504).
        limits: what a client may cost.

    Raises:
        ValueError: a reward that ranks images within a group, which a request does not know; a host beyond this machine
            without a token.
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
            raise ValueError(f"{', '.join(ranks)} rank images within a group of one prompt: offer others")
        if not token and not _is_local(host):
            raise ValueError(
                f"host {host} is open to other machines: give a token (--token_env VARIABLE, which holds it), or "
                " listen at 127.0.0.1"
            )
        super().__init__(host, port, self._answer, limits or Limits())
        self.rewards, self.batch_size, self.token, self.time_limit = dict(rewards), batch_size, token, time_limit
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.lanes = {name: Lane(name) for name in rewards}
        # Reading JSON takes long for large requests, and is the same work for all rewards.
        self.readers = concurrent.futures.ThreadPoolExecutor(2, "requests")

    def __enter__(self) -> RewardServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.server_close()

    def server_close(self) -> None:
        """Give the port and the threads back; one that hangs in a reward ends with the process."""
        super().server_close()
        self.readers.shutdown(wait=False, cancel_futures=True)
        for lane in self.lanes.values():
            lane.close()

    async def _answer(self, request: Request) -> Any:
        given, token = request.headers.get("authorization", ""), self.token
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPError(HTTPStatus.UNAUTHORIZED, "this server asks for a token: Authorization: Bearer TOKEN")
        if request.method == "GET":
            return {"rewards": list(self.rewards)}
        if request.method != "POST":
            raise HTTPError(HTTPStatus.NOT_IMPLEMENTED, "GET lists the rewards, POST /score asks one")
        if request.path != "/score":
            raise HTTPError(HTTPStatus.NOT_FOUND, "POST /score")
        try:
            return await self._score(await request.read())
        except RewardUnavailable as error:
            raise HTTPError(HTTPStatus.NOT_IMPLEMENTED, shown(str(error))) from error
        except ValueError as error:
            raise HTTPError(HTTPStatus.BAD_REQUEST, shown(str(error))) from error
        except HTTPError:
            raise
        except Exception as error:
            print(f"reward server: {printable(said(error, 1000), 1000)}", file=sys.stderr)
            raise HTTPError(HTTPStatus.INTERNAL_SERVER_ERROR, shown(said(error))) from error

    async def _score(self, content: bytes) -> dict[str, Any]:
        if len(content) < SMALL:
            asked = ScoreRequest.read(content)
        else:
            asked = await asyncio.get_running_loop().run_in_executor(self.readers, ScoreRequest.read, content)
        del content
        if asked.reward not in self.rewards:
            name = printable(asked.reward, 100)
            raise RewardUnavailable(f"unknown reward {name!r}; offered: {', '.join(self.rewards)}")
        return await self._run_in_lane(self.lanes[asked.reward], lambda: self._score_request(asked))

    async def _run_in_lane(self, lane: Lane, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``work`` returns. HTTPError: 503, its turn did not come or the server stops; 504, it takes too long."""
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

    def _score_request(self, asked: ScoreRequest) -> dict[str, Any]:
        """The answer to a request. RewardUnavailable: no request to this reward will do. ValueError: bad pictures."""
        pictures = asked.pictures()
        scores: list[float | None] = [None] * len(pictures)
        errors = []
        for rows in _batches(pictures, self.batch_size):
            images = torch.stack([pictures[i] for i in rows]).to(self.device).float() / 255
            batch = Batch(images, [asked.prompts[i] for i in rows], torch.zeros(len(rows)))
            table, error = guarded(asked.reward, self.rewards[asked.reward], batch)
            errors += [shown(said(error))] if error else []
            for i, value in zip(rows, table[asked.reward].tolist(), strict=True):
                scores[i] = value if math.isfinite(value) else None
        return {"scores": scores, **({"error": errors[-1]} if errors else {})}


@dataclass
class Job:
    """Work that waits in a lane. started: done when its turn comes. dropped: whether nobody waits for it any more."""

    work: Callable[[], Any]
    started: Future[None]
    result: Future[Any]
    dropped: bool = False


class Lane:
    """The thread that asks one reward, and its queue."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.current: Job | None = None
        self.waiting: queue.Queue[Job | None] = queue.Queue(MAX_QUEUED)
        # No pool: its threads are joined at exit, and one that hangs in a reward would keep the process.
        threading.Thread(target=self._run, name=f"reward {name}", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Job:
        """Queue ``work``. HTTPError 503: too much waits already, or the reward is at work that was given up."""
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
        """End the thread once it is idle."""
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
            except BaseException as raised:  # a reward that calls sys.exit() must not end its lane
                value, error = None, raised
            self.current = None
            if not job.result.set_running_or_notify_cancel():
                continue
            if error is None:
                job.result.set_result(value)
            else:
                wanted = isinstance(error, Exception)
                job.result.set_exception(error if wanted else RuntimeError(said(error)))


@dataclass(frozen=True)
class ScoreRequest:
    """A request that is well formed: the reward's name, prompts, and pictures in base64."""

    reward: str
    prompts: Sequence[Prompt]
    images: Sequence[Any]

    @classmethod
    def read(cls, content: bytes) -> ScoreRequest:
        """From the body of a request. ValueError: anything of another type or length."""
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
        for wanted, items in (("prompts", prompts), ("metadata", metadata)):
            if wrong := [item for item in items if not isinstance(item, str if wanted == "prompts" else dict)]:
                raise ValueError(f'"{wanted}" holds {_short(wrong[0])}: write texts as prompts, objects as metadata')
        return cls(name, [Prompt(text, data) for text, data in zip(prompts, metadata, strict=True)], images)

    def pictures(self) -> list[Tensor]:
        """Decode to (3, H, W), uint8 each. ValueError: no such pictures, or too many pixels."""
        return decode_images(self.images, MAX_PIXELS)


def shown(text: str) -> str:
    """Return a message as a client may see it: on one line, bounded, without absolute paths of this machine."""
    text = PATH.sub("...", text)
    for place in (str(Path.home()), str(Path.cwd()), sys.prefix):  # what stands in the middle of something else
        text = text.replace(place, "...") if len(place) > 1 else text
    return printable(text)


def _short(value: Any) -> str:
    return printable(repr(value)[:200], 80)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _batches(pictures: Sequence[Tensor], size: int) -> list[list[int]]:
    """Positions of pictures, up to ``size`` of one resolution at once."""
    groups: dict[torch.Size, list[int]] = {}
    for i, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(i)
    return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]


_Handler = Handler  # its timeout is what tests shorten
