"""Read prompt files: plain text, or JSON lines with metadata for rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.data.records import parse_object
from diffalign.data.row import MAX_PROMPT, as_metadata
from diffalign.files import decode_line, open_regular, raw_lines, shorten, some
from diffalign.structures import Prompt, without_nulls

TEXT_KEYS = ("prompt", "text")


def load_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read the prompts of a file in order; duplicates are kept.

    ``.txt``: a prompt per line. ``.jsonl``: an object per line with "prompt" (or "text"); its other members become
    ``Prompt.metadata``, e.g. GenEval's ``{"tag", "include", "exclude", "prompt"}``; so do the members of a mapping
    "metadata", as in pairs and rollout buffers. Nulls count as absent, as in tables. Files are UTF-8, with or without a
    byte order mark, with any line ends. Blank lines are skipped, and spaces around a prompt are removed.

    Args:
        path: The file.
        limit: Largest number of prompts; later lines are not read.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: An unknown suffix, an invalid line, or no prompt.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}: leave it out to read every prompt of {shorten(path)}")
    path = prompt_file(path)
    prompts = list(islice(_usable(path), limit))
    if not prompts:
        raise ValueError(f"{shorten(path)} holds no prompt: write one per line")
    return prompts


def prompt_file(path: str | Path) -> Path:
    """Check that ``path`` is a prompt file. FileNotFoundError: it does not exist. ValueError: an unknown suffix."""
    path = Path(path)
    if path.suffix.lower() not in PARSERS:
        raise ValueError(
            f"{shorten(path)}: unknown suffix {shorten(path.suffix, 40)!r}; rename it to one of {', '.join(PARSERS)}"
        )
    try:
        open_regular(path).close()
    except FileNotFoundError:
        where = f"no prompt file at {shorten(path)}: check the path (relative to {Path.cwd()})"
        raise FileNotFoundError(where) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{shorten(path)} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return path


def _usable(path: Path) -> Iterator[Prompt]:
    for found in read_lines(path):
        if isinstance(found, LineError):
            raise found
        if found is not None:
            yield found


class LineError(ValueError):
    """An invalid line of a prompt file. kind: one of ``LINE_ERRORS``; where: file and line."""

    def __init__(self, kind: str, where: str, detail: str) -> None:
        assert kind in LINE_ERRORS, kind
        detail = shorten(detail, 400)
        super().__init__(f"{where}: {detail}")
        self.kind, self.where, self.detail = kind, where, detail


LINE_ERRORS = {
    "not_utf8": "bytes that are not UTF-8",
    "bad_json": "no JSON object",
    "no_prompt": 'an object without "prompt" or "text"',
    "empty_prompt": "a prompt that is empty, or no text",
    "too_long": f"a prompt of more than {MAX_PROMPT:,} characters",
}


def read_lines(path: Path) -> Iterator[Prompt | LineError | None]:
    """Yield a prompt, an error, or None (a blank line) for each line of a file."""
    parse = PARSERS[path.suffix.lower()]
    for number, content in enumerate(raw_lines(path), start=1):
        where = f"{shorten(path)}, line {number}"
        try:
            line = decode_line(content, where).strip()
        except ValueError as error:
            yield LineError("not_utf8", where, str(error).removeprefix(f"{where}: "))
            continue
        try:
            yield _checked(parse(line)) if line else None
        except _Unusable as error:
            yield LineError(error.kind, where, str(error))


def _checked(prompt: Prompt) -> Prompt:
    if len(prompt.text) > MAX_PROMPT:
        detail = f"{len(prompt.text):,} characters, more than {MAX_PROMPT:,}; text encoders read a few thousand"
        raise _Unusable("too_long", f"{detail}: {shorten(prompt.text, 60)}; shorten it")
    return prompt


class _Unusable(ValueError):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def _parse_json(line: str) -> Prompt:
    try:
        entry = parse_object(line, "")
    except ValueError as error:
        raise _Unusable("bad_json", str(error).removeprefix(": ")) from error
    key = next((key for key in TEXT_KEYS if key in entry), None)
    if key is None:
        raise _Unusable("no_prompt", f'no "prompt" among {some(entry, 10, 40) or "no keys"}; add "prompt": "..."')
    text = entry.pop(key)
    if not isinstance(text, str) or not text.strip():
        detail = f'"{key}" must be a text that is not empty, got {shorten(repr(text), 60)}; fill it or delete the line'
        raise _Unusable("empty_prompt", detail)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _Unusable("bad_json", f'"{key}" holds half of a surrogate pair; write the letter itself')
    nested = entry.get("metadata")
    nested = _nested(entry.pop("metadata")) if isinstance(nested, dict) or str(nested).lstrip().startswith("{") else {}
    return Prompt(text.strip(), {**without_nulls(entry), **nested})


def _nested(value: Any) -> dict[str, Any]:
    try:
        return as_metadata(value)
    except ValueError as error:
        raise _Unusable("bad_json", f'"metadata": {error}') from error


PARSERS: dict[str, Callable[[str], Prompt]] = {".txt": Prompt, ".jsonl": _parse_json}
