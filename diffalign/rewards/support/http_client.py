"""Asking over HTTP: time-outs, bounded retries with backoff, a limit on what is under way, replies that are checked.

Images travel as PNG in base64, answers as JSON; nothing is pickled.
"""

from __future__ import annotations

import base64
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import urllib3
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from urllib3.util import Retry

from diffalign import media
from diffalign.rewards.support.preprocess import to_bytes
from diffalign.tokens import LONGEST_SAID, check_url, printable, redacted, token_for, token_from

T, R = TypeVar("T"), TypeVar("R")
RETRY_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # statuses that may pass
MAX_WAIT = 30.0  # seconds, whatever a server asks for
MAX_RESPONSE_BYTES = 1 << 24  # bytes
MAX_IMAGE_PIXELS = 1 << 24  # pixels, checked before any is decoded
POOL = urllib3.PoolManager(maxsize=64)


class RemoteError(RuntimeError):
    """A server that could not be reached, refused, or answered something else than asked. status: of its answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class HTTPClient:
    """How to talk to one server.

    url: without the path. timeout: seconds to connect, for the first byte, and for the body. retries: how often one
    that may pass (no connection, time-out, a ``RETRY_STATUSES``) is made again. backoff: seconds before that, doubled
    each time, and a random part of that, so that many clients do not return together; a server's Retry-After goes
    first, up to ``MAX_WAIT``. deadline: seconds for all of it. concurrency: requests under way at once. headers:
    e.g. an authorization.

    ValueError: a number that is too small.
    """

    url: str
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 0.5
    concurrency: int = 8
    deadline: float = 600.0
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Checks that need no server."""
        if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0:
            raise ValueError(
                f"{self.url}: concurrency {self.concurrency}, retries {self.retries}, timeout {self.timeout}: "
                "write at least 1, at least 0, and more than 0"
            )

    @classmethod
    def for_url(cls, url: str, token_env: str | None = None, **options: float) -> HTTPClient:
        """To ``url``, with the token of its host (``token_variable``), or of the variable ``token_env``.

        Only the command line and Python can name ``token_env``: a file does not choose which secret goes where.
        """
        host = check_url(url)
        token = token_from(token_env, host) if token_env else token_for(url)
        return cls(url, headers=(("Authorization", f"Bearer {token}"),) if token else (), **options)

    def clean(self, text: str) -> str:
        """``text`` from the server as a message may show it: bounded, no tokens, nothing that a terminal obeys."""
        tokens = [value.removeprefix("Bearer ") for _, value in self.headers]
        return printable(redacted(text[: 8 * LONGEST_SAID], tokens), 2 * LONGEST_SAID)

    def post(self, path: str, body: Any) -> Any:
        """The JSON reply to ``body``. RemoteError: see the class; it names the address and says what to try."""
        address = self.url.rstrip("/") + path
        end = time.monotonic() + self.deadline
        for attempt in range(self.retries + 1):
            asked = 0.0
            try:
                reply, content = self._attempt(address, body, end)
            except urllib3.exceptions.HTTPError as error:
                said = f"{type(error).__name__}: {self.clean(str(error))}"
                problem = RemoteError(
                    f"{address} gave no answer in {attempt + 1} attempts, last {said}; "
                    "check that the server runs, or raise timeout and retries"
                )
            else:
                if reply.status == 200:
                    return self._parse_response(address, content)
                said = self.clean(content[: 8 * LONGEST_SAID].decode(errors="replace"))
                problem = RemoteError(f"{address} answered with status {reply.status}: {said}", reply.status)
                if reply.status not in RETRY_STATUSES:
                    break
                asked = _retry_after(reply)
            wait = min(asked or self.backoff * 2**attempt * (1 + random.random()), MAX_WAIT)
            if attempt == self.retries or time.monotonic() + wait > end:
                break
            time.sleep(wait)
        raise problem

    def _attempt(self, address: str, body: Any, end: float) -> tuple[urllib3.BaseHTTPResponse, bytes]:
        """One attempt, until ``end`` at most; the body may take another ``timeout``.

        urllib3's HTTPError: no answer, or one without end.
        """
        reply = POOL.request(
            "POST",
            address,
            json=body,
            headers=dict(self.headers),
            timeout=max(0.001, min(self.timeout, end - time.monotonic())),
            retries=False,
            redirect=False,  # another host would get the images, and maybe the token
            preload_content=False,
        )
        content, end = bytearray(), min(end, time.monotonic() + self.timeout)
        try:
            while part := reply.read1(1 << 16):
                content += part
                if len(content) > MAX_RESPONSE_BYTES or time.monotonic() > end:
                    raise urllib3.exceptions.ResponseError(f"{len(content)} bytes and no end")
        except BaseException:
            reply.close()  # its connection has bytes left that belong to no other request
            raise
        reply.release_conn()
        return reply, bytes(content)

    def _parse_response(self, address: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            said = self.clean(content[: 8 * LONGEST_SAID].decode(errors="replace"))
        # Without the cause, whose own message holds the reply as it came.
        raise RemoteError(f"{address} answered no JSON: {said.encode()!r}")

    def map(self, ask: Callable[[T], R], items: Sequence[T]) -> list[R | RemoteError]:
        """``ask`` of every item, ``concurrency`` at a time, in their order; a failure takes the place of its result."""

        def one(item: T) -> R | RemoteError:
            try:
                return ask(item)
            except RemoteError as error:
                return error

        if not items:
            return []
        with ThreadPoolExecutor(min(self.concurrency, len(items))) as pool:
            return list(pool.map(one, items))


def _retry_after(reply: urllib3.BaseHTTPResponse) -> float:
    try:
        return Retry().get_retry_after(reply) or 0.0
    except urllib3.exceptions.HTTPError:  # a header of another form
        return 0.0


def encode_image(image: Tensor) -> str:
    """An image (3, H, W), float, [0, 1], as PNG in base64. ValueError: pixels that are not finite."""
    if not image.isfinite().all():
        raise ValueError("an image has pixels that are not finite, which no picture file can hold")
    pixels = to_bytes(image).permute(1, 2, 0).cpu()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def decode_image(text: Any) -> Tensor:
    """Decode an image file in base64 to (3, H, W), float32, [0, 1]. ValueError: no base64, or no such image."""
    return decode_images([text])[0].float() / 255


def decode_images(texts: Sequence[Any], max_pixels: int | None = None) -> list[Tensor]:
    """Decode image files in base64 to (3, H, W), uint8 each, a quarter of the memory of floats.

    max_pixels: of all of them together, counted before anything is decoded.
    ValueError: no base64, no such image, or too many pixels.
    """
    try:
        contents = [base64.b64decode(text, validate=True) for text in texts]
        sizes = [media.size(content, MAX_IMAGE_PIXELS) for content in contents]
        total = sum(width * height for width, height in sizes)
        if total > (max_pixels or total):
            raise ValueError(f"{total:,} pixels are too many for one request: send at most {max_pixels:,}")
        return [pil_to_tensor(media.decode(content, MAX_IMAGE_PIXELS)) for content in contents]
    except (TypeError, *media.BROKEN) as error:
        raise ValueError(
            f"an image must be a PNG, JPEG or WebP picture file in base64: {media.reason(error)}"
        ) from error
