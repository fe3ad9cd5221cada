"""The HTTP interface of ``diffalign label``: a static page, and a few JSON requests.

    POST /api/next   {"rater"}                            -> {"pairs", "done", "total"}
    POST /api/answer {"rater", "token", "pick", "seconds"} -> the same, and "saved"
    POST /api/undo   {"rater"}                            -> the same, and "undone"
    GET  /picture/TOKEN/left, .../right, .../source       -> an image

Requests to other hosts than this machine's are refused where no token is asked for, so that a page of the web cannot
reach the server through a name that it resolves to 127.0.0.1, and so are those that a page of another origin sends.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from diffalign import media
from diffalign.commands.label.answers import rater_name
from diffalign.commands.label.export import read_image
from diffalign.commands.label.sitting import Sitting, UnknownPair
from diffalign.files import printable, shorten

PAGE = Path(__file__).parent / "page"
FILES = {"/": "label.html", "/label.css": "label.css", "/label.js": "label.js"}
MAX_BODY = 1 << 16  # bytes of a request
PLAIN = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}  # formats that every browser shows
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Return whether an address or name is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Refuse requests that do not come from the page itself, and add the headers of ``HEADERS``."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        refusal = self.refusal(Request(scope))
        answer: ASGIApp = self.app if refusal is None else JSONResponse({"error": refusal[1]}, refusal[0])
        await answer(scope, receive, with_headers)

    def refusal(self, request: Request) -> tuple[int, str] | None:
        """Return status and reason if the request is not allowed."""
        if self.token is None:
            return self._foreign(request)
        if request.url.path in FILES:  # the page asks for the token; without it there is nothing to see
            return None
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            return 401, "this page needs the token that diffalign label printed: open the address with #token=..."
        return None

    @staticmethod
    def _foreign(request: Request) -> tuple[int, str] | None:
        host = request.headers.get("host", "")
        if not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return 403, "this server answers to 127.0.0.1 and localhost only: start it with --host to open it"
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "this request comes from another page"
        return None


class Pages:
    """Request handlers of a sitting."""

    def __init__(self, sitting: Sitting, report: Callable[[str], None]) -> None:
        self.sitting, self.report = sitting, report

    def state(self, rater: str, **more: Any) -> dict[str, Any]:
        """Return the rater's next pairs and progress."""
        pairs = [
            {"token": shown.token, "prompt": shown.prompt, "source": shown.source}
            for shown in self.sitting.upcoming(rater)
        ]
        done, total = self.sitting.progress(rater)
        return {"rater": rater, "pairs": pairs, "done": done, "total": total, **more}

    def next(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a rater."""
        return self.state(rater_name(body.get("rater")))

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Record an answer."""
        rater, seconds = rater_name(body.get("rater")), body.get("seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise ValueError("seconds must be a number")
        saved = self.sitting.answer(rater, str(body.get("token")), str(body.get("pick")), float(seconds))
        return self.state(rater, saved=saved)

    def undo(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Take the last answer of a rater back."""
        rater = rater_name(body.get("rater"))
        return self.state(rater, undone=self.sitting.undo(rater) is not None)

    def picture(self, request: Request) -> Response:
        """Return an image as browsers show it, with the pixels that training reads."""
        token, side = request.path_params["token"], request.path_params["side"]
        found = self.sitting.picture(token, side)
        if found is None:
            raise HTTPException(404, "no such picture: reload the page")
        index, image = found
        try:
            return Response(*for_browser(read_image(image)))
        except media.BROKEN as error:
            pair = self.sitting.pairs[index]
            reason = f"{shorten(printable(pair.key))} left out: {shorten(media.reason(error), 300)}"
            self.sitting.drop(index, reason)
            self.report(reason)
            raise HTTPException(410, "a picture of this pair cannot be read, so the pair is left out") from error


def for_browser(content: bytes) -> tuple[bytes, int, None, str]:
    """Return an image, status, headers and media type: the file itself if a browser shows what ``media.decode`` reads.

    Transparency, animations and unusual formats or depths look different in browsers, so they are converted to PNG.
    One of ``media.BROKEN``: the image cannot be decoded.
    """
    decoded = media.decode(content)
    with Image.open(io.BytesIO(content)) as image:
        usual = image.mode in ("RGB", "L") and getattr(image, "n_frames", 1) == 1 and "transparency" not in image.info
        if usual and image.format in PLAIN:
            return content, 200, None, PLAIN[image.format]
    converted = io.BytesIO()
    decoded.save(converted, "PNG", compress_level=1)
    return converted.getvalue(), 200, None, "image/png"


def build_app(sitting: Sitting, token: str | None, report: Callable[[str], None]) -> Starlette:
    """Build the application.

    Args:
        sitting: The state.
        token: Required from clients as ``Authorization: Bearer TOKEN``; None: only this machine may connect.
        report: Called with a line for the terminal.
    """
    pages = Pages(sitting, report)
    routes = [Route(path, _file(name)) for path, name in FILES.items()]
    routes += [
        Route(f"/api/{name}", _api(handler, report), methods=["POST"])
        for name, handler in (("next", pages.next), ("answer", pages.answer), ("undo", pages.undo))
    ]
    routes.append(Route("/picture/{token}/{side}", pages.picture))
    handlers: Any = {HTTPException: _error}
    return Starlette(routes=routes, middleware=[Middleware(Guard, token=token)], exception_handlers=handlers)


def _file(name: str) -> Callable[[Request], Response]:
    return lambda request: FileResponse(PAGE / name)


def _error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _api(
    handler: Callable[[Mapping[str, Any]], dict[str, Any]], report: Callable[[str], None]
) -> Callable[[Request], Awaitable[Response]]:
    async def call(request: Request) -> Response:
        body = await _read_json(request)
        try:
            return JSONResponse(await run_in_threadpool(handler, body))
        except UnknownPair as error:
            raise HTTPException(409, str(error)) from error
        except ValueError as error:
            raise HTTPException(400, shorten(error, 300)) from error
        except OSError as error:
            report(f"an answer could not be saved: {error}")
            raise HTTPException(507, f"not saved: {error.strerror or error}; make room, and answer again") from error

    return call


async def _read_json(request: Request) -> Mapping[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send JSON")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY:
            raise HTTPException(413, f"a request has at most {MAX_BODY:,} bytes")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the request is not JSON") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "the request must be a JSON object")
    return body
