"""A small HTTP/1.1 server on asyncio: bounded in connections, bytes and seconds, and it stops gracefully.

It reads requests with a Content-Length, and hands each to one function that answers. A client that falls silent costs a
socket for some seconds, and no thread.
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

BACKLOG = 1024  # connections that the kernel holds until they are accepted
MAX_HEADER = 1 << 16  # bytes
IDLE = 30.0  # seconds that a connection is kept for a next request
SLOWEST = 1 << 20  # bytes per second of a body that is waited for
LINGER = 1 << 20  # bytes that are read and dropped, so that a client which still sends gets to read its answer


class HTTPError(Exception):
    """A request that is not answered with a result. status: of the answer; the message goes to the client."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """The head of a request; ``read`` waits for its body."""

    method: str
    path: str
    headers: Mapping[str, str]
    read: Callable[[], Awaitable[bytes]]


Answer = Callable[[Request], Awaitable[Any]]  # a JSON value; HTTPError for another status than 200


@dataclass
class Limits:
    """What a client may cost.

    Args:
        request: bytes of a body.
        waiting: bytes of all bodies that are held at once.
        connections: clients at once; further ones are answered with 503.
        stop: seconds that requests under way have to finish when the server stops.
    """

    request: int = 64 << 20
    waiting: int = 512 << 20
    connections: int = 1024
    stop: float = 30.0


class Budget:
    """A number of bytes that concurrent requests share; who finds too few left waits."""

    def __init__(self, total: int) -> None:
        self.left, self.changed = total, asyncio.Condition()

    @contextlib.asynccontextmanager
    async def taken(self, size: int) -> Any:
        """Hold ``size`` bytes inside the context."""
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
    """One connection: reads requests and writes answers until either side is done."""

    timeout = 60.0  # seconds for a body beyond what its length takes at ``SLOWEST``; a header has at most ten

    def __init__(self, server: HTTPServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server, self.reader, self.writer = server, reader, writer
        self.unread = 0

    async def run(self) -> None:
        """Answer requests until the client or the server ends the connection."""
        wait = min(10.0, self.timeout)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            while await self._one(wait):
                wait = IDLE
        with contextlib.suppress(OSError, TimeoutError):
            await self._linger()
        self.writer.close()

    async def _one(self, wait: float) -> bool:
        """One request; whether another may follow on this connection."""
        keep, self.unread = False, 0
        try:
            request, keep = await self._head(wait)
            async with self.server.budget.taken(self.unread):
                body = await self.server.answer(request)
            status = HTTPStatus.OK
        except HTTPError as error:
            status, body = error.status, {"error": str(error)}
        keep = keep and not self.unread and not self.server.stopping.is_set()
        await self._write(status, body, keep)
        return keep

    async def _head(self, wait: float) -> tuple[Request, bool]:
        """The head of the next request, and whether the client keeps the connection. TimeoutError: none comes."""
        try:
            head = await asyncio.wait_for(self._until_stop(self.reader.readuntil(b"\r\n\r\n")), wait)
        except asyncio.LimitOverrunError as error:
            raise HTTPError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the header is too long") from error
        self.unread = LINGER  # nobody knows how much follows, until the head says it
        line, *rest = head.decode("latin-1").split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise HTTPError(HTTPStatus.BAD_REQUEST, "the first line must be METHOD PATH HTTP/1.1")
        parted = (line.partition(":") for line in rest if line)
        pairs = [(name.strip().lower(), value.strip()) for name, _, value in parted]
        headers = dict(pairs)
        length = self._length(headers, [value for name, value in pairs if name == "content-length"])
        self.unread = length or 0
        keep = words[2] != "HTTP/1.0" and headers.get("connection", "").lower() != "close"
        return Request(words[0], words[1], headers, lambda: self._body(headers, length)), keep

    async def _until_stop(self, reading: Awaitable[bytes]) -> bytes:
        """``reading``, given up where the server stops meanwhile: nothing of the request has been answered for."""
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
            raise HTTPError(HTTPStatus.BAD_REQUEST, "say the length of the body once, as Content-Length")
        if not given:
            return None
        most, text = self.server.limits.request, given[0]
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= most):
            shown = text[:20]
            raise HTTPError(
                HTTPStatus.BAD_REQUEST, f"Content-Length {shown!r}: say how many bytes follow, at most {most}"
            )
        return int(text)

    async def _body(self, headers: Mapping[str, str], length: int | None) -> bytes:
        if length is None:
            raise HTTPError(HTTPStatus.BAD_REQUEST, "say the length of the body, as Content-Length")
        if headers.get("expect", "").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            found = await asyncio.wait_for(self.reader.readexactly(length), self.timeout + length / SLOWEST)
        except TimeoutError as error:
            raise HTTPError(HTTPStatus.REQUEST_TIMEOUT, "the rest of the request did not come") from error
        except asyncio.IncompleteReadError as error:
            raise HTTPError(HTTPStatus.BAD_REQUEST, f"{len(error.partial)} bytes came of {length}") from error
        self.unread = 0
        return found

    async def _write(self, status: HTTPStatus, body: Any, keep: bool) -> None:
        content = json.dumps(body).encode()
        later = ["Retry-After: 1"] if status == HTTPStatus.SERVICE_UNAVAILABLE else []
        head = [f"HTTP/1.1 {status.value} {status.phrase}", "Content-Type: application/json", *later]
        head += [f"Content-Length: {len(content)}", f"Connection: {'keep-alive' if keep else 'close'}", "", ""]
        self.writer.write("\r\n".join(head).encode("latin-1") + content)
        await asyncio.wait_for(self.writer.drain(), self.timeout)

    async def _linger(self) -> None:
        """Read what the client still sends, for a moment: closing at once would take the answer from it."""
        if self.unread and self.writer.can_write_eof():
            self.writer.write_eof()
            left = min(self.unread, LINGER)
            while left > 0 and (part := await asyncio.wait_for(self.reader.read(1 << 16), 1.0)):
                left -= len(part)


@dataclass
class HTTPServer:
    """Listens at ``host``:``server_port`` (of ``port`` 0 a free one) from the start; ``serve_forever`` answers.

    answer: what makes the reply to a request. handler: what reads them.
    """

    host: str
    port: int
    answer: Answer
    limits: Limits = field(default_factory=Limits)
    handler: type[Handler] = Handler

    def __post_init__(self) -> None:
        """OSError: the place is taken, or not of this machine."""
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
        """Stop accepting, let requests under way finish, answer the rest with 503, and wait until that is done."""
        self._stop_asked = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                self._loop.call_soon_threadsafe(self.stopping.set)
        self._done.wait()

    def server_close(self) -> None:
        """Give the port back."""
        self.socket.close()

    async def _serve(self) -> None:
        self.stopping, self.budget = asyncio.Event(), Budget(self.limits.waiting)
        self._loop = asyncio.get_running_loop()
        if self._stop_asked:
            return
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(NotImplementedError):  # Windows
                    self._loop.add_signal_handler(number, self._signalled)
        server = await asyncio.start_server(self._connected, sock=self.socket, limit=MAX_HEADER, backlog=BACKLOG)
        await self.stopping.wait()
        server.close()
        if self.connections:
            await asyncio.wait(set(self.connections), timeout=self.limits.stop)
        for task in self.connections:
            task.cancel()

    def _signalled(self) -> None:
        """Stop; the second time without waiting for requests under way."""
        for task in self.connections if self.stopping.is_set() else ():
            task.cancel()
        self.stopping.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler, task = self.handler(self, reader, writer), asyncio.current_task()
        assert task is not None
        if len(self.connections) >= self.limits.connections or self.stopping.is_set():
            with contextlib.suppress(OSError, TimeoutError):
                await handler._write(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "too many clients: try again"}, False)
            writer.close()
            return
        self.connections.add(task)
        try:
            await handler.run()
        finally:
            self.connections.discard(task)
            writer.close()
