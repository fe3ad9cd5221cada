"""Bounded reads of users' files: regular files only, UTF-8 text with errors that name file and line, short messages."""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from diffalign import remote

MAX_BYTES = 1 << 29  # of an image file, and of a line of text
MAX_TEXT = 1 << 20  # bytes of a caption file or a configuration
MAX_MESSAGE = 2000  # characters
_OTHER_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def printable(text: Path | str) -> str:
    """Escape what a terminal cannot show: undecodable bytes of file names as ``\\xff``, control characters too.

    The copy of a remote file is shown by its address.
    """
    text = (remote.address_of(text) or text) if isinstance(text, Path) else text
    decoded = os.fsencode(text).decode("utf-8", "backslashreplace") if isinstance(text, Path) else str(text)
    decoded = decoded.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c in " \u200d" else repr(c)[1:-1] for c in decoded)


def shorten(text: object, limit: int = 200) -> str:
    """Cut the middle of a text, so that a message can quote it: at most ``limit`` characters on one line."""
    whole = text if isinstance(text, (str, Path)) else str(text)
    length = len(str(whole))
    whole = str(whole)[:limit] + str(whole)[-limit:] if length > 4 * limit else whole
    found = printable(whole)
    if length <= limit and len(found) <= limit:
        return found
    note = f" ...({length:,} characters)... "
    keep = max(0, limit - len(note))
    return found[: keep - keep // 3] + note + found[len(found) - keep // 3 :]


def bounded(text: object, limit: int = MAX_MESSAGE) -> str:
    """Cut the middle of a message of several lines; its end says what to try, and stays."""
    whole = str(text)
    if len(whole) <= limit:
        return whole
    note = f"\n... {len(whole) - limit:,} more characters ...\n"
    keep = limit - len(note)
    return whole[: keep - keep // 3] + note + whole[-(keep // 3) :]


def some(names: Iterable[object], count: int = 3, limit: int = 80) -> str:
    """Name the first few of many: "a, b, c and 12 more"."""
    known = list(names)
    rest = f" and {len(known) - count} more" if len(known) > count else ""
    return ", ".join(shorten(name, limit) for name in known[:count]) + rest


def natural(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key that puts 2 before 10, as file managers do."""
    parts = re.split(r"(\d+)", name)
    key = tuple((0, int(p), "") if p.isdecimal() else (1, 0, p.casefold()) for p in parts if p)
    return key, name


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; pipes, sockets and devices could block or never end.

    The copy of a remote file is downloaded first if it is not current. OSError: it cannot be opened. ValueError: it is
    no regular file.
    """
    remote.ensure(path)
    # A pipe without a writer would block in open() itself.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise ValueError("not a regular file (a pipe, socket or device); copy its content to a file")


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file of at most ``limit`` bytes. OSError, ValueError: as ``open_regular``, or more bytes."""
    with open_regular(path) as file:
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else b""
    if len(content) > limit or os.path.getsize(path) > limit:
        raise ValueError(f"larger than {limit:,} bytes, the most that is read of one file")
    return content


def check_inside(path: Path, folders: Sequence[Path]) -> None:
    """Raise ValueError if ``path``, after links are resolved, lies in none of ``folders``."""
    real = path.resolve()
    allowed = [base for folder in folders for base in _bases(folder)]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise ValueError(
            f"lies outside the folder of the data, {some(folders[:1])}: set image_root to a folder that holds it, or "
            "allow_outside to true (in a training's configuration both stand below data:)"
        )


def _bases(folder: Path) -> Iterator[Path]:
    real = folder.resolve()
    yield real
    # The hub's cache keeps files in blobs/, to which those of snapshots/COMMIT/ are links.
    for parent in (real, *real.parents):
        if parent.parent.name == "snapshots":
            yield parent.parent.parent / "blobs"


def raw_lines(path: str | Path) -> Iterator[bytes]:
    """Yield the lines of a file with their ends (LF, CRLF or CR), without a byte order mark.

    Bytes, so that one invalid line does not hide its neighbours. Not ``str.splitlines``, which also cuts at separators
    that a JSON string may hold, such as U+2028. ValueError: a line of more than ``MAX_BYTES``.
    """
    with open_regular(path) as file:
        first = True
        while line := file.readline(MAX_BYTES + 1):
            if len(line) > MAX_BYTES:
                raise ValueError(f"{shorten(path)}: a line of more than {MAX_BYTES:,} bytes; split it")
            yield from re.split(rb"(?<=\r)(?!\n)", line.removeprefix(codecs.BOM_UTF8) if first else line)
            first = False


def decode_line(content: bytes, where: str) -> str:
    """Decode UTF-8. ValueError names ``where``, a file and line."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        kind = next((f" but {name}" for mark, name in _OTHER_MARKS.items() if content.startswith(mark)), "")
        raise ValueError(f"{where}: not UTF-8{kind} ({error.reason}); save the file as UTF-8") from error


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """Read a UTF-8 text file, with or without a byte order mark, its line ends as LF.

    OSError, ValueError: as ``read_bytes``; bytes that are not UTF-8, by file and line.
    """
    try:
        content = read_bytes(path, limit).removeprefix(codecs.BOM_UTF8)
    except ValueError as error:
        raise ValueError(f"{shorten(path)}: {error}") from error
    if content.startswith(tuple(_OTHER_MARKS)):
        decode_line(content, shorten(path))
    lines = re.split(rb"\r\n|\r|\n", content)
    return "\n".join(decode_line(line, f"{shorten(path)}, line {n}") for n, line in enumerate(lines, start=1))
