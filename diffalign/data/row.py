"""A row of a table: read cells as texts, numbers and images, with errors that name row and column."""

from __future__ import annotations

import base64
import binascii
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffalign import media
from diffalign.data.records import parse_json
from diffalign.data.stored_images import stored_image
from diffalign.data.validation import SampleError
from diffalign.files import check_inside, open_regular, printable, shorten
from diffalign.remote import RemoteError, address, address_of, copy_path, ensure
from diffalign.structures import ImageSource, Prompt, without_nulls

PROMPTS = ("prompt", "caption", "text")
EXPORTED_SOURCE = "jpg_source"  # column of source images in tables of diffalign label
MAX_PROMPT = 100_000  # characters; text encoders read at most a few thousand
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s_-]{40,}={0,2}\s*")
# First bytes of image files, in base64.
_IMAGE_STARTS = (
    "iVBORw0KGgo",
    "/9j/",
    "R0lGOD",
    "UklGR",
    "Qk",
    "SUkq",
    "TU0AK",
    "AAAAIGZ0eX",
    "AAAAHGZ0eX",
    "AAAADGpQ",
)


def as_text(value: Any) -> str:
    """Convert a cell to stripped text: numbers as written, null and NaN as the empty string.

    Raises:
        ValueError: A list, mapping or boolean, text longer than ``MAX_PROMPT``, or half of a surrogate pair.
    """
    if isinstance(value, bytes):
        value = value.decode()
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{shorten(repr(value), 60)} is no text")
    text = str(value).strip()
    if len(text) > MAX_PROMPT:
        raise ValueError(f"a text of {len(text):,} characters, more than {MAX_PROMPT:,}: {shorten(text, 60)}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("a text with half of a surrogate pair; write the letter itself")
    return text


def as_metadata(value: Any) -> dict[str, Any]:
    """Convert a cell, a mapping or JSON of one, to metadata, without the nulls that tables write for absent members.

    Raises:
        ValueError: The cell is neither.
    """
    if isinstance(value, str):
        text = value.strip()
        try:
            value = parse_json(text, shorten(text, 60)) if text else None
        except ValueError as error:
            raise ValueError(f"{error}; write it with json.dumps") from error
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, tuple) and len(x) == 2 for x in value):
        value = dict(value)  # a map of Arrow
    if value is None or value != value:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{shorten(repr(value), 60)} is not a mapping of names to values")
    found: dict[str, Any] = without_nulls(value)
    return found


def with_source(metadata: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Make the path of a source image ("image") absolute; a relative one starts from ``root``.

    A value that names no file there stays: other data have metadata of this name too.
    """
    value = metadata.get("image")
    if not isinstance(value, str) or not value.strip() or not _is_path(value) or not _is_file(root, value):
        return dict(metadata)
    return {**metadata, "image": os.path.abspath(root / value)}


def _is_file(root: Path, value: str) -> bool:
    """Return whether a file is there; one of a store is downloaded."""
    if address_of(root) is not None:
        if ".." in Path(value).parts:
            return False
        try:
            ensure(root / value)
        except RemoteError:
            return False
    return os.path.isfile(root / value)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: Source and row number, for messages.
        key: The row number as text.
        values: Cell by column; a callable cell is called when its image is read.
        root: Folder that relative image paths start from.
        masks: Column of masks; None if masks are not used.
        within: Folders that must contain the image files; None allows any.
        sources: Column of the source images of edits; None: ``EXPORTED_SOURCE``, or "metadata" names them.
    """

    name: str
    key: str
    values: Mapping[str, Any] = field(repr=False)
    root: Path = Path()
    masks: str | None = None
    within: tuple[Path, ...] | None = None
    sources: str | None = None

    def first(self, columns: Sequence[str]) -> str:
        """Return the first of ``columns`` with a value, else the first that exists."""
        there = [column for column in columns if column in self.values]
        filled = (column for column in there if self.values[column] is not None and self.values[column] != "")
        return next(filled, (there or columns)[0])

    def cell(self, column: str) -> Any:
        """Return the value in ``column``, or None; parses a JSON list in a text cell."""
        value = self.values.get(column)
        if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
            try:
                return parse_json(value, column)
            except ValueError:
                return value
        return None if isinstance(value, str) and not value.strip() else value

    def flag(self, column: str) -> bool | None:
        """Read a boolean, also from the text of a CSV file; None for anything else."""
        value = self.values.get(column)
        text = str(value).strip().lower()
        return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(text)

    def error(self, kind: str, column: str, detail: str) -> SampleError:
        """Make an error that names this row and a column."""
        return SampleError(kind, f"{self.name}, {column}", detail)

    def text(self, columns: Sequence[str] = PROMPTS) -> str:
        """Read the text of the first of ``columns`` with a value, else "". Raises SampleError "bad_row"."""
        column = self.first(columns)
        value = self.values.get(column)
        try:
            return as_text(value() if callable(value) else value)
        except ValueError as error:
            raise self.error("bad_row", column, str(error)) from error

    def prompt(self) -> Prompt:
        """Read the text ("prompt", "caption" or "text"; may be empty) and the mapping in "metadata".

        Raises:
            SampleError: "bad_row": the text is not text, or the metadata are not a mapping.
        """
        return Prompt(self.text(), self.metadata())

    def metadata(self, others: Iterable[str] = (), typeless: bool = False) -> dict[str, Any]:
        """Read the mapping in "metadata", completed by the cells of ``others``.

        Its "image", the source image of an edit, starts from ``root`` as other paths of a row do, or is that in the
        column ``sources`` or ``EXPORTED_SOURCE``.

        Args:
            others: Further columns; "metadata" takes precedence.
            typeless: Cells are texts, as in CSV: empty ones are absent, and JSON lists and mappings are parsed.

        Raises:
            SampleError: "bad_row": "metadata" is not a mapping, the source is missing or no image, or an "image" in
                "metadata" lies outside ``within``.
        """
        value = self.values.get("metadata")
        try:
            own = with_source(as_metadata(value() if callable(value) else value), self.root)
        except ValueError as error:
            raise self.error("bad_row", "metadata", str(error)) from error
        self._check_source(own)
        cells = {name: self.values[name] for name in others}
        beside: dict[str, Any] = without_nulls({n: typed(cell) for n, cell in cells.items()} if typeless else cells)
        return {**beside, **own, **self._source()}

    def _source(self) -> dict[str, str]:
        column = self.sources or EXPORTED_SOURCE
        if self.sources is None and column not in self.values:
            return {}
        try:
            content = self._content(column)
            if content is None and self.sources is None:
                return {}
            return {"image": str(self._file(content))}
        except media.BROKEN as error:
            raise self.error("bad_row", column, media.reason(error)) from error

    def source_image(self, column: str) -> Path:
        """Return the absolute path of the image in ``column``; an encoded one is written to the cache.

        OSError or ValueError: there is none, it cannot be read, or it lies outside ``within``.
        """
        return self._file(self._content(column))

    def _content(self, column: str) -> Path | bytes | None:
        found = self.image(column)
        return found.content() if callable(found.content) else found.content

    def _file(self, content: Path | bytes | None) -> Path:
        if content is None:
            raise ValueError("no image; fill it or delete the line")
        if not isinstance(content, Path):
            return stored_image(content)
        if self.within is not None:
            check_inside(content, self.within)
        open_regular(content).close()
        return content.absolute()

    def _check_source(self, metadata: Mapping[str, Any]) -> None:
        """Hold the source image in metadata to the folders that may contain the row's images."""
        image = metadata.get("image")
        if self.within is None or not isinstance(image, str) or not os.path.isabs(image) or not os.path.isfile(image):
            return
        try:
            check_inside(Path(image), self.within)
        except ValueError as error:
            raise self.error("bad_row", "image in metadata", str(error)) from error

    def image(self, column: str, identity: Any = None, index: int | None = None) -> ImageSource:
        """Return the image in ``column`` without reading it.

        A cell holds encoded bytes, base64, a path, the mapping of both that ``datasets`` writes, or a list of these.

        Args:
            column: The column.
            identity: Equal for equal images, if the data name their images.
            index: Index within a list.
        """
        cell = self.cell(column)
        name = f"{self.name}, {column}" + ("" if index is None else f"[{index}]")
        label = None if identity is None else str(identity)
        value = cell if callable(cell) else _pick(cell, index)
        if (path := self._path(value)) is not None:
            return ImageSource(shorten(printable(path)), path, label or str(path), self.within)
        return ImageSource(name, partial(self._fetch, value, index), label, self.within)

    def mask(self) -> ImageSource | None:
        """Return the mask of the row's images; None if masks are not used."""
        return None if self.masks is None else self.image(self.masks)

    def _fetch(self, value: Any, index: int | None) -> bytes | Path | None:
        value = _pick(value(), index) if callable(value) else value
        path = self._path(value)
        return _content(value) if path is None else path

    def _path(self, value: Any) -> Path | None:
        """Resolve the path in a cell, of an address that of its copy; None if it holds something else."""
        if isinstance(value, str) and (found := self._address(value)) is not None:
            return found
        if isinstance(value, Path) or (isinstance(value, str) and value.strip() and _is_path(value)):
            return self.root / value
        return None

    def _address(self, value: str) -> Path | None:
        """Return the copy of an address in the folder of the data; None for anything else."""
        if not _URL.match(value) or len(value) > 4096:
            return None
        try:
            if (found := address(value)) is None:
                return None
            path = copy_path(found)
            check_inside(path, (path.parent,) if self.within is None else self.within)
        except ValueError:  # a table does not choose what is downloaded: ``_content`` refuses it
            return None
        return path

    def number(self, column: str) -> float | None:
        """Read a number; None for an empty cell or NaN. Raises SampleError "bad_label" for anything else."""
        value = self.cell(column)
        try:
            found = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise self.error("bad_label", column, f"{shorten(repr(value), 60)} is not a number") from None
        return None if math.isnan(found) else found

    def choice(self, column: str, choices: Sequence[float]) -> float:
        """Read a number that is one of ``choices``. Raises SampleError "bad_label"."""
        value = self.number(column)
        if value is None or value not in choices:
            raise self.error("bad_label", column, f"{value} is not one of {', '.join(f'{c:g}' for c in choices)}")
        return value

    def probability(self, column: str) -> float | None:
        """Read a number in [0, 1]; None for an empty cell. Raises SampleError "bad_label"."""
        value = self.number(column)
        if value is not None and not 0 <= value <= 1:
            raise self.error("bad_label", column, f"{value} is not in [0, 1]")
        return value


def typed(cell: str) -> Any:
    """Parse a CSV cell: None if blank, a JSON list or mapping, or its text."""
    if not cell.strip():
        return None
    if not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return parse_json(cell, "cell")
    except ValueError:
        return cell


def _pick(cell: Any, index: int | None) -> Any:
    """Select one value of a cell: by index from a list, or bytes or path from the mapping of ``datasets``."""
    if isinstance(cell, (list, tuple)) and (index is not None or len(cell) == 1):
        return _pick(cell[index or 0], None) if cell and (index or 0) < len(cell) else None
    if isinstance(cell, Mapping) and {"bytes", "path"} & set(cell):
        return cell.get("bytes") or cell.get("path")
    return cell


def _is_path(text: str) -> bool:
    if _URL.match(text) or text.startswith("data:") or "\0" in text or len(text) > 4096:
        return False
    # Truncated base64 is not a path either; that of a JPEG begins with a slash.
    damaged = len(text) > 255 and text.startswith(_IMAGE_STARTS) and "." not in text
    return not damaged and not _is_base64(text)


def _is_base64(text: str) -> bool:
    return text.lstrip().startswith(_IMAGE_STARTS) and _BASE64.fullmatch(text) is not None


def _content(value: Any) -> bytes | None:
    """Return the encoded image in a cell. Raises ValueError, in few words, if it holds none."""
    if value is None or value == "":
        return None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (list, tuple)):
        raise ValueError(f"a list of {len(value)} images where one belongs")
    if not isinstance(value, str):
        raise ValueError(f"{shorten(repr(value), 60)} is neither a path nor the content of an image file")
    if match := _DATA_URL.match(value[:300]):
        return _from_base64(value[match.end() :])
    if _URL.match(value):
        raise ValueError(
            f"{shorten(value.partition('?')[0], 80)} is an address, and nothing is fetched: download it, name its file "
            "(of addresses, only those below the folder of the data or image_root are read)"
        )
    if "\0" in value or not _is_base64(value):
        raise ValueError(f"a text of {len(value):,} characters is neither a path nor an image in base64")
    return _from_base64(value)


def _from_base64(text: str) -> bytes:
    packed = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"bad base64 ({error}) in a text of {len(text):,} characters") from error


def named_row(
    name: str,
    key: str,
    values: Mapping[str, Any],
    root: Path,
    masks: str | None,
    within: tuple[Path, ...] | None = None,
    sources: str | None = None,
) -> Row:
    """Make a row; a cell "name", as in folders and rollout buffers, is added to its name."""
    own = values.get("name") if isinstance(values.get("name"), str) else None
    return Row(f"{name} ({shorten(own, 80)})" if own else name, key, values, root, masks, within, sources)


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """List the columns of rows in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))
