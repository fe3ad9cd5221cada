"""Read files and folders at fsspec addresses (s3://, gs://, hf://, ...) through copies in the user's cache.

The cache mirrors the addresses: ``s3://bucket/pairs/train.jsonl`` is ``diffalign/remote/s3/bucket/pairs/train.jsonl``
below it. All readers therefore work on local paths, and a relative path in a remote table names a remote file, which is
downloaded when it is first read. A copy counts as current if the store describes the object as it did when the copy was
made (size, checksum, time); each process asks once per file. Credentials are fsspec's own: those of the environment, of
the cloud's tools or of ``~/.config/fsspec``; an address that holds any is refused.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from diffalign.atomic import write_text
from diffalign.tokens import printable, redacted

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"} | {
    "abfss": "adlfs", "http": "aiohttp", "https": "aiohttp", "sftp": "paramiko", "ssh": "paramiko"
}  # fmt: skip
LOCAL = ("file", "local")
TRIES = 3
WAIT = 1.0  # seconds before the second try; twice as long before each later one
THREADS = 8
NOTES = ".notes"  # folder of the cache with what the store said of each file when it was copied
# A path object has lost one slash of "s3://". Drives of Windows have one letter.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)([^/].*)", re.DOTALL)
_SECRET = re.compile(
    r"[?&;](x-amz-|x-goog-|sig=|signature=|token=|[^=&]*(key|secret|password|credential)[^=&]*=)", re.I
)
_VARIABLE = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|ACCOUNT_KEY|SAS|CREDENTIAL")
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_current: set[str] = set()  # copies that this process has compared with the store
T = TypeVar("T")


class RemoteError(ValueError):
    """An address that cannot be read; the message says why, and what to try."""


class Unreachable(RuntimeError):
    """A store that does not answer. Not an error of the data: the sample must not count as a bad one."""

    exit_code = 1


# Addresses and their copies --------------------------------------------------------------------------------------


def address(source: str | Path) -> str | None:
    """Return the address that a source is, in one form; None for a path, a hub id or another name.

    Raises:
        RemoteError: It holds credentials, or is no plain address of one file or folder.
    """
    match = _ADDRESS.fullmatch(str(source))
    if match is None or (":" in str(source) and "://" not in str(source) and os.path.lexists(source)):
        return None
    scheme, rest = match[1].lower(), match[3].rstrip("/")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if (at and ":" in user) or _SECRET.search(rest):
        raise RemoteError(
            f"an address of {scheme}:// holds credentials, which logs and config.yaml would show: leave them out, and "
            "set them as its tools read them (environment, ~/.aws, gcloud, or ~/.config/fsspec)"
        )
    if "::" in rest or not {"", ".", ".."}.isdisjoint(rest.split("/")) or "\0" in rest:
        raise RemoteError(f"{_short(f'{scheme}://{rest}')} is no plain address: write SCHEME://BUCKET/FOLDER/FILE")
    return f"{scheme}://{rest}"


def cache() -> Path:
    """Return the folder of the copies."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffalign" / "remote"


def copy_path(found: str) -> Path:
    """Return the path of the copy of an address; of a local one (file://) its own."""
    scheme, _, rest = found.partition("://")
    return Path("/" + rest) if scheme in LOCAL else cache() / scheme / rest


def address_of(path: str | Path) -> str | None:
    """Return the address of which a path is the copy; None for other paths."""
    text, root = str(path), f"{cache()}{os.sep}"
    if not text.startswith(root) or text.startswith(f"{root}{NOTES}"):
        return None
    scheme, slash, rest = text[len(root) :].partition(os.sep)
    return f"{scheme}://{rest}" if slash and rest else None


def shown(source: str | Path) -> str:
    """Return a source as messages and config.yaml show it: an address with both slashes, also that of a copy."""
    text = str(source)
    if (found := address_of(text)) is not None:
        return found
    match = _ADDRESS.fullmatch(text)
    if match is None or len(match[2]) > 1 or os.path.lexists(text):
        return text
    return f"{match[1]}://{'/' if match[1].lower() in LOCAL else ''}{match[3]}"


def mapped(source: str | Path) -> Path:
    """Return the path of a source without reading anything: of an address that of its copy."""
    found = address(source)
    return Path(source) if found is None else copy_path(found)


# Reading ---------------------------------------------------------------------------------------------------------


def local(source: str | Path) -> Path:
    """Return the local path of a source: of an address the path of its current copy, else the source itself.

    A folder is copied with all that it holds.

    Raises:
        RemoteError: No such object, no access, no answer, or the package for it is missing.
    """
    found = address(source)
    if found is None or found.partition("://")[0] in LOCAL:
        return Path(source) if found is None else copy_path(found)
    path = copy_path(found)
    try:
        with _explained(found):
            fs, name = filesystem(found)
            fs.invalidate_cache()
            info = _retried(lambda: fs.info(name))
            if info["type"] == "directory":
                _copy_folder(fs, name, path)
            else:
                _copy_file(fs, info, path)
    except Unreachable as error:
        if not path.exists():
            raise RemoteError(str(error)) from None
        warnings.warn(f"{error}; its copy in the cache is used", stacklevel=2)
    return path


def ensure(path: str | Path) -> None:
    """Download the file that ``path`` is the copy of, unless the copy is current; nothing for other paths.

    Raises:
        RemoteError: No such object, or no access.
        Unreachable: The store does not answer, and there is no copy.
    """
    known = str(path) in _current and os.path.exists(path)
    if known or (found := address_of(path)) is None:
        return
    try:
        with _explained(found):
            fs, name = filesystem(found)
            _copy_file(fs, _retried(lambda: fs.info(name)), Path(path))
    except Unreachable as error:
        if not Path(path).is_file():
            raise
        _current.add(str(path))
        warnings.warn(f"{error}; its copy in the cache is used", stacklevel=2)


def problem(source: str | Path) -> str | None:
    """Explain why an address cannot be read, without reading it; None if it can be, or if it is no address."""
    try:
        found = address(source)
        if found is None:
            return None
        if found.partition("://")[0] in LOCAL:
            return None if copy_path(found).exists() else f"there is no file {copy_path(found)}: check the path"
        with _explained(found):
            fs, name = filesystem(found)
            fs.invalidate_cache()
            _retried(lambda: fs.info(name))
    except (RemoteError, Unreachable) as error:
        return str(error)
    return None


def filesystem(found: str) -> tuple[Any, str]:
    """Open the file system of an address or a local folder; return it and the name of the object in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(found)
    except ImportError as error:
        scheme = found.partition("://")[0]
        package = PACKAGES.get(scheme)
        fix = f"pip install {package}" if package else printable(str(error))
        raise RemoteError(f"{_short(found)}: {scheme}:// needs another package: {fix}") from None
    except ValueError:
        scheme = found.partition("://")[0]
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "hf", "abfs", "https"))
        raise RemoteError(
            f"{_short(found)}: unknown scheme {scheme}://; known are {known} and others of fsspec"
        ) from None


def _copy_file(fs: Any, info: Mapping[str, Any], path: Path) -> None:
    """Download a file unless its copy is current. OSError, or an error of the store."""
    state = hashlib.sha256(repr(sorted((key, str(value)) for key, value in info.items())).encode()).hexdigest()
    note = cache() / NOTES / hashlib.sha256(str(path).encode()).hexdigest()
    if not (path.is_file() and note.is_file() and note.read_text() == state):
        path.parent.mkdir(parents=True, exist_ok=True)
        _retried(lambda: _download(fs, info, path))
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, state)
    _current.add(str(path))


def _download(fs: Any, info: Mapping[str, Any], path: Path) -> None:
    # Threads and processes may ask for the same file at once: each stages its own.
    staged = path.with_name(f".diffalign-{os.getpid()}-{uuid.uuid4().hex}")
    try:
        fs.get_file(info["name"], str(staged))
        if (size := info.get("size")) is not None and staged.stat().st_size != size:
            raise OSError(f"{staged.stat().st_size:,} of {size:,} bytes came")
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _copy_folder(fs: Any, name: str, path: Path) -> None:
    """Download what a folder holds and is not current, and delete copies of what it no longer holds."""
    found = listed(fs, name)
    targets = {path / _inside(key, name): info for key, info in found.items()}
    path.mkdir(parents=True, exist_ok=True)
    for stale in [file for file in path.rglob("*") if file.is_file() and file not in targets]:
        stale.unlink()
    needed = sum(info.get("size") or 0 for file, info in targets.items() if not file.is_file())
    if needed > (free := shutil.disk_usage(path).free):
        raise RemoteError(
            f"{_short(shown(path))} holds {needed:,} bytes that are not in the cache, {path} has {free:,} free: set "
            "XDG_CACHE_HOME to a larger disk"
        )
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda item: _copy_file(fs, item[1], item[0]), targets.items()))


def listed(fs: Any, folder: str) -> dict[str, Any]:
    """List the files below a folder: name -> info. Consoles of S3 mark folders by empty objects, which are no files."""
    found: dict[str, Any] = _retried(lambda: fs.find(folder, detail=True))
    folders = {key.rstrip("/").rpartition("/")[0] for key in found} | {folder.rstrip("/")}
    return {
        key: info
        for key, info in found.items()
        if info.get("type", "file") == "file" and not key.endswith("/") and (info.get("size") or key not in folders)
    }


def _inside(key: str, folder: str) -> str:
    inside = key.lstrip("/").removeprefix(folder.strip("/")).strip("/")
    if not {"", ".", ".."}.isdisjoint(inside.split("/")):
        raise RemoteError(f"{_short(key)} cannot be a file of a folder: rename the object")
    return inside


def _retried(act: Callable[[], T]) -> T:
    """Call again after errors that may pass."""
    for number in range(TRIES):
        try:
            return act()
        except Exception as error:
            if number == TRIES - 1 or isinstance(error, RemoteError) or not _may_pass(error):
                raise
            time.sleep(WAIT * 2**number)
    raise AssertionError


# Errors ----------------------------------------------------------------------------------------------------------


def _may_pass(error: Exception) -> bool:
    return not isinstance(error, (*_ABSENT, ImportError)) and not _is_absent(error) and not _is_refused(error)


def _is_absent(error: Exception) -> bool:
    return isinstance(error, _ABSENT) or any("NotFound" in kind.__name__ for kind in type(error).__mro__)


def _is_refused(error: Exception) -> bool:
    text = f"{' '.join(kind.__name__ for kind in type(error).__mro__)} {error}"
    return isinstance(error, PermissionError) or bool(
        re.search(r"credential|forbidden|unauthori|access.?denied|\b40[13]\b|GatedRepo|InvalidAccessKey", text, re.I)
    )


@contextmanager
def _explained(found: str) -> Iterator[None]:
    """Raise RemoteError or Unreachable, in a sentence without secrets, for an error of a store."""
    try:
        yield
    except (RemoteError, Unreachable):
        raise
    except Exception as error:  # of any of fsspec's stores and the clients below them
        what = explained(found, error)
        raise Unreachable(what) if _may_pass(error) and not _is_local(error) else RemoteError(what) from None


def _is_local(error: Exception) -> bool:
    """Return whether the disk of the cache failed, not the store."""
    return isinstance(error, OSError) and bool(error.filename) and str(error.filename).startswith(str(cache()))


def explained(found: str, error: Exception) -> str:
    """Say in a sentence, without secrets, what is wrong with an address and what to try."""
    where, why = _short(shown(found)), reason(error)
    if _is_absent(error):
        return f"there is nothing at {where}: check bucket and path"
    if _is_refused(error):
        return (
            f"no access to {where} ({why}): check the credentials that its tools read, e.g. AWS_PROFILE, "
            "`gcloud auth application-default login` or `hf auth login`"
        )
    return f"{where} cannot be reached ({why}): check the network, the endpoint and the name of the bucket"


def reason(error: BaseException) -> str:
    """Return the text of an error without queries of addresses, user names in them, or values of secret variables."""
    text = printable(f"{type(error).__name__}: {error}", 600)
    text = re.sub(r"(://)[^/\s@]+@", r"\1***@", re.sub(r"\?[^\s'\")>]+", "?***", text))
    secrets = [value for name, value in os.environ.items() if _VARIABLE.search(name.upper()) and len(value) >= 8]
    return redacted(text, secrets)[:300]


def _short(text: str) -> str:
    return printable(text, 200)
