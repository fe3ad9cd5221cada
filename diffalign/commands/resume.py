"""Resume a long command: finished work as JSON lines, and the settings that it was done with."""

from __future__ import annotations

import json
from pathlib import Path

from diffalign.atomic import replacing, write_text


def whole_rows(path: Path) -> list[dict]:
    """Read JSON objects, one per line, without a last line that a crash cut short; empty if there is no file.

    ValueError: a line is not a JSON object; the message names its number.
    """
    if not path.is_file():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    return [_row(path, number, line) for number, line in enumerate(whole, 1) if line]


def _row(path: Path, number: int, line: bytes) -> dict:
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row
        problem = f"a {type(row).__name__}"
    except (ValueError, RecursionError) as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    raise ValueError(f"{path}, line {number} is damaged ({problem}): delete this line, or the file; its work is redone")


def drop_partial_line(path: Path) -> None:
    """Remove a last line that a crash cut short, so that the next row starts on a line of its own."""
    if path.is_file() and not (text := path.read_bytes()).endswith(b"\n"):
        with replacing(path) as staged:
            staged.write_bytes(text[: text.rfind(b"\n") + 1])


def same_or_new(path: Path, content: dict) -> None:
    """Write settings, or compare them with those in the file. ValueError: they differ."""
    if not path.is_file():
        write_text(path, json.dumps(content, indent=1) + "\n")
        return
    before = _row(path, 1, path.read_bytes())
    changed = [
        f"{name} ({before.get(name)!r}, now {value!r})" for name, value in content.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path.parent} holds the work of other settings; changed: {', '.join(changed)}. "
            "Choose another output_dir, or delete this one"
        )
