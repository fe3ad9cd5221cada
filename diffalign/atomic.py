"""Write files and folders whole: readers see the previous version or the new one, never a part.

Everything is staged beside its target under a name that only this package uses, flushed to disk, and renamed. A crash
leaves staged files behind; ``remove_staged`` deletes them, and nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

STAGED = re.compile(r"\.diffalign-\d+-.+")


def staged_path(path: Path) -> Path:
    """Return the name under which this process stages ``path``; the suffix stays, because writers read it."""
    return path.with_name(f".diffalign-{os.getpid()}-{path.name}")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a file to write; it replaces ``path`` when the block ends, and is removed when the block raises.

    The new file has the permissions of the one that it replaces, else those that the umask gives. Libraries that write
    through ``mkstemp`` (safetensors) would make it private. A symbolic link is replaced, not followed.
    """
    path = Path(path)
    staged = staged_path(path)
    remove(staged)
    os.close(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = (path if path.is_file() and not path.is_symlink() else staged).stat().st_mode & 0o777
    try:
        yield staged
        staged.chmod(mode)
        sync(staged)
        os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            remove(staged)
        raise
    with suppress(OSError):  # the file is in place; some file systems cannot flush a folder
        sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text with ``replacing``."""
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to fill; it takes the place of ``path`` when the block ends.

    A folder cannot be replaced by one rename: after a crash between two renames the previous one is beside it under a
    staged name, and the new one is missing rather than incomplete.
    """
    staged, previous = staged_path(path), staged_path(path.with_name(f"{path.name}.previous"))
    remove(staged)
    staged.mkdir()
    try:
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                file.chmod(staged.stat().st_mode & 0o666)
                sync(file)
        remove(previous)
        if os.path.lexists(path):
            os.rename(path, previous)
        os.rename(staged, path)
    except BaseException:
        if not os.path.lexists(path) and previous.exists():
            os.rename(previous, path)
        with suppress(OSError):
            remove(staged)
        raise
    remove(previous)


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file, a folder or a symbolic link (not its target), if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_staged(folder: Path, skip: Callable[[Path], bool] = lambda path: False) -> None:
    """Delete what interrupted writes left in ``folder``, except for what ``skip`` is true of."""
    if folder.is_dir():
        for path in list(folder.iterdir()):
            if STAGED.fullmatch(path.name) and not skip(path):
                remove(path)


def unused(path: Path) -> Path:
    """Return ``path``, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in count(1))
    return next(name for name in names if not os.path.lexists(name))


def keep_aside(path: Path) -> Path | None:
    """Rename what is at ``path`` to ``NAME.old`` (``NAME.old-2``, ...); return that, None if nothing is there."""
    if not os.path.lexists(path):
        return None
    aside = unused(path.with_name(f"{path.name}.old"))
    os.rename(path, aside)
    return aside
