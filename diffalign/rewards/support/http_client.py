"""HTTP client with timeouts, bounded retries, limited concurrency and response validation.

Requests hold images as PNG in base64, responses are JSON; nothing is pickled.
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

T = TypeVar("T")
R = TypeVar("R")
RETRY_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # transient
MAX_WAIT = 30.0  # seconds before a retry, also if Retry-After is longer
MAX_RESPONSE_BYTES = 1 << 24
MAX_IMAGE_PIXELS = 1 << 24  # checked before decoding
POOL = urllib3.PoolManager(maxsize=64)


class RemoteError(RuntimeError):
    """The server could not be reached, refused, or sent an invalid response. status: of the response, else 0."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class HTTPClient:
    """Settings of the connection to one server.

    Args:
        url: without a path.
        timeout: seconds to connect, to the first byte, and for the body.
        retries: after a failed connection, a timeout or a status in ``RETRY_STATUSES``.
        backoff: seconds before the first retry, doubled for each further one, plus random jitter; a Retry-After header
            takes precedence, up to ``MAX_WAIT``.
        concurrency: simultaneous requests of ``map``.
        deadline: seconds for all attempts of a request.
        headers: of every request, such as an authorization.

    Raises:
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
        """Check the numbers."""
        if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0:
            raise ValueError(
                f"{self.url}: concurrency {self.concurrency}, retries {self.retries}, timeout {self.timeout}: "
                "write at least 1, at least 0, and more than 0"
            )

    @classmethod
    def for_url(
        cls,
        url: str,
        token_env: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
    ) -> HTTPClient:
        """Build a client for ``url``, with the token of its host (``token_variable``) or of the variable ``token_env``.

        Only the command line and Python can set ``token_env``: a file must not choose which secret is sent where.
        """
        host = check_url(url)
        token = token_from(token_env, host) if token_env else token_for(url)
        headers = (("Authorization", f"Bearer {token}"),) if token else ()
        return cls(url, timeout=timeout, retries=retries, concurrency=concurrency, headers=headers)

    def clean(self, text: str) -> str:
        """Prepare text of the server for messages: bounded, without tokens and terminal control characters."""
        tokens = [value.removeprefix("Bearer ") for _, value in self.headers]
        return printable(redacted(text[: 8 * LONGEST_SAID], tokens), 2 * LONGEST_SAID)

    def post(self, path: str, body: Any) -> Any:
        """Send ``body`` and return the JSON response, with retries. Raises RemoteError with the address and a hint."""
        address = self.url.rstrip("/") + path
        end = time.monotonic() + self.deadline
        retry = self._retry()

        # urllib3's own retry loop has neither an overall deadline nor a limit on the body.
        while True:
            attempt = len(retry.history) + 1
            response, failure = None, None
            try:
                response, content = self._attempt(address, body, end)
            except urllib3.exceptions.HTTPError as error:
                failure, problem = error, self._no_response(address, attempt, error)
            else:
                if response.status == 200:
                    return self._parse_response(address, content)
                problem = self._bad_status(address, response.status, content)
                if not retry.is_retry("POST", response.status):
                    raise problem

            try:
                retry = retry.increment("POST", address, response=response, error=failure)
            except urllib3.exceptions.MaxRetryError:
                raise problem from None
            wait = self._wait(retry, attempt, response)
            if time.monotonic() + wait > end:
                raise problem
            time.sleep(wait)

    def _retry(self) -> Retry:
        return Retry(
            self.retries,
            backoff_factor=self.backoff,
            backoff_jitter=self.backoff,
            backoff_max=MAX_WAIT,
            status_forcelist=RETRY_STATUSES,
            allowed_methods=None,
        )

    def _wait(self, retry: Retry, attempt: int, response: urllib3.BaseHTTPResponse | None) -> float:
        """Return the seconds before the next attempt: Retry-After, or exponential backoff."""
        # Retry never waits before the first retry, which would send all clients to a busy server at once.
        backoff = self.backoff * (1 + random.random()) if attempt == 1 else retry.get_backoff_time()
        return min((_retry_after(response) if response else 0.0) or backoff, MAX_WAIT)

    def _no_response(self, address: str, attempts: int, error: urllib3.exceptions.HTTPError) -> RemoteError:
        reason = f"{type(error).__name__}: {self.clean(str(error))}"
        return RemoteError(
            f"{address} gave no answer in {attempts} attempts, last {reason}; "
            "check that the server runs, or raise timeout and retries"
        )

    def _bad_status(self, address: str, status: int, content: bytes) -> RemoteError:
        text = self.clean(content[: 8 * LONGEST_SAID].decode(errors="replace"))
        return RemoteError(f"{address} answered with status {status}: {text}", status)

    def _attempt(self, address: str, body: Any, end: float) -> tuple[urllib3.BaseHTTPResponse, bytes]:
        """Send one request, which must respond before ``end``; the body may take another ``timeout``.

        Raises urllib3's HTTPError without a response, or for a body beyond the limits of size and time.
        """
        response = POOL.request(
            "POST",
            address,
            json=body,
            headers=dict(self.headers),
            timeout=max(0.001, min(self.timeout, end - time.monotonic())),
            retries=False,
            redirect=False,  # another host would receive the images, and perhaps the token
            preload_content=False,
        )
        content, end = bytearray(), min(end, time.monotonic() + self.timeout)
        try:
            while part := response.read1(1 << 16):
                content += part
                if len(content) > MAX_RESPONSE_BYTES or time.monotonic() > end:
                    raise urllib3.exceptions.ResponseError(f"{len(content)} bytes and no end")
        except BaseException:
            response.close()  # unread bytes must not reach the connection's next request
            raise
        response.release_conn()
        return response, bytes(content)

    def _parse_response(self, address: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            text = self.clean(content[: 8 * LONGEST_SAID].decode(errors="replace"))
        # Not chained: the message of the cause contains the raw response.
        raise RemoteError(f"{address} answered no JSON: {text.encode()!r}")

    def map(self, query: Callable[[T], R], items: Sequence[T]) -> list[R | RemoteError]:
        """Run ``query`` on items, ``concurrency`` at a time; a failed item has its RemoteError as result."""

        def attempt(item: T) -> R | RemoteError:
            try:
                return query(item)
            except RemoteError as error:
                return error

        if not items:
            return []
        with ThreadPoolExecutor(min(self.concurrency, len(items))) as pool:
            return list(pool.map(attempt, items))


def _retry_after(response: urllib3.BaseHTTPResponse) -> float:
    try:
        return Retry().get_retry_after(response) or 0.0
    except urllib3.exceptions.HTTPError:  # an invalid header
        return 0.0


def encode_image(image: Tensor) -> str:
    """Encode an image (3, H, W), float, [0, 1], as PNG in base64. Raises ValueError for non-finite pixels."""
    return _base64(image, format="PNG")


def data_url(image: Tensor, jpeg: int | None = None) -> str:
    """Encode an image as ``encode_image`` does, as a data URL. jpeg: quality of a JPEG file; None for PNG."""
    if jpeg is None:
        return f"data:image/png;base64,{encode_image(image)}"
    return f"data:image/jpeg;base64,{_base64(image, format='JPEG', quality=jpeg)}"


def _base64(image: Tensor, **options: Any) -> str:
    if not image.isfinite().all():
        raise ValueError("an image has pixels that are not finite, which a file cannot store")
    pixels = to_bytes(image).permute(1, 2, 0).cpu()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, **options)
    return base64.b64encode(file.getvalue()).decode("ascii")


def decode_images(texts: Sequence[Any], max_pixels: int | None = None) -> list[Tensor]:
    """Decode image files in base64 to (3, H, W), uint8, a quarter of the memory of float32.

    max_pixels: limit on the sum over all images, checked before decoding.

    Raises ValueError for invalid base64, an invalid image, or too many pixels.
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
