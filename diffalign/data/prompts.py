"""Reads prompt files: plain text, or JSON lines that carry what a reward needs to know."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from diffalign.structures import Prompt

TEXT_KEYS = ("prompt", "text")


def load_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of ``path`` in file order, at most ``limit`` of them; repeated ones are kept.

    ``.txt``: a prompt per line. ``.jsonl``: an object per line with "prompt" (or "text"); its other members become
    ``Prompt.metadata``, e.g. GenEval's ``{"tag", "include", "exclude", "prompt"}``. UTF-8, with or without a byte order
    mark; any line ends; blank lines are skipped, spaces around a prompt removed. Lines after ``limit`` are not read.

    FileNotFoundError: no such file. ValueError: another suffix, a line that cannot be used, or no prompt at all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}: leave it out to read every prompt of {path}")
    path = prompt_file(path)
    prompts = list(islice(_usable(path), limit))
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one per line")
    return prompts


def prompt_file(path: str | Path) -> Path:
    """``path``, where it can be read as prompts. FileNotFoundError: no such file. ValueError: another suffix."""
    path = Path(path)
    if path.suffix.lower() not in PARSERS:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; rename it to one of {', '.join(PARSERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}: check the path (relative to {Path.cwd()})")
    return path


def _usable(path: Path) -> Iterator[Prompt]:
    for found in read_lines(path):
        if isinstance(found, LineFault):
            raise found
        if found is not None:
            yield found


class LineFault(ValueError):
    """A line of a prompt file that cannot be used. kind: one of ``FAULTS``; where: file and line."""

    def __init__(self, kind: str, where: str, detail: str) -> None:
        assert kind in FAULTS, kind
        super().__init__(f"{where}: {detail}")
        self.kind, self.where, self.detail = kind, where, detail


FAULTS = {
    "not_utf8": "bytes that are no UTF-8",
    "bad_json": "no JSON object",
    "no_prompt": 'an object without "prompt" or "text"',
    "empty_prompt": "a prompt that is empty, or no text",
}


def read_lines(path: Path) -> Iterator[Prompt | LineFault | None]:
    """What each line holds: a prompt, what is wrong with it, or None where it is blank."""
    parse = PARSERS[path.suffix.lower()]
    for number, content in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        try:
            line = content.decode().strip()
            yield parse(line) if line else None
        except UnicodeDecodeError as error:
            yield LineFault("not_utf8", where, f"not UTF-8 ({error.reason}); save the file as UTF-8")
        except _Unusable as error:
            yield LineFault(error.kind, where, str(error))


def _lines(path: Path) -> Iterator[bytes]:
    """Lines in any convention. As bytes: decoded in blocks, a wrong one could not be told from its neighbours.

    Not str.splitlines: it would also cut at separators that a JSON string may hold, such as U+2028.
    """
    with path.open("rb") as file:
        file.seek(len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0)
        for line in file:
            yield from re.split(rb"\r(?!\n)", line)


class _Unusable(ValueError):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def _parse_json(line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise _Unusable("bad_json", f"bad JSON ({what}); write one object per line") from error
    if not isinstance(entry, dict):
        raise _Unusable("bad_json", f'expected an object, got {line[:40]}; write {{"prompt": "..."}}')
    key = next((key for key in TEXT_KEYS if key in entry), None)
    if key is None:
        raise _Unusable("no_prompt", f'no "prompt" among {", ".join(entry) or "no keys"}; add "prompt": "..."')
    text = entry.pop(key)
    if not isinstance(text, str) or not text.strip():
        detail = f'"{key}" must be a text that is not empty, got {text!r}; fill it or delete the line'
        raise _Unusable("empty_prompt", detail)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _Unusable("bad_json", f'"{key}" holds half of a surrogate pair; write the letter itself')
    return Prompt(text.strip(), entry)


PARSERS: dict[str, Callable[[str], Prompt]] = {".txt": Prompt, ".jsonl": _parse_json}
