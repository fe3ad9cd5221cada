"""AI labels that lie beside a data set: a Parquet file with a row per pair, applied by its name.

Columns: "key", the pair's key in its source; "content", what ``content_key`` said of its text and images when it was
judged; "label", null where no reward could say; and for each reward "NAME/0" and "NAME/1", the scores of both images.
A file of JSON beside it says which rewards and which rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from diffalign.atomic import replacing, write_text
from diffalign.data.folders import LABELS
from diffalign.data.images import content_key
from diffalign.data.letterbox import bars_on_terminals
from diffalign.files import shorten, some
from diffalign.structures import Pair

Gaps = Sequence[tuple[float, float | None]]  # by reward its weight, and the first score minus the second


def vote(gaps: Gaps, scale: float) -> float | None:
    """BalancedDPO (arXiv 2503.12575): 1, 0 or 0.5, the sign of the sum of weighted votes, a vote being a gap's sign.

    A reward without a score does not vote; None where none does. scale: not used.
    """
    votes = [weight * ((gap > 0) - (gap < 0)) for weight, gap in gaps if gap is not None]
    total = sum(votes)
    return 0.5 + 0.5 * ((total > 0) - (total < 0)) if votes else None


def soft(gaps: Gaps, scale: float) -> float | None:
    """SmPO (arXiv 2506.02698): sigmoid(scale times the weighted sum of gaps); None where a reward has no score."""
    known = [weight * gap for weight, gap in gaps if gap is not None]
    return 0.5 * (1 + math.tanh(scale * sum(known) / 2)) if len(known) == len(gaps) else None


RULES: dict[str, Callable[[Gaps, float], float | None]] = {"vote": vote, "soft": soft}


def labels_path(source: str | Path, name: str) -> Path:
    """Where the labels of this name lie: ``FOLDER/.labels/NAME.parquet``, or ``.labels/FILE/NAME.parquet`` by a file.

    A name that ends in .parquet is a path itself. ValueError: a hub data set, which nothing can lie beside.
    """
    path = Path(source)
    if name.endswith(".parquet"):
        return Path(name)
    if path.is_dir():
        return path / LABELS / f"{name}.parquet"
    if path.is_file():
        return path.parent / LABELS / path.name / f"{name}.parquet"
    raise ValueError(f"labels {name!r}: {shorten(source)} is no file or folder here; give a path that ends in .parquet")


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file; none without a file."""
    if not path.is_file():
        return []
    # Streaming reads the file itself, where the other way would keep a copy in the cache.
    return list(datasets.load_dataset("parquet", data_files={"train": str(path)}, split="train", streaming=True))


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write the rows, and ``about`` as JSON beside them; each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json")
    with replacing(path) as staged, bars_on_terminals():
        Dataset.from_list([dict(row) for row in rows]).to_parquet(staged)
        beside.unlink(missing_ok=True)  # so that it never describes another table
    write_text(beside, json.dumps(about, indent=1) + "\n")


@dataclass(frozen=True)
class Labels:
    """The AI labels of one source: what was judged and the label, by key; and the labels by what was judged."""

    path: Path
    judged: Mapping[str, tuple[str, float | None]]
    by_content: Mapping[str, float | None]

    @classmethod
    def load(cls, source: str | Path, name: str) -> Labels:
        """FileNotFoundError: there are none of this name."""
        path = labels_path(source, name)
        if not path.is_file():
            others = sorted(file.stem for file in path.parent.glob("*.parquet"))
            known = f"; there are {some(others, 10)}" if others else ""
            raise FileNotFoundError(f"no labels at {shorten(path)}{known}: make them with diffalign relabel")
        rows = read_table(path)
        judged = {row["key"]: (row["content"], row["label"]) for row in rows}
        return cls(path, judged, {row["content"]: row["label"] for row in rows})

    def of(self, key: str) -> float | None:
        """The label of a pair by its key; None where no reward could say. ValueError: it was never judged."""
        if key not in self.judged:
            raise ValueError(f"{shorten(self.path)} has no label for pair {key}: the data changed, relabel them")
        return self.judged[key][1]

    def of_content(self, pair: Pair) -> float | None:
        """The label of a pair by its content. ValueError: it was never judged."""
        content = content_key(pair)
        if content not in self.by_content:
            raise ValueError(f"{shorten(self.path)} has no label for {pair.key}: the data changed, relabel them")
        return self.by_content[content]

    def check(self, key: str, pair: Pair) -> None:
        """ValueError: the text or an image of this pair is not what was judged."""
        if content_key(pair) != self.judged[key][0]:
            raise ValueError(f"{shorten(self.path)}: {pair.key} is not what was judged: the data changed, relabel")
