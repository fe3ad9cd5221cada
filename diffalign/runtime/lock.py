"""Check that the run folder is writable, and lock it for one run at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from diffalign.atomic import staged_path

LOCK = ".diffalign.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # e.g. NFS without lockd


class FolderBusy(ValueError):
    """Another run works in this folder; the message names its process."""


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a folder for this process, and create it where it is missing.

    The operating system holds the lock, so it ends with its process, however that ended.

    Raises:
        ValueError: The folder cannot be written.
        FolderBusy: Another process holds the lock.
    """
    _check_writable(folder)
    lock = _acquire(folder / LOCK)
    if lock is None:
        yield
        return

    with contextlib.suppress(OSError):  # a full disk; the owner's name only serves messages
        (folder / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before the release: afterwards it may be the next owner's
        lock.release()


def refuse_busy(folder: Path) -> None:
    """Raise FolderBusy where another process holds the folder; called early, before a model is loaded."""
    if os.path.lexists(folder / LOCK) and (lock := _acquire(folder / LOCK)):
        lock.release()


def _check_writable(folder: Path) -> None:
    probe = staged_path(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("can this folder be written?")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written ({error.strerror}): choose another one") from error


def _acquire(path: Path) -> BaseFileLock | None:
    """Acquire the lock of a folder without waiting; None, with a warning, on a file system without locks."""
    lock = FileLock(path, thread_local=False)
    owner = _owner(path)  # read first: some versions of filelock truncate the file
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise FolderBusy(
            f"{path.parent} is in use by {owner}: wait for it, stop it, or choose another output_dir"
        ) from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise ValueError(f"{path} cannot be opened ({reason}): remove it, or choose another one") from error
        warnings.warn(f"locks do not work there ({reason}): start one run only in this folder", stacklevel=4)
        return None
    return lock


def _owner(path: Path) -> str:
    with contextlib.suppress(OSError):
        if path.is_file() and (name := path.read_text(encoding="utf-8", errors="replace")):
            return name[:200]
    return "another process"
