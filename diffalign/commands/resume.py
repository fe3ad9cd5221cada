"""Progress files of resumable commands: JSON Lines of finished work, and the settings it was computed with."""

from __future__ import annotations

import json
from pathlib import Path

from diffalign.atomic import replacing, write_text


def read_rows(path: Path) -> list[dict]:
    """Read a JSON Lines file of objects; skip an incomplete last line, return [] if the file does not exist.

    Raises ValueError with the line number for a line that is not a JSON object.
    """
    if not path.is_file():
        return []
    *complete, _ = path.read_bytes().split(b"\n")
    return [_row(path, number, line) for number, line in enumerate(complete, 1) if line]


def _row(path: Path, number: int, line: bytes) -> dict:
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row
        problem = f"a {type(row).__name__}"
    except (ValueError, RecursionError) as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    raise ValueError(
        f"{path}, line {number} is damaged ({problem}): delete this line or the file, and run the command again"
    )


def drop_partial_line(path: Path) -> None:
    """Truncate ``path`` after its last complete line, so that the next row starts on a new line."""
    if path.is_file() and not (text := path.read_bytes()).endswith(b"\n"):
        with replacing(path) as staged:
            staged.write_bytes(text[: text.rfind(b"\n") + 1])


def write_or_check_settings(path: Path, content: dict) -> None:
    """Write ``content`` to a new file, or compare it with an existing one. Raises ValueError if they differ."""
    content = json.loads(json.dumps(content))  # a pair is a list there
    if not path.is_file():
        write_text(path, json.dumps(content, indent=1) + "\n")
        return
    before = _row(path, 1, path.read_bytes())
    changed = [
        f"{name} ({before.get(name)!r}, now {value!r})" for name, value in content.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"{path.parent} holds results of other settings; changed: {', '.join(changed)}. "
            "Choose another output_dir, or delete this one"
        )
