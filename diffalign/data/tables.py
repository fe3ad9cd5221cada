"""Open the rows of files, folders and hub data sets.

A source is a path or an fsspec address (see ``remote``): of a .parquet, .arrow, .jsonl, .json or .csv file; of a folder
that ``datasets`` can load or has saved, a folder of pairs (see ``folders``), a folder with pictures and a
``metadata.jsonl``, or a rollout buffer (see ``RolloutBuffer.save``). Or it is the id of a data set on the hub. Text
files are read as written (see ``records``), the others by ``datasets``. Encoded images stay on disk until an image is
read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.data.config import PreferenceDataConfig
from diffalign.data.folders import Listing, folder_rows, listed, pictures_below
from diffalign.data.letterbox import bars_on_terminals
from diffalign.data.records import Records, read_json, read_rows
from diffalign.data.rollouts import rollout_pairs
from diffalign.data.row import Row, columns_of, named_row
from diffalign.data.validation import printable
from diffalign.files import open_regular, shorten, some
from diffalign.remote import address, local, mapped

LOADERS = {".parquet": "parquet", ".arrow": "arrow"}
TEXTS = (".jsonl", ".json", ".csv")
IN_MEMORY = "data set in memory"
BATCH = 1000  # rows per read when iterating over a table
PROBED = 100  # rows from which the columns of a stream are inferred


@dataclass(frozen=True)
class Opened:
    """An opened source.

    Attributes:
        data: Its rows; None if they are those of ``files``.
        root: Folder that relative image paths start from.
        inside: Folders besides ``root`` that may contain its image files.
        notes: A line per kind of file in a folder that is not read.
        files: Text files that hold the rows.
        local: False for a hub data set, whose paths must not lead to files in the working folder.
    """

    data: Any
    root: Path
    inside: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    local: bool = True

    def within(self, settings: PreferenceDataConfig) -> tuple[Path, ...] | None:
        """List the folders that may contain image files; None allows any."""
        if settings.allow_outside:
            return None
        asked = () if settings.image_root is None else (mapped(settings.image_root),)
        return (*asked, *((self.root,) if self.local else ()), *self.inside)


class Table:
    """Rows of a source with random access.

    Args:
        name: Source, for messages.
        data: A ``Dataset``, or rows in memory.
        root: Folder that relative image paths start from.
        masks: Column of masks; None if masks are not used.
        within: Folders that may contain image files; None allows any.
        notes: A line per kind of file in a folder that is not read.
        sources: Column of the source images of edits; None: "metadata" names them.
    """

    def __init__(
        self,
        name: str,
        data: Any,
        root: Path,
        masks: str | None = None,
        within: tuple[Path, ...] | None = None,
        notes: Sequence[str] = (),
        sources: str | None = None,
    ) -> None:
        self.name, self.data, self.root, self.masks, self.within = shorten(name), data, root, masks, within
        self.notes, self.sources = tuple(notes), sources
        features = getattr(data, "features", None) or {}
        self.columns = list(features) or (data.columns if isinstance(data, Records) else columns_of(data))
        _check_column(self.name, "mask", masks, self.columns)
        _check_column(self.name, "source", sources, self.columns)
        self.encoded = [column for column in features if _is_encoded(features[column])]
        plain = [column for column in self.columns if column not in self.encoded]
        # Views cost a while to make, and next to nothing to use.
        self._cells: dict[str, Any] = {}
        self._plain: Any = data
        if _is("Dataset", data) and self.encoded:
            self._cells = {column: data.select_columns([column]) for column in self.encoded}
            self._plain = data.select_columns(plain)

    def __len__(self) -> int:
        return len(self.data)

    def row(self, number: int) -> Row:
        """Read one row."""
        return self._row(number, self._plain[number])

    def rows(self) -> Iterator[Row]:
        """Yield every row in order."""
        return (self._row(number, values) for number, values in enumerate(self._values()))

    def _values(self) -> Iterator[Mapping[str, Any]]:
        if not _is("Dataset", self._plain):
            yield from self._plain
            return
        for start in range(0, len(self), BATCH):
            block = self._plain[start : start + BATCH]
            if not block:  # every column is encoded
                block = {"": [None] * (min(start + BATCH, len(self)) - start)}
            yield from (dict(zip(block, cells, strict=True)) for cells in zip(*block.values(), strict=True))

    def _cell(self, number: int, column: str) -> Any:
        return self._cells[column][number][column]

    def _row(self, number: int, values: Mapping[str, Any]) -> Row:
        cells = {column: partial(self._cell, number, column) for column in self.encoded}
        name = f"{self.name}, row {number}"
        return named_row(name, str(number), {**values, **cells}, self.root, self.masks, self.within, self.sources)


class Stream:
    """Rows of a source that are read in order; its shards are its files, sorted by name.

    data: an ``IterableDataset``, a table in memory, or text files. Other arguments as for ``Table``.
    """

    def __init__(
        self,
        name: str,
        data: Any,
        root: Path,
        masks: str | None = None,
        within: tuple[Path, ...] | None = None,
        notes: Sequence[str] = (),
        sources: str | None = None,
    ) -> None:
        self.name, self.data, self.root, self.masks, self.within = shorten(name), data, root, masks, within
        self.notes, self.sources = tuple(notes), sources
        if isinstance(data, Table):
            self.shards, self.columns = 1, data.columns
        elif _is("IterableDataset", data):
            self.shards = data.num_shards
            self.columns = data.column_names or columns_of(islice(data, PROBED))
        else:
            self.shards = len(data)
            self.columns = columns_of(row for path in data for row in islice(read_rows(path), PROBED))
        if not self.columns:
            raise ValueError(f"{self.name} holds no row: name a data set with at least one")
        _check_column(self.name, "mask", masks, self.columns)
        _check_column(self.name, "source", sources, self.columns)

    def rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        """Yield the rows of a shard from row ``start`` on."""
        if isinstance(self.data, Table):
            yield from (self.data.row(number) for number in range(start, len(self.data)))
            return
        if _is("IterableDataset", self.data):
            part = self.data.shard(num_shards=self.shards, index=shard).skip(start)
        else:
            part = read_rows(self.data[shard], start)
        for number, values in enumerate(part, start=start):
            name, key = f"{self.name}, shard {shard}, row {number}", f"{shard}/{number}"
            yield named_row(name, key, values, self.root, self.masks, self.within, self.sources)


def open_table(source: Any, settings: PreferenceDataConfig) -> Table:
    """Open the rows of ``source``. FileNotFoundError: it does not exist. ValueError: unreadable, or without rows.

    Paths in a ``Dataset`` in memory may, like those of the hub, lead to no file of the working folder.
    """
    if _is("Dataset", source):
        opened = Opened(source, Path.cwd(), _caches(), local=False)
        source = IN_MEMORY
    else:
        source = _found(source)
        opened = _open(source, settings, streaming=False)
    data: Any = Records(opened.files) if opened.files and opened.data is None else opened.data
    if _is("Dataset", data):
        for column, feature in data.features.items():
            if (raw := _undecoded(feature)) != feature:
                data = data.cast_column(column, raw)
    if not len(data):
        raise ValueError(f"{shorten(source)} holds no row: name a data set with at least one")
    root = opened.root if settings.image_root is None else mapped(settings.image_root)
    within, notes = opened.within(settings), opened.notes
    return Table(printable(Path(source)), data, root, settings.mask, within, notes, settings.source)


def open_stream(source: str | Path, settings: PreferenceDataConfig) -> Stream:
    """Open ``source`` as a stream; folders of pairs and buffers are lists of names, which are held in memory."""
    source = _found(source)
    opened = _open(source, settings, streaming=True)
    root = opened.root if settings.image_root is None else mapped(settings.image_root)
    within = opened.within(settings)
    data = opened.data.decode(False) if _is("IterableDataset", opened.data) else opened.files
    if not data:
        data = open_table(source, settings)
    return Stream(printable(Path(source)), data, root, settings.mask, within, opened.notes, settings.source)


def _found(source: str | Path) -> str | Path:
    """Return a source, an address as the path of its current copy."""
    return source if address(source) is None else local(source)


def _open(source: str | Path, settings: PreferenceDataConfig, streaming: bool) -> Opened:
    path = Path(source)
    if os.path.isdir(source):
        return _folder(path, settings, streaming)
    if os.path.lexists(source):
        return _file(path, streaming)
    if path.suffix or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise FileNotFoundError(
            f"no preference data at {shorten(source)}: check the path (relative to {Path.cwd()}), or name a hub id "
            "such as data-is-better-together/open-image-preferences-v1-binarized"
        )
    options = {"name": settings.subset, "revision": settings.revision}
    loaded = _load(str(source), split=settings.split, streaming=streaming, **options)
    return Opened(loaded, Path.cwd(), _caches(), local=False)


def _file(path: Path, streaming: bool) -> Opened:
    suffix = path.suffix.lower()
    if suffix not in (*LOADERS, *TEXTS):
        known = ", ".join((*LOADERS, *TEXTS))
        raise ValueError(f"{shorten(path)}: unknown suffix {shorten(path.suffix, 40)!r}; known: {known}")
    try:
        open_regular(path).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"{shorten(path)} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if suffix in TEXTS:
        rows = read_json(path) if suffix == ".json" else None
        return Opened(rows, path.parent, files=(path,) if rows is None else ())
    loaded = _load(LOADERS[suffix], data_files={"train": str(path)}, split="train", streaming=streaming)
    return Opened(loaded, path.parent)


def _folder(path: Path, settings: PreferenceDataConfig, streaming: bool) -> Opened:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        from datasets import load_from_disk

        saved = load_from_disk(str(path))
        if _is("DatasetDict", saved):
            if settings.split not in saved:
                raise ValueError(f"{shorten(path)} has no split {settings.split!r}; it has {some(saved, 20)}")
            saved = saved[settings.split]
        return Opened(saved.to_iterable_dataset() if streaming else saved, path)
    entries = listed(path)
    if entries and {"group", "rewards", "file_name"} <= set(entries.columns):
        return Opened(rollout_pairs(entries, settings.rollouts, shorten(path)), path)
    if (found := folder_rows(path, settings.allow_outside)) is not None:
        return Opened(found[0], path, notes=tuple(found[1]))
    for folder in (path, path / settings.split):
        if folder.is_dir() and (entries := listed(folder)) is not None:
            return _pictures(folder, entries)
    return _loadable(path, settings, streaming)


def _pictures(folder: Path, entries: Records) -> Opened:
    """Open a folder of images with a metadata line each, in ``datasets``' layout: X_file_name is the image X."""
    rows: list[dict[str, Any]] = []
    named: set[Path] = set()
    for entry in entries:
        files = {key: value for key, value in entry.items() if key.endswith("file_name") and isinstance(value, str)}
        named |= {folder / value for value in files.values()}
        renamed = {key: key.removesuffix("_file_name") or key for key in entry}
        rows.append({renamed[key]: value for key, value in entry.items()})
    pictures, listing = pictures_below(folder)
    unlisted = [str(path.relative_to(folder)) for path in pictures if path not in named]
    notes = Listing(listing.hidden, listing.strange, unlisted).notes(folder)
    return Opened(rows, folder, notes=tuple(notes))


def _loadable(path: Path, settings: PreferenceDataConfig, streaming: bool) -> Opened:
    """Open a folder whose files ``datasets`` finds; text files are read by ``records``, as written."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(path))
    except (datasets.exceptions.DatasetNotFoundError, OSError, ValueError) as error:
        raise ValueError(f"{shorten(path)} cannot be read: {shorten(error, 400)}") from error
    files = [Path(str(name)) for name in (builder.config.data_files or {}).get(settings.split, ())]
    folders = {file.parent for file in files}
    root = folders.pop() if len(folders) == 1 and builder.name in ("parquet", "json", "csv", "arrow") else path
    if files and builder.name in ("json", "csv") and all(file.suffix.lower() in TEXTS for file in files):
        rows = [read_json(file) for file in files if file.suffix.lower() == ".json"]
        if not rows:
            return Opened(None, root, (path,), files=tuple(files))
        if len(rows) == len(files) and all(part is not None for part in rows):
            return Opened([row for part in rows if part is not None for row in part], root, (path,))
    return Opened(_load(str(path), split=settings.split, streaming=streaming), root, (path, *_caches()))


def _caches() -> tuple[Path, ...]:
    """List the folders of downloaded and extracted files of ``datasets``."""
    import datasets
    import huggingface_hub.constants

    folders = (
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        datasets.config.EXTRACTED_DATASETS_PATH,
        huggingface_hub.constants.HF_HUB_CACHE,
    )
    return tuple(Path(folder) for folder in folders)


@bars_on_terminals()
def _load(*args: Any, **options: Any) -> Any:
    import datasets

    try:
        loaded = datasets.load_dataset(*args, **options)
        if getattr(getattr(loaded, "info", None), "builder_name", None) == "csv":
            # By default pandas reads captions such as None, NA and null as missing, and 007 as 7.
            loaded = datasets.load_dataset(*args, **options, keep_default_na=False, dtype=str)
        return loaded
    except StopIteration:  # of an empty file
        raise ValueError(f"{_asked(args, options)} holds no row: name a data set with at least one") from None
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(f"{_asked(args, options)} cannot be read: {shorten(error.__cause__ or error, 400)}") from error


def _check_column(name: str, option: str, column: str | None, columns: Sequence[str]) -> None:
    if column is not None and column not in columns:
        raise ValueError(
            f"{name} has no column {column!r} of {option}s: name one of {some(columns, 30, 40)} as data.{option}"
        )


def _asked(args: Sequence[Any], options: Mapping[str, Any]) -> str:
    return shorten(options["data_files"]["train"] if "data_files" in options else args[0])


def _is(kind: str, data: Any) -> bool:
    """Check the class of ``data`` by its name in ``datasets``, without importing the library."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(data, getattr(library, kind))


def _is_encoded(feature: Any) -> bool:
    if _is("List", feature):
        return _is_encoded(feature.feature)
    return _is("Image", feature) or (_is("Value", feature) and "binary" in feature.dtype)


def _undecoded(feature: Any) -> Any:
    """Return the feature with image decoding turned off."""
    if _is("List", feature):
        return replace(feature, feature=_undecoded(feature.feature))
    return replace(feature, decode=False) if _is("Image", feature) else feature
