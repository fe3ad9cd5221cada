"""Answers of raters as JSON Lines: appended one by one, each on disk before it is acknowledged.

    {"rater": "Ada", "pair": "base|tuned|3-0", "choice": "first", "left": 1, "seconds": 4.2, ...}
    {"rater": "Ada", "undo": "base|tuned|3-0", ...}

A line that a crash cut short was never acknowledged, and is removed when the file is opened. An undo is a line too, so
nothing that was written changes.
"""

from __future__ import annotations

import json
import os
import threading
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from diffalign.atomic import sync
from diffalign.commands.resume import drop_partial_line, read_rows
from diffalign.files import printable, shorten

CHOICES = ("first", "second", "equal", "bad", "skip")
MAX_NAME = 80  # characters of a rater's name
VALUES = {"first": 1.0, "second": 0.0, "equal": 0.5, "bad": 0.5}  # that the first image is preferred


def rater_name(text: object) -> str:
    """Normalise the name of a rater. ValueError: no text, or more than ``MAX_NAME`` characters."""
    name = " ".join(unicodedata.normalize("NFC", text).split()) if isinstance(text, str) else ""
    if not name or len(name) > MAX_NAME or printable(name) != name:
        raise ValueError(f"the name of a rater has 1 to {MAX_NAME} printable characters, got {shorten(repr(text), 60)}")
    return name


def identify(name: str) -> str:
    """Return what two spellings of one rater's name have in common: "ada" is "Ada"."""
    return name.casefold()


@dataclass(frozen=True)
class Answer:
    """A rater's answer about a pair.

    Attributes:
        rater: Name of the rater.
        pair: Key of the pair.
        choice: One of ``CHOICES``.
        left: Which image was shown on the left, 0 or 1.
        seconds: Time that the pair was visible before the answer.
        at: Time of the answer, UTC, ISO 8601.
        prompt: Text of the prompt.
        models: Models of both images, "" if unknown.
        content: Digests of both image files.
    """

    rater: str
    pair: str
    choice: str
    left: int
    seconds: float
    at: str
    prompt: str
    models: tuple[str, str]
    content: tuple[str, str]

    @property
    def value(self) -> float | None:
        """Probability that the first image is preferred; None where nothing was decided."""
        return VALUES.get(self.choice)

    @classmethod
    def read(cls, row: Mapping[str, Any], where: str) -> Answer:
        """Read a line of the file. Raises ValueError with the line if it is not an answer."""
        try:
            found = cls(
                rater=str(row["rater"]),
                pair=str(row["pair"]),
                choice=str(row["choice"]),
                left=int(row["left"]),
                seconds=float(row["seconds"]),
                at=str(row["at"]),
                prompt=str(row["prompt"]),
                models=(str(row["models"][0]), str(row["models"][1])),
                content=(str(row["content"][0]), str(row["content"][1])),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{where} is not an answer ({error!r}): delete this line, or choose another output_dir"
            ) from error
        if found.choice not in CHOICES:
            raise ValueError(f"{where}: choice {shorten(found.choice, 40)!r} is not one of {', '.join(CHOICES)}")
        return found


def now() -> str:
    """Return the time in UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class AnswerLog:
    """The file of answers. Appends are serialised, complete, and flushed to disk."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises ValueError for a line that is damaged, other than the last."""
        self.path, self._lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_partial_line(path)
        self._standing: dict[tuple[str, str], Answer] = {}
        self._order: dict[str, list[str]] = {}  # of each rater, the pairs in order of their answers
        for number, row in enumerate(read_rows(path), 1):
            self._apply(row, f"{shorten(path)}, line {number}")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        with suppress(OSError):  # some file systems cannot flush a folder
            sync(path.parent)  # a new file's name must survive a crash too
        self._size = os.fstat(self._file).st_size

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._file)

    def answers(self) -> list[Answer]:
        """List the answers that stand, in the order in which they were given."""
        with self._lock:
            return list(self._standing.values())

    def of(self, rater: str) -> list[Answer]:
        """List the answers of a rater that stand, oldest first."""
        with self._lock:
            return [self._standing[identify(rater), pair] for pair in self._order.get(identify(rater), ())]

    def get(self, rater: str, pair: str) -> Answer | None:
        """Return a rater's answer about a pair, if it stands."""
        return self._standing.get((identify(rater), pair))

    def add(self, answer: Answer) -> None:
        """Append an answer; a rater has one per pair. OSError: it could not be written, and does not stand."""
        row = asdict(answer)
        with self._lock:
            self._write(row)
            self._apply(row, "")

    def undo(self, rater: str) -> Answer | None:
        """Take back the rater's last answer that stands, and return it; None without one."""
        with self._lock:
            last = next(iter(self._order.get(identify(rater), ())[-1:]), None)
            if last is None:
                return None
            answer = self._standing[identify(rater), last]
            row = {"rater": rater, "undo": last, "at": now()}
            self._write(row)
            self._apply(row, "")
            return answer

    def _apply(self, row: Mapping[str, Any], where: str) -> None:
        if "undo" in row:
            key = identify(str(row.get("rater"))), str(row["undo"])
            if self._standing.pop(key, None) is not None:
                self._order[key[0]].remove(key[1])
            return
        answer = Answer.read(row, where)
        key = identify(answer.rater), answer.pair
        if key in self._standing:
            self._order[key[0]].remove(key[1])
            del self._standing[key]
        self._standing[key] = answer
        self._order.setdefault(key[0], []).append(answer.pair)

    def _write(self, row: Mapping[str, Any]) -> None:
        content = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            if os.write(self._file, content) < len(content):
                raise OSError("the disk took part of an answer only")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)  # part of a line would damage the next one
            raise
        self._size += len(content)
