"""Reads prompt files: plain text, or JSON lines that carry what a reward needs to know."""

from __future__ import annotations

import json
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
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}: leave it out to read every prompt of {path}")
    if path.suffix.lower() not in PARSERS:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; rename it to one of {', '.join(PARSERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}: check the path (relative to {Path.cwd()})")
    prompts = list(islice(_parse_lines(path), limit))
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one per line")
    return prompts


def _parse_lines(path: Path) -> Iterator[Prompt]:
    parse = PARSERS[path.suffix.lower()]
    read = 0
    try:
        # Not str.splitlines: it would also cut at separators that a JSON string may hold, such as U+2028.
        with path.open(encoding="utf-8-sig") as lines:
            for read, line in enumerate(lines, start=1):  # noqa: B007  the messages below need it
                if line := line.strip():
                    yield parse(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after line {read}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{path}, line {read}: {error}") from error


def _parse_json(line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"bad JSON ({error.msg}, column {error.colno}); write one object per line") from error
    if not isinstance(entry, dict):
        raise ValueError(f'expected an object, got {line[:40]}; write {{"prompt": "..."}}')
    key = next((key for key in TEXT_KEYS if key in entry), None)
    if key is None:
        raise ValueError(f'no "prompt" among {", ".join(entry) or "no keys"}; add "prompt": "..."')
    text = entry.pop(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{key}" must be a text that is not empty, got {text!r}; fill it or delete the line')
    return Prompt(text.strip(), entry)


PARSERS: dict[str, Callable[[str], Prompt]] = {".txt": Prompt, ".jsonl": _parse_json}
