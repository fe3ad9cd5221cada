"""``diffalign label``: serve a page on which raters compare pairs of images, and turn their answers into data.

<output_dir>/answers.jsonl          every answer, one line each, on disk before the next pair is shown
             preferences.parquet    Pick-a-Pic's columns, for ``train diffusion_dpo``; written at the end
             results.json, .md      win rates, a ranking of models, agreement of raters and of rewards
             images/, scores/       images that were drawn for it, and scores of rewards
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from diffalign.atomic import write_text
from diffalign.commands.label.answers import AnswerLog
from diffalign.commands.label.comparison import Comparison
from diffalign.commands.label.config import LabelConfig
from diffalign.commands.label.export import digest_images, export
from diffalign.commands.label.order import ORDERS
from diffalign.commands.label.sitting import Sitting
from diffalign.commands.label.sources import collect
from diffalign.commands.label.statistics import summarise, to_markdown
from diffalign.commands.label.web import build_app, is_loopback
from diffalign.console import say
from diffalign.runtime.lock import claimed
from diffalign.tokens import token_from

ANSWERS, SECRET, TABLE = "answers.jsonl", ".token-key", "preferences.parquet"
GRACE = 5  # seconds for open requests when the server stops


def run(config: LabelConfig) -> None:
    """Serve the page until Ctrl-C or SIGTERM, then write the table and the statistics."""
    token = page_token(config)
    with claimed(config.folder):
        pairs = collect(config)
        with AnswerLog(config.folder / ANSWERS) as log:
            if not config.export_only:
                serve(config, build_sitting(config, pairs, log), token)
            say(write_results(config, pairs, log))


def build_sitting(config: LabelConfig, pairs: Sequence[Comparison], log: AnswerLog) -> Sitting:
    """Build the state of the server. ValueError: the order needs something that the pairs lack."""
    return Sitting(
        pairs,
        log,
        ORDERS[config.order](pairs, config.seed),
        secret=_secret(config.folder / SECRET),
        seed=config.seed,
        raters_per_pair=config.raters_per_pair,
        digest=digest_images,
    )


def page_token(config: LabelConfig) -> str | None:
    """Return the token that the page asks for: the user's, or a new one where other machines can connect.

    ValueError: the variable that should hold it is not set.
    """
    given = token_from(config.token_env, "the page")
    return given if given or is_loopback(config.host) else secrets.token_urlsafe(18)


def _secret(path: Path) -> bytes:
    """Read the key of the folder's tokens, or make one."""
    with contextlib.suppress(FileNotFoundError):
        if found := path.read_bytes():
            return found
    made = secrets.token_bytes(32)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(made)
    return made


def serve(config: LabelConfig, sitting: Sitting, token: str | None) -> None:
    """Serve a sitting until a signal. ValueError: the address cannot be used."""
    with listening(config.host, config.port) as opened:
        port = opened.getsockname()[1]
        app = build_app(sitting, token, say)
        server = Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=GRACE))
        where = address(config.host, port, token)
        say(f"{len(sitting.pairs)} pairs to label at {where}\nCtrl-C ends and writes {TABLE}")
        server.run(sockets=[opened])


def address(host: str, port: int, token: str | None) -> str:
    """Return the address to open. The token stands behind #, which browsers send to no server."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"#token={token}" if token else "")


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open a socket. ValueError: the address is not this machine's, or the port is in use."""
    try:
        opened = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
        )
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot serve at {host}:{port} ({reason}); choose another --port, or 0 for any") from error
    with opened:
        yield opened


class Server(uvicorn.Server):
    """A server that stops at Ctrl-C and SIGTERM and lets the command go on, to write its results."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle both signals while the server runs."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.should_exit = True


def write_results(config: LabelConfig, pairs: Sequence[Comparison], log: AnswerLog) -> str:
    """Write the table and the statistics; return what to print."""
    answers = log.answers()
    if not answers:
        return f"no answers in {log.path}: nothing to write"
    table = config.folder / TABLE
    made = export(table, pairs, answers, config.both_bad)
    figures = summarise(pairs, answers)
    report = to_markdown(figures)
    write_text(config.folder / "results.json", json.dumps(figures, indent=1) + "\n")
    write_text(config.folder / "results.md", report + "\n")
    ties = " --data.ties soft" if made.ties else ""
    use = [f"{table}: {made.rows} rows, {made.ties} ties; train on them:",
           f"diffalign train diffusion_dpo --train_data {table}{ties} --model BASE"]  # fmt: skip
    return "\n".join([report, "", *made.lines(), *(use if made.rows else [])])
