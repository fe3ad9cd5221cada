"""The manifest of a checkpoint: size and SHA-256 of each file, signed, so that a wrong byte anywhere is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 2
MANIFEST = "manifest.json"


def manifest_text(folder: Path, step: int) -> str:
    """The manifest of what lies in ``folder``."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in sorted(folder.iterdir())}
    return _signed({"format": FORMAT, "step": step, "files": files})


def _signed(content: Mapping[str, Any]) -> str:
    """The manifest holds its own digest: nothing else would notice a byte that flipped in it."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, a line per file; empty if every byte is as written."""
    try:
        text = (Path(path) / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        content = {name: manifest[name] for name in ("format", "step", "files")}
    except FileNotFoundError:
        return [f"{Path(path) / MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{Path(path) / MANIFEST} is unreadable ({error!r})"]
    if text != _signed(content):
        return [f"{Path(path) / MANIFEST} is damaged (its own checksum differs)"]
    if content["format"] != FORMAT:
        return [f"{Path(path) / MANIFEST} has format {content['format']}, this version reads {FORMAT}"]
    checks = (_check_file(Path(path) / name, expected) for name, expected in content["files"].items())
    return [problem for problem in checks if problem]


def _check_file(path: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path} has {size} bytes, {expected['bytes']} were written"
        return None if _digest(path) == expected["sha256"] else f"{path} is damaged (its checksum differs)"
    except OSError as error:
        return f"{path} is missing or unreadable ({error.strerror})"
