"""Read rows of JSON lines, JSON and CSV files as written, without type inference.

Table libraries infer a type per column, which turns the caption ``None`` into null, ``007`` into 7, and an absent
member of a mapping into null. Here a row is what ``json`` or ``csv`` parses.
"""

from __future__ import annotations

import csv
import io
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.files import MAX_BYTES, decode_line, open_regular, raw_lines, shorten, some

Chunk = tuple[int, int, bytes]  # number of its first line, from 1; offset in the file; content
Parser = Callable[[Chunk], dict[str, Any]]


def parse_json(text: str, where: str) -> Any:
    """Parse JSON. ValueError names ``where``, in at most a few hundred characters."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: bad JSON ({error.msg}, column {error.colno})") from error
    except (RecursionError, ValueError) as error:  # also integers of more digits than Python converts
        detail = "nested too deeply" if isinstance(error, RecursionError) else shorten(error)
        raise ValueError(f"{where}: bad JSON ({detail})") from error


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object. ValueError: bad JSON, or something else."""
    try:
        entry = parse_json(text, where)
    except ValueError as error:
        raise ValueError(f"{error}; write one object per line") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {shorten(text.strip(), 40)}")
    return entry


class Records(Sequence[dict[str, Any]]):
    """The rows of text files, parsed on access; the index takes 24 bytes per row.

    Attributes:
        columns: Columns of all rows in order of first appearance.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.parsers = [PARSERS[path.suffix.lower()](path) for path in self.paths]
        self.starts: list[int] = []  # number of the first row of each file
        self._spans = array("q")  # line, offset, bytes
        columns: dict[str, None] = {}
        for path in self.paths:
            self.starts.append(len(self))
            for (line, offset, content), row in read_chunks(path):
                self._spans.extend((line, offset, len(content)))
                columns.update(dict.fromkeys(row))
        self.columns = list(columns)

    def __len__(self) -> int:
        return len(self._spans) // 3

    def where(self, index: int) -> str:
        """Name the file and line of a row."""
        return f"{shorten(self.paths[bisect_right(self.starts, index) - 1])}, line {self._spans[3 * index]}"

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file = bisect_right(self.starts, index) - 1
        line, offset, size = self._spans[3 * index : 3 * index + 3]
        with open_regular(self.paths[file]) as opened:
            opened.seek(offset)
            content = opened.read(size)
        return self.parsers[file]((line, offset, content))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for path in self.paths:
            yield from (row for _, row in read_chunks(path))


def read_chunks(path: Path) -> Iterator[tuple[Chunk, dict[str, Any]]]:
    """Yield the rows of a file with their chunks; skips blank lines.

    Raises:
        ValueError: A line that is not a row, or bytes that are not UTF-8; names file and line.
    """
    suffix = path.suffix.lower()
    parse = PARSERS[suffix](path)
    for chunk in CHUNKS[suffix](path):
        yield chunk, parse(chunk)


def read_rows(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file from row ``start`` on, without a first pass over it."""
    return (row for _, row in islice(read_chunks(path), start, None))


def _lines(path: Path) -> Iterator[Chunk]:
    offset = 0
    with open_regular(path) as file:
        offset = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
    for number, line in enumerate(raw_lines(path), start=1):
        yield number, offset, line
        offset += len(line)


def _json_lines(path: Path) -> Iterator[Chunk]:
    return (chunk for chunk in _lines(path) if chunk[2].strip())


def _json_parser(path: Path) -> Parser:
    return partial(_parse_line, path)


def _parse_line(path: Path, chunk: Chunk) -> dict[str, Any]:
    where = f"{shorten(path)}, line {chunk[0]}"
    return parse_object(decode_line(chunk[2], where), where)


def _csv_chunks(path: Path) -> Iterator[Chunk]:
    """Yield the records of a CSV file after its header; a quoted cell may span lines."""
    taken: list[Chunk] = []

    def feed() -> Iterator[str]:
        for chunk in _lines(path):
            taken.append(chunk)
            yield decode_line(chunk[2], f"{shorten(path)}, line {chunk[0]}")

    header = False
    for _ in _csv_reader(feed(), path, taken):
        line, offset, _ = taken[0]
        content = b"".join(part for _, _, part in taken)
        taken.clear()
        if header and content.strip():
            yield line, offset, content
        header = header or bool(content.strip())


def _csv_reader(lines: Iterator[str], path: Path, taken: Sequence[Chunk] = ()) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_BYTES)  # the default, 131072, is less than many a picture in base64
    try:
        yield from csv.reader(lines, strict=True)
    except csv.Error as error:
        line = taken[0][0] if taken else 1
        raise ValueError(
            f"{shorten(path)}, line {line}: bad CSV ({error}); put cells with commas or quotes in quotes, and double "
            "the quotes inside"
        ) from error


def _csv_parser(path: Path) -> Parser:
    return partial(_parse_record, path, _csv_header(path))


def _parse_record(path: Path, header: Sequence[str], chunk: Chunk) -> dict[str, Any]:
    where = f"{shorten(path)}, line {chunk[0]}"
    lines = io.StringIO(decode_line(chunk[2], where), newline="")
    (cells,) = _csv_reader(iter(lines), path, [chunk])
    if len(cells) != len(header):
        raise ValueError(f"{where}: {len(cells)} cells for {len(header)} columns; put cells with commas in quotes")
    return {name: cell.replace("\r\n", "\n") for name, cell in zip(header, cells, strict=True)}


def _csv_header(path: Path) -> list[str]:
    lines = (decode_line(line, f"{shorten(path)}, line {n}") for n, line in enumerate(raw_lines(path), start=1))
    filled = (cells for cells in _csv_reader(lines, path) if any(cell.strip() for cell in cells) or len(cells) > 1)
    header = [name.strip() for name in next(filled, [])]
    if twice := sorted({name or "without a name" for name in header if header.count(name) > 1}):
        raise ValueError(f"{shorten(path)}: column {some(twice)} given twice; rename one")
    return header


CHUNKS: dict[str, Callable[[Path], Iterator[Chunk]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".csv": _csv_chunks,
}
PARSERS: dict[str, Callable[[Path], Parser]] = {".jsonl": _json_parser, ".json": _json_parser, ".csv": _csv_parser}


def read_json(path: Path) -> Sequence[Mapping[str, Any]] | None:
    """Read a JSON file: a list of objects, or an object of equally long lists; None for JSON lines.

    Raises:
        ValueError: Invalid JSON, another value, or bytes that are not UTF-8.
    """
    lines = [decode_line(line, f"{shorten(path)}, line {n}") for n, line in enumerate(raw_lines(path), start=1)]
    text = "".join(lines)
    if not text.strip():
        return []
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return None
        raise ValueError(
            f"{shorten(path)}, line {error.lineno}: bad JSON ({error.msg}, column {error.colno})"
        ) from error
    except (RecursionError, ValueError) as error:
        detail = "nested too deeply" if isinstance(error, RecursionError) else shorten(error)
        raise ValueError(f"{shorten(path)}: bad JSON ({detail})") from error
    if isinstance(found, dict):
        columns = list(found.values())
        if columns and all(isinstance(cells, list) and len(cells) == len(columns[0]) for cells in columns):
            return [dict(zip(found, cells, strict=True)) for cells in zip(*columns, strict=True)]
        found = [found]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{shorten(path)}: expected a list of objects, got {shorten(text.strip(), 40)}")
    return found
