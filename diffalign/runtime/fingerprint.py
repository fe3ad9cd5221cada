"""Fingerprints of local files: whether a model, data or a judge are still what a run began with.

Small files are hashed whole. Of a file of more than ``WHOLE`` bytes, ``BLOCKS`` blocks spread evenly over it are hashed
with its size, so that a start costs milliseconds per file whatever its size: a change that misses all of these blocks
and keeps the size is not noticed by content. The time of such a file is kept beside it, for a warning. Of a folder, the
names and sizes of all files count, and the contents of at most ``FILES`` of them, spread evenly over the sorted names.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

WHOLE = 64 << 20
BLOCKS, BLOCK = 64, 1 << 20
FILES = 1000
STATED = 20_000  # files of a folder whose sizes are looked at; the names of all count
NETWORKS = (".safetensors", ".bin", ".json", ".txt", ".model", ".pt", ".pth", ".py")
JUDGES = (".ckpt", ".onnx", ".npz", ".npy", ".pkl", ".joblib", ".h5", ".msgpack", ".gguf")  # more that rewards load
MODEL_FILES = frozenset((*NETWORKS, *JUDGES))
# What a run writes; a data folder may hold run folders.
SKIPPED = frozenset(("__pycache__",))


def fingerprint(path: str | Path, suffixes: Collection[str] | None = None) -> dict[str, str] | None:
    """Return the digest of a file or a folder and the time of what was only sampled; None: nothing readable is there.

    Args:
        path: a regular file, or a folder; hidden files in it do not count.
        suffixes: of the files of a folder that count; None: all.
    """
    path = Path(path)
    try:
        if path.is_file():
            found = list(_of_file(path))
        elif path.is_dir():
            found = list(_of_folder(path, suffixes))
        else:
            return None
    except OSError:
        return None
    content, times = hashlib.sha256(), hashlib.sha256()
    for part, time in found:
        content.update(len(part).to_bytes(8, "little") + part)
        times.update(str(time).encode())
    return {"content": content.hexdigest(), "time": times.hexdigest()}


def of_bytes(parts: Iterable[bytes]) -> dict[str, str]:
    """Return the fingerprint of contents in memory."""
    content = hashlib.sha256()
    for part in parts:
        content.update(len(part).to_bytes(8, "little") + part)
    return {"content": content.hexdigest(), "time": ""}


def _of_file(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield (digest, time) of a file; time 0 where all of it was hashed."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        return
    with path.open("rb") as file:
        if state.st_size <= WHOLE:
            yield hashlib.file_digest(file, "sha256").digest(), 0
            return
        digest = hashlib.sha256(str(state.st_size).encode())
        for number in range(BLOCKS):
            file.seek(number * (state.st_size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
        yield digest.digest(), state.st_mtime_ns


def _of_folder(folder: Path, suffixes: Collection[str] | None) -> Iterator[tuple[bytes, int]]:
    files = sorted(_files(folder, suffixes))
    yield "\0".join(str(file.relative_to(folder)) for file in files).encode("utf-8", "surrogatepass"), 0
    for file in spread(files, STATED):
        with suppress(OSError):  # a dangling link, whose name counts
            state = file.stat()
            yield str(state.st_size).encode(), state.st_mtime_ns if len(files) > FILES else 0
    for file in spread(files, FILES):
        with suppress(OSError):
            yield from _of_file(file)


def _files(folder: Path, suffixes: Collection[str] | None) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED]
        for name in names:
            if not name.startswith(".") and (suffixes is None or os.path.splitext(name)[1].lower() in suffixes):
                yield Path(place, name)


def spread(items: list[Path], most: int) -> list[Path]:
    """Return at most ``most`` items, spread evenly."""
    count = min(len(items), most)
    return [items[number * len(items) // count] for number in range(count)]
