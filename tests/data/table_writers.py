"""The same rows in every kind of container that can be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

Rows = list[dict]


def _even(rows: Rows) -> Rows:
    """Every row with every column: Arrow would take the columns of the first."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _text(path: Path, lines: list[str], gap: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(gap.join(lines) + "\n", encoding="utf-8")
    return path


def json_lines(folder: Path, rows: Rows) -> Path:
    return _text(folder / "rows.jsonl", [json.dumps(row) for row in rows])


def blank_lines(folder: Path, rows: Rows) -> Path:
    """With a byte order mark, CRLF and lines without content."""
    path = _text(folder / "blank.jsonl", [json.dumps(row) for row in rows], "\r\n\r\n \t\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return path


def json_list(folder: Path, rows: Rows) -> Path:
    return _text(folder / "rows.json", [json.dumps(rows, indent=1)])


def lines_called_json(folder: Path, rows: Rows) -> Path:
    return _text(folder / "lines.json", [json.dumps(row) for row in rows])


def columns(folder: Path, rows: Rows) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _text(folder / "columns.json", [json.dumps({name: [row.get(name) for row in rows] for name in names})])


def table(folder: Path, rows: Rows) -> Path:
    """Arrow writes null for members that a mapping does not have."""
    pq.write_table(pa.Table.from_pylist(_even(rows)), folder / "rows.parquet")
    return folder / "rows.parquet"


def saved(folder: Path, rows: Rows) -> Path:
    """As ``datasets`` saves it, beside the images of the folder."""
    Dataset.from_list(_even(rows)).save_to_disk(folder / "saved")
    return folder / "saved"


def arrow(folder: Path, rows: Rows) -> Path:
    Dataset.from_list(_even(rows)).save_to_disk(folder / "arrows")
    path = folder / "rows.arrow"
    next((folder / "arrows").glob("*.arrow")).replace(path)
    return path


def comma(folder: Path, rows: Rows) -> Path:
    """Mappings and lists are JSON in a cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()})
    return folder / "rows.csv"


TEXTS = (json_lines, blank_lines, json_list, lines_called_json, columns, comma)
TABLES = (table, arrow, saved)
CONTAINERS = (*TEXTS, *TABLES)
