"""Read images to score from files, folders and tables, one at a time."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from diffalign import media
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.folders import Listing, caption, listed, pictures_below
from diffalign.data.records import Records
from diffalign.data.row import PROMPTS, Row
from diffalign.data.tables import LOADERS, TEXTS, Table, open_table
from diffalign.data.validation import DataWarning
from diffalign.files import bounded, check_inside, printable, shorten, some
from diffalign.remote import address, address_of, local, mapped
from diffalign.rewards.support.images import as_image, from_pil
from diffalign.structures import ImageSource, Prompt

PICTURES = ("image", "jpg_0", "file_name", "file_path")


@dataclass(frozen=True)
class Item:
    """An image to score.

    Attributes:
        name: Unique name.
        load: Decode the image to a tensor.
        prompt: None if no prompt was found.
        content: Size and modification time of a file, or a digest of bytes in a table; changes with the image.
    """

    name: str
    load: Callable[[], Tensor]
    prompt: Prompt | None = None
    content: str = ""

    @property
    def asked(self) -> Prompt:
        """The prompt. Raises ValueError if none was found."""
        if self.prompt is None:
            raise ValueError(f"{self.name} has no prompt: write --prompt TEXT")
        return self.prompt

    def under(self, prompt: Prompt) -> Item:
        """Return the item with another prompt."""
        return replace(self, prompt=prompt)


def read(source: str, image_root: Path | None = None, allow_outside: bool = False) -> Iterator[Item]:
    """Yield the images of a file, folder or table, in order.

    A folder yields every image below it, in natural order, with prompts from a ``metadata.jsonl`` or ``metadata.csv``
    ("file_name", and "prompt", "caption" or "text"; other columns become metadata), or from a ``.txt`` file beside each
    image. A table (.parquet, .arrow, .jsonl, .json, .csv, a saved ``datasets`` folder) has an image ("image",
    "file_name", or Pick-a-Pic's "jpg_0") and a prompt per row. Any other file is one image.

    Args:
        source: File, folder or fsspec address of one.
        image_root: Folder that paths in a table are relative to; default: the folder of the table.
        allow_outside: Read images outside the folder of their table, also through links.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: It has no image, or no known image column.
    """
    source = source if address(source) is None else str(local(source))
    path = Path(source)
    settings = PreferenceDataConfig(image_root=image_root, allow_outside=allow_outside)
    if not os.path.lexists(source):  # unlike Path.exists, False for names that are too long
        raise FileNotFoundError(f"nothing at {shorten(source)}: check the path (relative to {Path.cwd()})")
    saved = path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if saved or (not path.is_dir() and path.suffix.lower() in (*LOADERS, *TEXTS)):
        yield from _table(open_table(path, settings))
    elif path.is_dir():
        yield from _folder(path, settings)
    else:
        yield _file(path, None)


def _folder(path: Path, settings: PreferenceDataConfig) -> Iterator[Item]:
    pictures, listing = pictures_below(path)
    entries = listed(path)
    if entries is not None:
        named = {path / str(entry[key]) for entry in entries for key in PICTURES if entry.get(key)}
        listing.unlisted = [str(file.relative_to(path)) for file in pictures if file not in named]
    elif not pictures:
        raise ValueError(f"{shorten(path)} holds no picture: name a folder with images")
    _warn_unread(listing, path)
    if entries is not None:
        yield from _listed(path, entries, settings)
        return
    stems: dict[Path, Path] = {}
    for file in pictures:
        other = stems.setdefault(file.with_suffix(""), file)
        if other != file and file.with_suffix(".txt").is_file():
            both = f"{shorten(other)} and {shorten(file.name)}"
            raise ValueError(f"{both} share one text, {file.with_suffix('.txt').name}: rename one of the pictures")
    yield from (_file(file, None if settings.allow_outside else path) for file in pictures)


def _warn_unread(listing: Listing, folder: Path) -> None:
    if notes := listing.notes(folder):
        warnings.warn(bounded("\n".join(notes)), DataWarning, stacklevel=3)


def _listed(folder: Path, entries: Records, settings: PreferenceDataConfig) -> Iterator[Item]:
    root = folder if settings.image_root is None else mapped(settings.image_root)
    within = None if settings.allow_outside else (root, folder)
    yield from _table(Table(printable(entries.paths[0]), entries, root, within=within))


def _file(path: Path, within: Path | None) -> Item:
    def load() -> Tensor:
        if within is not None:
            check_inside(path, (within,))
        return as_image(path)

    beside = path.with_suffix(".txt")
    text = caption(beside, within) if beside != path else None
    return Item(
        printable(path), load, None if text is None else Prompt(text), _content(ImageSource(printable(path), path))
    )


def _table(table: Table) -> Iterator[Item]:
    column = next((key for key in PICTURES if key in table.columns), None)
    if column is None:
        columns = some(table.columns, 20, 40)
        raise ValueError(f"{table.name} has no column {' or '.join(PICTURES)} (it has {columns}): rename one")
    for number, row in enumerate(table.rows()):
        chosen = row.first(PICTURES)
        source = row.image(chosen)
        if isinstance(table.data, Records) and row.cell(chosen) is None:
            raise ValueError(f'{table.data.where(number)}: no picture; write {{"image": "FILE", "prompt": "..."}}')
        name = printable(source.content) if isinstance(source.content, Path) else f"{table.name}#{number}"
        yield Item(name, partial(_load, source), _prompt(row, table), _content(source))


def _content(source: ImageSource) -> str:
    try:
        if not isinstance(source.content, Path) or address_of(source.content):
            return hashlib.blake2b(source.read(), digest_size=16).hexdigest()
        found = source.content.stat()
    except media.BROKEN:  # `load` reports the error
        return ""
    return f"{found.st_size}-{found.st_mtime_ns}"


def _load(source: ImageSource) -> Tensor:
    try:
        return from_pil(media.decode(source.read()))
    except media.BROKEN as error:
        raise ValueError(f"{source.name} cannot be read as a picture: {media.reason(error)}") from error


def _prompt(row: Row, table: Table) -> Prompt | None:
    """Return the prompt of a row, with the columns that are not images as metadata; None without a text."""
    column = row.first(PROMPTS)
    if row.values.get(column) is None:
        return None
    used = {*PICTURES, column, "metadata", *table.encoded}
    typeless = isinstance(table.data, Records) and table.data.paths[0].suffix.lower() == ".csv"
    return Prompt(row.text(), row.metadata((name for name in row.values if name not in used), typeless))


def with_prompts(items: Iterator[Item], prompts: Sequence[Prompt]) -> Iterator[Item]:
    """Assign one prompt to all items, or one each in order. Raises ValueError if the numbers differ."""
    if len(prompts) == 1:
        yield from (item.under(prompts[0]) for item in items)
        return
    rest = iter(prompts)
    for number, item in enumerate(items):
        prompt = next(rest, None)
        if prompt is None:
            raise ValueError(
                f"{len(prompts)} prompts for more than {number} images: give one per image, or one for all"
            )
        yield item.under(prompt)
    if next(rest, None) is not None:
        raise ValueError(f"{len(prompts)} prompts are more than images: give one per image, or one for all")
