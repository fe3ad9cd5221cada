"""Where rows come from: files, folders and hub data sets, through the loaders of ``datasets``.

A source is a .parquet, .arrow, .jsonl, .json or .csv file; a folder that ``datasets`` can load or has saved, a folder
of pairs (see ``folders``), or a rollout buffer (see ``RolloutBuffer.save``); or the id of a data set on the hub. Cells
with encoded images are left on disk until somebody reads the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, List, Value

from diffalign.data.folders import folder_rows, read_jsonl
from diffalign.data.quarantine import printable
from diffalign.data.rollouts import rollout_pairs
from diffalign.data.rows import Row
from diffalign.data.settings import PreferenceSettings

LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}
BATCH = 1000  # rows that are read at once where every row is read


class Table:
    """The rows of a source. data: a ``Dataset``, or rows in memory. masks: the column of masks, if they have any."""

    def __init__(
        self, name: str, data: Dataset | Sequence[Mapping[str, Any]], root: Path, masks: str | None = None
    ) -> None:
        self.name, self.data, self.root, self.masks = name, data, root, masks
        features = getattr(data, "features", None) or {}
        self.columns = list(features) or list(dict.fromkeys(key for row in data for key in row))
        _check_masks(name, masks, self.columns)
        self.encoded = [column for column in features if _is_encoded(features[column])]
        plain = [column for column in self.columns if column not in self.encoded]
        # Views cost a while to make, and next to nothing to use.
        self._cells = {column: data.select_columns([column]) for column in self.encoded}
        self._plain = data.select_columns(plain) if self.encoded else data

    def __len__(self) -> int:
        return len(self.data)

    def row(self, number: int) -> Row:
        """One row."""
        return self._row(number, self._plain[number])

    def rows(self) -> Iterator[Row]:
        """Every row, in order."""
        for start in range(0, len(self), BATCH):
            block = self._plain[start : start + BATCH]
            if isinstance(block, Mapping):
                block = [dict(zip(block, cells, strict=True)) for cells in zip(*block.values(), strict=True)]
            yield from (self._row(start + i, values) for i, values in enumerate(block))

    def _cell(self, number: int, column: str) -> Any:
        return self._cells[column][number][column]

    def _row(self, number: int, values: Mapping[str, Any]) -> Row:
        cells = {column: partial(self._cell, number, column) for column in self.encoded}
        return named_row(f"{self.name}, row {number}", str(number), {**values, **cells}, self.root, self.masks)


class Stream:
    """The rows of a source that are read one after the other; shards are its files, in the order of their names."""

    def __init__(self, name: str, data: IterableDataset | Table, root: Path, masks: str | None = None) -> None:
        self.name, self.data, self.root, self.masks = name, data, root, masks
        self.shards = data.num_shards if isinstance(data, IterableDataset) else 1
        self.columns = data.columns if isinstance(data, Table) else data.column_names or list(next(iter(data)))
        _check_masks(name, masks, self.columns)

    def rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        """The rows of a shard, from its row ``start`` on."""
        if isinstance(self.data, Table):
            yield from (self.data.row(number) for number in range(start, len(self.data)))
            return
        part = self.data.shard(num_shards=self.shards, index=shard).skip(start)
        for number, values in enumerate(part, start=start):
            key = f"{shard}/{number}"
            yield named_row(f"{self.name}, shard {shard}, row {number}", key, values, self.root, self.masks)


def named_row(name: str, key: str, values: Mapping[str, Any], root: Path, masks: str | None) -> Row:
    """A row; one with a "name" of its own, as folders and buffers have, is called by it."""
    own = values.get("name") if isinstance(values.get("name"), str) else None
    return Row(f"{name} ({own})" if own else name, key, values, root, masks)


def open_table(source: str | Path, settings: PreferenceSettings) -> Table:
    """The rows of ``source``. FileNotFoundError: nothing there. ValueError: nothing that can be read."""
    data, root = _open(source, settings, streaming=False)
    if isinstance(data, Dataset):
        for column, feature in data.features.items():
            if (raw := _undecoded(feature)) != feature:
                data = data.cast_column(column, raw)
    if not len(data):
        raise ValueError(f"{printable(source)} holds no row: name a data set with at least one")
    return Table(printable(source), data, settings.image_root or root, settings.mask)


def open_stream(source: str | Path, settings: PreferenceSettings) -> Stream:
    """The same rows, read one after the other; folders of pairs and buffers are lists of names, and held in memory."""
    data, root = _open(source, settings, streaming=True)
    if not isinstance(data, IterableDataset):
        table = open_table(source, settings)
        return Stream(table.name, table, table.root, settings.mask)
    return Stream(printable(source), data.decode(False), settings.image_root or root, settings.mask)


def _open(source: str | Path, settings: PreferenceSettings, streaming: bool) -> tuple[Any, Path]:
    path = Path(source)
    if path.is_dir():
        return _folder(path, settings, streaming), path
    if path.is_file():
        if path.suffix.lower() not in LOADERS:
            raise ValueError(f"{printable(path)}: unknown suffix {path.suffix!r}; known: {', '.join(LOADERS)}")
        loaded = _load(
            LOADERS[path.suffix.lower()], data_files={"train": str(path)}, split="train", streaming=streaming
        )
        return loaded, path.parent
    if path.suffix or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise FileNotFoundError(
            f"no preference data at {printable(source)}: check the path (relative to {Path.cwd()}), or name a hub id "
            "such as data-is-better-together/open-image-preferences-v1-binarized"
        )
    options = {"name": settings.subset, "revision": settings.revision}
    return _load(str(source), split=settings.split, streaming=streaming, **options), Path.cwd()


def _folder(path: Path, settings: PreferenceSettings, streaming: bool) -> Any:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if settings.split not in saved:
                raise ValueError(f"{printable(path)} has no split {settings.split!r}; it has {', '.join(saved)}")
            saved = saved[settings.split]
        return saved.to_iterable_dataset() if streaming else saved
    listed = list(read_jsonl(path / "metadata.jsonl")) if (path / "metadata.jsonl").is_file() else []
    if listed and {"group", "rewards", "file_name"} <= set(listed[0]):
        return rollout_pairs(listed, settings.rollouts, printable(path))
    found = folder_rows(path)
    return found or _load(str(path), split=settings.split, streaming=streaming)


def _load(*args: Any, **options: Any) -> Any:
    try:
        return datasets.load_dataset(*args, **options)
    except StopIteration:  # of an empty file of JSON
        raise ValueError(f"{_asked(args, options)} holds no row: name a data set with at least one") from None
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(f"{_asked(args, options)} cannot be read: {error.__cause__ or error}") from error


def _check_masks(name: str, masks: str | None, columns: Sequence[str]) -> None:
    if masks is not None and masks not in columns:
        raise ValueError(f"{name} has no column {masks!r} of masks: name one of {', '.join(columns)} as data.mask")


def _asked(args: Sequence[Any], options: Mapping[str, Any]) -> str:
    return printable(options["data_files"]["train"] if "data_files" in options else args[0])


def _is_encoded(feature: Any) -> bool:
    if isinstance(feature, List):
        return _is_encoded(feature.feature)
    return isinstance(feature, datasets.Image) or (isinstance(feature, Value) and "binary" in feature.dtype)


def _undecoded(feature: Any) -> Any:
    """The feature with images as they are stored."""
    if isinstance(feature, List):
        return replace(feature, feature=_undecoded(feature.feature))
    return replace(feature, decode=False) if isinstance(feature, datasets.Image) else feature
