"""Read prompts of files, of data sets on the hub and of generated sets, with metadata for rewards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.data.prompt_sets import generate, held_out
from diffalign.data.prompt_source import GENERATED, HUB, PromptSource, parse_source
from diffalign.data.records import parse_object, read_chunks
from diffalign.data.row import MAX_PROMPT, PROMPTS, Row, as_metadata, typed, with_source
from diffalign.files import decode_line, open_regular, raw_lines, read_bytes, shorten, some
from diffalign.remote import local
from diffalign.structures import Input, Prompt, without_nulls

TEXT_KEYS = ("prompt", "text")


def load_prompts(source: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read prompts in order; duplicates are kept.

    ``.txt``: a prompt per line. ``.jsonl``: an object per line with "prompt" (or "text"); its other members become
    ``Prompt.metadata``, e.g. GenEval's ``{"tag", "include", "exclude", "prompt"}``; so do the members of a mapping
    "metadata", as in pairs and rollout buffers. Nulls count as absent, as in tables. Files are UTF-8, with or without a
    byte order mark, with any line ends. Blank lines are skipped, and spaces around a prompt are removed. Rows of
    ``.csv``, ``.parquet``, ``.json`` and of data sets on the hub likewise, from "prompt", "caption" or "text".

    Args:
        source: A file, an fsspec address, a hub id, or a set by one word, with options: see ``prompt_source``.
        limit: Largest number of prompts; later ones are not read.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: An unknown suffix, an invalid line, or no prompt.
    """
    if limit is not None and limit < 1:
        raise ValueError(
            f"limit must be at least 1, got {limit}: leave it out to read every prompt of {shorten(source)}"
        )
    asked = prompt_source(source)
    prompts = list(islice(_usable(asked), limit))
    if not prompts:
        raise ValueError(f"{shorten(source)} holds no prompt: write one per line")
    return prompts


def as_prompts(items: Iterable[Prompt | str | Mapping[str, Any]], what: str = "prompts") -> list[Prompt]:
    """Convert prompts in memory: a ``Prompt``, a text, or a row as in files; so any list or ``datasets.Dataset``.

    Raises ValueError, with its index, for an item that is no prompt.
    """
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise ValueError(f"{what}: pass a list of Prompt, texts or rows, got {type(items).__name__}")
    asked, found = PromptSource("", "memory", what), list[Prompt]()
    for index, item in enumerate(items):
        where = f"{what}[{index}]"
        if isinstance(item, Prompt):
            found.append(item)
            continue
        row = {PROMPTS[0]: item} if isinstance(item, str) else item
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: pass a Prompt, a text or a row, got {type(item).__name__}")
        entry = _entry(where, partial(_from_row, row, asked, PROMPTS))
        if isinstance(entry, LineError):
            raise entry
        found.append(entry)
    return found


def count_prompts(source: str | Path | None) -> int:
    """Return the number of prompts, of a hub data set as far as it is known without it, else by reading them."""
    if source is None:
        return 0
    asked = parse_source(source)
    return asked.count if asked.kind == HUB and asked.count is not None else len(load_prompts(source))


def prompt_source(source: str | Path) -> PromptSource:
    """Parse the name of prompts. FileNotFoundError: no such file. ValueError: an unknown suffix, word or option."""
    asked = parse_source(source)
    if asked.path is None:
        return asked
    local(asked.name)
    try:
        open_regular(asked.path).close()
    except FileNotFoundError:
        where = f"no prompt file at {shorten(asked.path)}: check the path (relative to {Path.cwd()})"
        raise FileNotFoundError(where) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{shorten(asked.path)} cannot be read: {reason}") from error
    return asked


def _usable(asked: PromptSource) -> Iterator[Prompt]:
    return islice(_different(asked), asked.limit)


def _different(asked: PromptSource) -> Iterator[Prompt]:
    seen = set[Input]()
    for _, found in read_entries(asked):
        if isinstance(found, LineError):
            raise found
        if found is None or (asked.unique and found.input in seen):
            continue
        seen.add(found.input)
        yield found


class LineError(ValueError):
    """An invalid line of a prompt file. kind: one of ``LINE_ERRORS``; where: file and line."""

    def __init__(self, kind: str, where: str, detail: str) -> None:
        assert kind in LINE_ERRORS, kind
        detail = shorten(detail, 400)
        super().__init__(f"{where}: {detail}")
        self.kind, self.where, self.detail = kind, where, detail


LINE_ERRORS = {
    "not_utf8": "bytes that are not UTF-8",
    "bad_json": "no JSON object",
    "no_prompt": 'an object without "prompt" or "text"',
    "empty_prompt": "a prompt that is empty, or no text",
    "no_metadata": "no column of metadata that was asked for",
    "bad_row": "a row that cannot be read; those after it are not",
    "no_image": "no source image in the column that was asked for",
    "too_long": f"a prompt of more than {MAX_PROMPT:,} characters",
}


Entry = tuple[str, Prompt | LineError | None]


def read_entries(asked: PromptSource) -> Iterator[Entry]:
    """Yield where each line or row is, and its prompt, its error, or None for a blank line.

    Every entry of the source is read; ``limit`` and ``unique`` are for the caller.
    """
    if asked.kind == GENERATED:
        drawn = enumerate(generate(asked.name, asked.split, asked.seed), start=1)
        return ((f"{asked.name}, prompt {n}", Prompt(text, metadata)) for n, (text, metadata) in drawn)
    path = asked.path
    entries = _hub_entries(asked) if path is None else _file_entries(path, asked)
    if asked.held_out is None:
        return entries
    return ((w, e) for w, e in entries if not isinstance(e, Prompt) or held_out(e.text) == asked.held_out)


def _file_entries(path: Path, asked: PromptSource) -> Iterator[Entry]:
    return READERS[path.suffix.lower()](path, asked)


def _hub_entries(asked: PromptSource) -> Iterator[Entry]:
    if not asked.files:
        yield from _table_entries(asked.name, asked)
    for name in asked.files:
        yield from _file_entries(_download(asked, name), asked)


def _download(asked: PromptSource, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    if Path(name).suffix.lower() not in READERS:
        raise ValueError(f"{shorten(asked.text)}: {shorten(name)} must be one of {', '.join(READERS)}")
    try:
        return Path(hf_hub_download(asked.name, name, repo_type="dataset", revision=asked.revision))
    except (OSError, ValueError) as error:  # also of the hub's client
        raise ValueError(
            f"{name} of {asked.name} cannot be read: {shorten(error, 400)}; check name and access"
        ) from error


def _line_entries(parse: Callable[[str, PromptSource], Prompt], path: Path, asked: PromptSource) -> Iterator[Entry]:
    for number, content in enumerate(raw_lines(path), start=1):
        where = f"{shorten(path)}, line {number}"
        try:
            line = decode_line(content, where).strip()
        except ValueError as error:
            yield where, LineError("not_utf8", where, str(error).removeprefix(f"{where}: "))
            continue
        yield where, _entry(where, partial(parse, line, asked)) if line else None


def _csv_entries(path: Path, asked: PromptSource) -> Iterator[Entry]:
    try:
        for (line, _, _), row in read_chunks(path):
            where, cells = f"{shorten(path)}, line {line}", {name: _cell(name, row[name], asked) for name in row}
            yield where, _entry(where, partial(_from_row, cells, asked, PROMPTS))
    except ValueError as error:  # names file and line
        yield shorten(path), _row_error(shorten(path), error)


def _cell(name: str, cell: str, asked: PromptSource) -> Any:
    return cell if name in ((asked.column,) if asked.column else PROMPTS) else typed(cell)


def _json_entries(path: Path, asked: PromptSource) -> Iterator[Entry]:
    try:
        rows = json.loads(read_bytes(path).decode("utf-8-sig"))
        if not isinstance(rows, list):
            raise ValueError("expected a list of texts or of objects; rename JSON lines to .jsonl")
    except (ValueError, RecursionError) as error:
        yield shorten(path), _row_error(shorten(path), error)
        return
    for number, row in enumerate(rows):
        where = f"{shorten(path)}, row {number}"
        cells = row if isinstance(row, dict) else {asked.column or PROMPTS[0]: row}
        yield where, _entry(where, partial(_from_row, cells, asked, PROMPTS))


def _table_entries(source: str | Path, asked: PromptSource) -> Iterator[Entry]:
    from diffalign.data.config import PreferenceDataConfig
    from diffalign.data.tables import open_stream, open_table

    settings = PreferenceDataConfig(split=asked.split, subset=asked.subset, revision=asked.revision)
    if asked.streaming:
        stream = open_stream(source, settings)
        rows: Iterator[Row] = (row for shard in range(stream.shards) for row in stream.rows(shard))
    else:
        rows = open_table(source, settings).rows()
    for row in rows:
        yield row.name, _entry(row.name, partial(_from_row, row.values, asked, PROMPTS))


def _entry(where: str, parse: Callable[[], Prompt]) -> Prompt | LineError:
    try:
        return _checked(parse())
    except _Unusable as error:
        return LineError(error.kind, where, str(error))


def _row_error(where: str, error: Exception) -> LineError:
    return LineError("bad_row", where, str(error).removeprefix(where).lstrip(":, "))


def _checked(prompt: Prompt) -> Prompt:
    if len(prompt.text) > MAX_PROMPT:
        detail = f"{len(prompt.text):,} characters, more than {MAX_PROMPT:,}; text encoders read a few thousand"
        raise _Unusable("too_long", f"{detail}: {shorten(prompt.text, 60)}; shorten it")
    return prompt


class _Unusable(ValueError):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def _parse_text(line: str, asked: PromptSource) -> Prompt:
    return Prompt(line)


def _parse_json(line: str, asked: PromptSource) -> Prompt:
    try:
        entry = parse_object(line, "")
    except ValueError as error:
        raise _Unusable("bad_json", str(error).removeprefix(": ")) from error
    return _from_row(entry, asked, TEXT_KEYS)


def _from_row(row: Mapping[str, Any], asked: PromptSource, keys: tuple[str, ...]) -> Prompt:
    """Make a prompt of the first of ``keys`` in a row, or of the column asked for, and metadata of the rest."""
    entry, keys = dict(row), (asked.column,) if asked.column else keys
    key = next((key for key in keys if key in entry), None)
    if key is None:
        add = f'add "{keys[0]}": "..."' + ("" if asked.column else ", or name the column: SOURCE?column=NAME")
        raise _Unusable("no_prompt", f'no "{keys[0]}" among {some(entry, 10, 40) or "no keys"}; {add}')
    text = entry.pop(key)
    if not isinstance(text, str) or not text.strip():
        detail = f'"{key}" must be a text that is not empty, got {shorten(repr(text), 60)}; fill it or delete the line'
        raise _Unusable("empty_prompt", detail)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _Unusable("bad_json", f'"{key}" holds half of a surrogate pair; write the letter itself')
    if asked.metadata is not None:
        if absent := [name for name in asked.metadata if name not in entry]:
            raise _Unusable("no_metadata", f"no {some(absent)} among {some(entry, 10, 40)}; name others as metadata")
        entry = {name: entry[name] for name in asked.metadata}
    source = _source_image(entry, asked)
    entry = {name: value for name, value in entry.items() if not _is_image(value)}
    nested = entry.get("metadata")
    nested = _nested(entry.pop("metadata")) if isinstance(nested, dict) or str(nested).lstrip().startswith("{") else {}
    nested = with_source(nested, Path() if asked.path is None else asked.path.parent)
    return Prompt(text.strip(), {**without_nulls(entry), **nested, **source})


def _source_image(entry: dict[str, Any], asked: PromptSource) -> dict[str, str]:
    """Remove the source image of a row that names one; return its path as metadata.

    A relative path starts from the folder of the prompt file. Encoded images are written to the cache.
    """
    column = asked.image or "image"
    value = entry.get(column)
    if asked.image is None and not isinstance(value, str):
        return {}  # data sets of captions have images too, which are not read unasked
    if column not in entry:
        raise _Unusable("no_image", f"no {column!r} among {some(entry, 10, 40)}; name another column: image=NAME")
    root = Path() if asked.path is None else asked.path.parent
    # Files may lie anywhere. Of addresses, those in the folder of the prompts: a table must not choose what is fetched.
    row = Row("", "", entry, root, within=(root,) if isinstance(value, str) and "://" in value else None)
    try:
        path = row.source_image(column)
    except (OSError, ValueError) as error:
        if asked.image is None:  # a text that names no file is metadata like others
            return {}
        raise _Unusable("no_image", f"{column}: {shorten(error, 300)}") from error
    del entry[column]
    return {"image": str(path)}


def _is_image(value: Any) -> bool:
    """Return whether a cell holds an encoded image, or is read on demand, as images are."""
    return callable(value) or isinstance(value, bytes) or (isinstance(value, Mapping) and "bytes" in value)


def _nested(value: Any) -> dict[str, Any]:
    try:
        return as_metadata(value)
    except ValueError as error:
        raise _Unusable("bad_json", f'"metadata": {error}') from error


Reader = Callable[[Path, PromptSource], Iterator[Entry]]
READERS: dict[str, Reader] = {
    ".txt": partial(_line_entries, _parse_text),
    ".jsonl": partial(_line_entries, _parse_json),
    ".csv": _csv_entries,
    ".json": _json_entries,
    ".parquet": _table_entries,
}
