"""Pairs, servers and clients for tests of ``diffalign label``."""

from __future__ import annotations

import io
import json
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection

import uvicorn
from PIL import Image

from diffalign.commands.label.answers import Answer, AnswerLog, now
from diffalign.commands.label.command import build_sitting, listening
from diffalign.commands.label.comparison import Comparison
from diffalign.commands.label.config import LabelConfig
from diffalign.commands.label.web import build_app
from diffalign.structures import ImageSource, Prompt


def picture(colour, size=(20, 20), format="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format, **options)
    return file.getvalue()


PORT = 0  # a free one
RED, BLUE = picture((200, 30, 30)), picture((30, 30, 200))


def comparison(number, models=("base", "tuned"), images=(RED, BLUE), **more) -> Comparison:
    sources = tuple(ImageSource(f"pair {number}, image {side}", content) for side, content in enumerate(images))
    return Comparison(f"pair {number}", Prompt(f"prompt {number}"), sources, models, **more)


def answer(number, choice="first", rater="Ada", models=("base", "tuned"), **more) -> Answer:
    known = {"left": 0, "seconds": 2.0, "at": now(), "prompt": f"prompt {number}", "content": ("a", "b")}
    return Answer(rater=rater, pair=f"pair {number}", choice=choice, models=models, **{**known, **more})


@contextmanager
def sitting_in(folder, pairs, **options):
    """A sitting on the answers in a folder."""
    with AnswerLog(folder / "answers.jsonl") as log:
        yield build_sitting(LabelConfig(output_dir=folder, **options), pairs, log)


@contextmanager
def serving(sitting, token=None):
    """Serve a sitting in a thread; yields its port, and the lines that it reports."""
    reported: list[str] = []
    with listening("127.0.0.1", PORT) as opened:
        server = uvicorn.Server(uvicorn.Config(build_app(sitting, token, reported.append), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield opened.getsockname()[1], reported
        finally:
            server.should_exit = True
            thread.join()


def ask(port, path, body=None, method=None, headers=None):
    """Send a request; returns status, headers and content, JSON decoded."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {} if content is None else {"Content-Type": "application/json"}
    connection.request(method or ("GET" if body is None else "POST"), path, content, {**kind, **(headers or {})})
    reply = connection.getresponse()
    found = reply.read()
    connection.close()
    is_json = reply.headers.get("content-type") == "application/json"
    return reply.status, reply.headers, json.loads(found) if is_json else found
