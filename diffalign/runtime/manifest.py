"""Manifests: size and SHA-256 of files in a folder, with a checksum of their own, to detect any damage.

A checkpoint has one (``manifest.json``), and so have the exports of a finished run (``exports.json``). Both are written
last. ``verify`` never raises, whatever a folder holds: it may come from a crash, a copy or a stranger.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
GROUPS = "tensor_groups"  # the key of STATE that lists the groups of tensors; other files are exports
LARGEST_JSON = 64 << 20  # largest manifest or state to read, in bytes
HOLLOW = 1000  # a file above 1 GiB whose size exceeds its disk usage by this factor was never written


def manifest_text(folder: Path, step: int, names: Iterable[str] | None = None) -> str:
    """Return the manifest of the files ``names`` below ``folder``; by default of all files in it."""
    chosen = sorted(path.name for path in folder.iterdir()) if names is None else sorted(names)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in chosen}
    return _signed({"format": FORMAT, "step": step, "files": files})


def _signed(content: Mapping[str, Any]) -> str:
    """Add the digest of the manifest itself, which detects damage to it."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path) -> list[str]:
    """List the problems of a checkpoint, a line per file; empty if every byte is as written."""
    found, problems = checked(Path(path) / MANIFEST)
    return problems or _uncovered(Path(path), found["files"])


def checked(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a manifest and check its files; return its content and a line per problem. Never raises."""
    try:
        content, problems = _read(path)
        checks = (_check_file(path.parent / name, entry) for name, entry in content.get("files", {}).items())
        return content, problems or [problem for problem in checks if problem]
    except FileNotFoundError:
        return {}, [f"{path} is missing"]
    except Exception as error:  # a forged file may cause any error, e.g. by deep nesting
        return {}, [f"{path} is unreadable ({type(error).__name__}: {str(error)[:200]})"]


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read a manifest; return its content without its checksum, and a line per problem."""
    text = read_regular(path).decode("utf-8")
    manifest = json.loads(text)
    content = {name: manifest[name] for name in ("format", "step", "files")}
    if text != _signed(content):
        return {}, [f"{path} is damaged (its own checksum differs)"]
    if content["format"] != FORMAT:
        return {}, [f"{path} has format {str(content['format'])[:50]}, this version reads {FORMAT}"]
    if not isinstance(content["files"], dict) or not all(map(_is_entry, content["files"].items())):
        return {}, [f"{path} is forged: it lists what is not a file of its folder"]
    return content, []


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    inside = PurePosixPath(name).parts and ".." not in PurePosixPath(name).parts and not name.startswith("/")
    known = isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}
    return bool(inside and known and type(entry["bytes"]) is int and isinstance(entry["sha256"], str))


def read_regular(path: Path, limit: int = LARGEST_JSON) -> bytes:
    """Return the bytes of a regular file. OSError: it is a pipe or a device, or larger than ``limit``."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError(f"{path.name} is not a regular file")
    if state.st_size > limit:
        raise OSError(f"{path.name} has {state.st_size:,} bytes, more than {limit:,}")
    return path.read_bytes()


def _check_file(path: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            return f"{path} is unreadable (not a regular file)"
        if state.st_size != expected["bytes"]:
            return f"{path} has {state.st_size} bytes, {expected['bytes']} were written"
        if state.st_size > 1 << 30 and getattr(state, "st_blocks", state.st_size) * 512 * HOLLOW < state.st_size:
            return f"{path} is damaged (its {state.st_size:,} bytes were never written)"
        return None if _digest(path) == expected["sha256"] else f"{path} is damaged (its checksum differs)"
    except OSError as error:
        return f"{path} is missing or unreadable ({error.strerror})"


def _uncovered(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """List files that ``checkpoint.load`` would read and that are not in the manifest."""
    try:
        groups = json.loads(read_regular(folder / STATE))[GROUPS] if STATE in files else []
        loaded = [STATE, *(f"{name}.safetensors" for name in groups)]
    except Exception:  # the checksum is right; ``load`` reports why this is no state
        return []
    return [f"{folder / name} is not in {MANIFEST}" for name in loaded if name not in files]
