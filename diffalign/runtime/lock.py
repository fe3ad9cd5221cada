"""The run folder: writable, and used by one run at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from diffalign.atomic import staged_path

try:
    import fcntl
except ImportError:  # Windows, where two runs in a folder are not noticed
    fcntl = None  # type: ignore[assignment]

LOCK = ".diffalign.lock"


class FolderBusy(ValueError):
    """Another run works in this folder; the message names its process."""


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; made where it is missing.

    The lock is the kernel's, so that it is gone with its process, however that ended. ValueError: the folder cannot be
    written. FolderBusy: another process holds it.
    """
    _check_writable(folder)
    handle = _lock(folder / LOCK)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: see _lock
        os.close(handle)


def refuse_busy(folder: Path) -> None:
    """FolderBusy where another process holds the folder; for an early word, before a model is loaded."""
    if (folder / LOCK).exists():
        os.close(_lock(folder / LOCK))


def _check_writable(folder: Path) -> None:
    probe = staged_path(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("can this folder be written?")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written ({error.strerror}): choose another one") from error


def _lock(path: Path) -> int:
    """Return an open, locked file; one that its last owner removed meanwhile is worth nothing, and is opened again."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o644)
        except OSError as error:
            raise ValueError(f"{path} cannot be opened ({error.strerror}): remove it, or choose another one") from error
        try:
            _hold(handle)
        except BlockingIOError as error:
            owner = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise FolderBusy(
                f"{path.parent} is in use by {owner}: wait for it, stop it, or choose another output_dir"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                with contextlib.suppress(OSError):  # a full disk; the name of the owner is for messages only
                    os.truncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle
        os.close(handle)


def _hold(handle: int) -> None:
    """Lock an open file. BlockingIOError: another process holds it. File systems without locks lock nothing."""
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        warnings.warn(f"locks do not work there ({error.strerror}): start one run only in this folder", stacklevel=4)
