"""Open a local Parquet file as it is, without ``datasets``: nothing is copied to a cache, and opening takes no second.

Training reads rows in any order for hours, for which the memory-mapped copy that ``datasets`` makes is the right thing.
A person looks at one pair at a time: here the text columns are read at once, and an image when it is shown.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from diffalign.files import shorten

MAX_GROUP = 1 << 28  # bytes of a row group, which is decoded to read one of its images


def parquet_rows(path: Path) -> list[dict[str, Any]] | None:
    """Read the rows of a Parquet file; cells with images are functions that read them.

    Returns:
        The rows, or None if its row groups are too large to decode one for an image.

    Raises:
        ValueError: It is no Parquet file.
    """
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path, memory_map=True)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if any(group.total_byte_size > MAX_GROUP for group in groups):
            return None
        encoded = [field.name for field in file.schema_arrow if _holds_images(field.type)]
        texts = [name for name in file.schema_arrow.names if name not in encoded]
        rows: list[dict[str, Any]] = file.read(columns=texts).to_pylist() if texts else []
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{shorten(path)} cannot be read: {shorten(error, 400)}") from error
    cells = Cells(file, [group.num_rows for group in groups])
    rows = rows or [{} for _ in range(file.metadata.num_rows)]
    for number, row in enumerate(rows):
        row.update({name: partial(cells.read, number, name) for name in encoded})
    return rows


class Cells:
    """Cells of the columns with images; the last row group of each column stays in memory."""

    def __init__(self, file: Any, sizes: list[int]) -> None:
        self.file, self.starts = file, [0, *accumulate(sizes)]
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[int, Any]] = {}

    def read(self, row: int, column: str) -> Any:
        """Read one cell."""
        group = bisect_right(self.starts, row) - 1
        with self._lock:  # a Parquet reader is not made for several threads
            if self._kept.get(column, (-1, None))[0] != group:
                self._kept[column] = (group, self.file.read_row_group(group, columns=[column])[column])
            return self._kept[column][1][row - self.starts[group]].as_py()


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_images(kind.value_type)
    if types.is_struct(kind):
        return any(_holds_images(kind.field(number).type) for number in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))
