"""HTTP/1.1 server on asyncio with limits on connections, bytes and time, and graceful shutdown.

It reads requests with a Content-Length and passes each to one answer function. A silent client holds a socket for some
seconds, but no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

BACKLOG = 1024  # connections that the kernel queues
MAX_HEADER = 1 << 16  # bytes
IDLE = 30.0  # seconds until an idle connection is closed
MIN_RATE = 1 << 20  # bytes per second at which a body must arrive
LINGER = 1 << 20  # bytes read and dropped so that a client that is still sending receives its response


class HTTPError(Exception):
    """An error response: its status, and a message for the client."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """Head of a request; ``read`` awaits the body."""

    method: str
    path: str
    headers: Mapping[str, str]
    read: Callable[[], Awaitable[bytes]]


Answer = Callable[[Request], Awaitable[Any]]  # returns a JSON value; raises HTTPError for a status other than 200


@dataclass
class Limits:
    """Resource limits of a server.

    Attributes:
        request: bytes of a body.
        waiting: bytes of all bodies held at once.
        connections: concurrent clients; others receive 503.
        stop: seconds that running requests have to finish when the server stops.
    """

    request: int = 64 << 20
    waiting: int = 512 << 20
    connections: int = 1024
    stop: float = 30.0


class Budget:
    """A number of bytes shared by concurrent requests; a request waits until enough are free."""

    def __init__(self, total: int) -> None:
        self.left, self.changed = total, asyncio.Condition()

    @contextlib.asynccontextmanager
    async def reserve(self, size: int) -> Any:
        """Reserve ``size`` bytes inside the context."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.left >= size)
            self.left -= size
        try:
            yield
        finally:
            self.left += size
            async with self.changed:
                self.changed.notify_all()


class Handler:
    """A connection: read requests and write responses until either side closes it."""

    timeout = 60.0  # seconds for a body in addition to its length / MIN_RATE; a header has at most ten

    def __init__(self, server: HTTPServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server, self.reader, self.writer = server, reader, writer
        self.unread = 0

    async def run(self) -> None:
        """Answer requests until the client or the server closes the connection."""
        wait = min(10.0, self.timeout)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            while await self._serve_request(wait):
                wait = IDLE
        with contextlib.suppress(OSError, TimeoutError):
            await self._linger()
        self.writer.close()

    async def _serve_request(self, wait: float) -> bool:
        """Answer one request. Returns whether the connection stays open."""
        keep, self.unread = False, 0
        try:
            request, keep = await self._head(wait)
            async with self.server.budget.reserve(self.unread):
                body = await self.server.answer(request)
            status = HTTPStatus.OK
        except HTTPError as error:
            status, body = error.status, {"error": str(error)}
        keep = keep and not self.unread and not self.server.stopping.is_set()
        await self._write(status, body, keep)
        return keep

    async def _head(self, wait: float) -> tuple[Request, bool]:
        """Read the head of the next request, and whether the client keeps the connection open."""
        try:
            head = await asyncio.wait_for(self._until_stop(self.reader.readuntil(b"\r\n\r\n")), wait)
        except asyncio.LimitOverrunError as error:
            raise HTTPError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the header is too long") from error
        self.unread = LINGER  # the length of the body is unknown until the head is parsed

        line, *rest = head.decode("latin-1").split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "the first line must be METHOD PATH HTTP/1.1")
        fields = (line.partition(":") for line in rest if line)
        pairs = [(name.strip().lower(), value.strip()) for name, _, value in fields]
        headers = dict(pairs)

        length = self._length(headers, [value for name, value in pairs if name == "content-length"])
        self.unread = length or 0
        keep = words[2] != "HTTP/1.0" and headers.get("connection", "").lower() != "close"
        return Request(words[0], words[1], headers, lambda: self._body(headers, length)), keep

    async def _until_stop(self, reading: Awaitable[bytes]) -> bytes:
        """Await ``reading``, but raise TimeoutError once the server stops."""
        read = asyncio.ensure_future(reading)
        stop = asyncio.ensure_future(self.server.stopping.wait())
        try:
            await asyncio.wait((read, stop), return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                raise TimeoutError
            return read.result()
        finally:
            stop.cancel()
            read.cancel()

    def _length(self, headers: Mapping[str, str], given: list[str]) -> int | None:
        if "transfer-encoding" in headers or len(set(given)) > 1:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "send the length of the body once, as Content-Length")
        if not given:
            return None
        most, text = self.server.limits.request, given[0]
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= most):
            shown = text[:20]
            raise HTTPError(
                HTTPStatus.BAD_REQUEST, f"Content-Length {shown!r} is not valid: send a number of bytes, at most {most}"
            )
        return int(text)

    async def _body(self, headers: Mapping[str, str], length: int | None) -> bytes:
        if length is None:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "send the length of the body, as Content-Length")
        if headers.get("expect", "").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            found = await asyncio.wait_for(self.reader.readexactly(length), self.timeout + length / MIN_RATE)
        except TimeoutError as error:
            raise HTTPError(HTTPStatus.REQUEST_TIMEOUT, "the rest of the request did not arrive in time") from error
        except asyncio.IncompleteReadError as error:
            raise HTTPError(HTTPStatus.BAD_REQUEST, f"received {len(error.partial)} of {length} bytes") from error
        self.unread = 0
        return found

    async def _write(self, status: HTTPStatus, body: Any, keep: bool) -> None:
        content = json.dumps(body).encode()
        retry = ["Retry-After: 1"] if status == HTTPStatus.SERVICE_UNAVAILABLE else []
        head = [f"HTTP/1.1 {status.value} {status.phrase}", "Content-Type: application/json", *retry]
        head += [f"Content-Length: {len(content)}", f"Connection: {'keep-alive' if keep else 'close'}", "", ""]
        self.writer.write("\r\n".join(head).encode("latin-1") + content)
        await asyncio.wait_for(self.writer.drain(), self.timeout)

    async def _linger(self) -> None:
        """Drain unread input for a moment: closing at once would reset the connection before the response is read."""
        if self.unread and self.writer.can_write_eof():
            self.writer.write_eof()
            left = min(self.unread, LINGER)
            while left > 0 and (part := await asyncio.wait_for(self.reader.read(1 << 16), 1.0)):
                left -= len(part)


@dataclass
class HTTPServer:
    """Listen at ``host``:``server_port`` on construction; ``serve_forever`` answers requests.

    Args:
        host: address to bind.
        port: 0 picks a free one.
        answer: computes the response to a request.
        limits: resource limits.
        handler: class that serves a connection.

    Raises:
        OSError: the address is in use or not of this machine.
    """

    host: str
    port: int
    answer: Answer
    limits: Limits = field(default_factory=Limits)
    handler: type[Handler] = Handler

    def __post_init__(self) -> None:
        """Bind the socket."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self.socket = socket.create_server((self.host, self.port), family=family, backlog=BACKLOG)
        self.server_port = int(self.socket.getsockname()[1])
        self.connections: set[asyncio.Task[None]] = set()
        self._stop_asked, self._done = False, threading.Event()
        self._done.set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Answer requests until ``shutdown`` or, in the main thread, SIGINT or SIGTERM."""
        self._done.clear()
        try:
            asyncio.run(self._serve())
        finally:
            self._done.set()

    def shutdown(self) -> None:
        """Stop accepting, let running requests finish, answer the others with 503, and wait until that is done."""
        self._stop_asked = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed in the meantime
                self._loop.call_soon_threadsafe(self.stopping.set)
        self._done.wait()

    def server_close(self) -> None:
        """Release the port."""
        self.socket.close()

    async def _serve(self) -> None:
        self.stopping, self.budget = asyncio.Event(), Budget(self.limits.waiting)
        self._loop = asyncio.get_running_loop()
        if self._stop_asked:
            return
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(NotImplementedError):  # Windows
                    self._loop.add_signal_handler(number, self._on_signal)
        server = await asyncio.start_server(self._on_connect, sock=self.socket, limit=MAX_HEADER, backlog=BACKLOG)
        await self.stopping.wait()
        server.close()
        if self.connections:
            await asyncio.wait(set(self.connections), timeout=self.limits.stop)
        for task in self.connections:
            task.cancel()

    def _on_signal(self) -> None:
        """Stop; at the second signal without waiting for running requests."""
        for task in self.connections if self.stopping.is_set() else ():
            task.cancel()
        self.stopping.set()

    async def _on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler, task = self.handler(self, reader, writer), asyncio.current_task()
        assert task is not None
        if len(self.connections) >= self.limits.connections or self.stopping.is_set():
            with contextlib.suppress(OSError, TimeoutError):
                await handler._write(
                    HTTPStatus.SERVICE_UNAVAILABLE, {"error": "too many clients: try again later"}, False
                )
            writer.close()
            return
        self.connections.add(task)
        try:
            await handler.run()
        finally:
            self.connections.discard(task)
            writer.close()
