"""AI labels of a data set: a Parquet file beside it with a row per pair, selected by name.

Columns: "key", the pair's key in its source; "content", the ``content_key`` of its text and images when it was scored;
"label", null if no reward gave a score; and for each reward "NAME/0" and "NAME/1", the scores of both images. A JSON
file beside it records the rewards and the rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.atomic import replacing, write_text
from diffalign.data.folders import LABELS
from diffalign.data.images import content_key
from diffalign.data.letterbox import bars_on_terminals
from diffalign.files import shorten, some
from diffalign.structures import Pair

Gaps = Sequence[tuple[float, float | None]]  # per reward: its weight, and the first score minus the second


def vote(gaps: Gaps, scale: float) -> float | None:
    """Label by weighted majority of the gaps' signs: 1, 0 or 0.5 (BalancedDPO, arXiv 2503.12575).

    A reward without a score does not vote; None if none votes. scale: not used.
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
    """Return the file of labels: ``FOLDER/.labels/NAME.parquet``, or ``.labels/FILE/NAME.parquet`` beside a file.

    A name that ends in .parquet is a path itself. ValueError: the source is a hub data set, which has no folder.
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
    """Read the rows of a Parquet file; an empty list without one."""
    if not path.is_file():
        return []
    import datasets

    # Streaming keeps no copy in the cache of ``datasets``.
    return list(datasets.load_dataset("parquet", data_files={"train": str(path)}, split="train", streaming=True))


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write rows to a Parquet file, and ``about`` as JSON beside it; each file atomically."""
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json")
    with replacing(path) as staged, bars_on_terminals():
        Dataset.from_list([dict(row) for row in rows]).to_parquet(staged)
        beside.unlink(missing_ok=True)  # so that it never describes another table
    write_text(beside, json.dumps(about, indent=1) + "\n")


@dataclass(frozen=True)
class Labels:
    """AI labels of one source: ``judged``, (content key, label) by pair key; ``by_content``, labels by content key."""

    path: Path
    judged: Mapping[str, tuple[str, float | None]]
    by_content: Mapping[str, float | None]

    @classmethod
    def load(cls, source: str | Path, name: str) -> Labels:
        """Load the labels of a name. Raises FileNotFoundError if there are none."""
        path = labels_path(source, name)
        if not path.is_file():
            others = sorted(file.stem for file in path.parent.glob("*.parquet"))
            known = f"; there are {some(others, 10)}" if others else ""
            raise FileNotFoundError(f"no labels at {shorten(path)}{known}: make them with diffalign relabel")
        rows = read_table(path)
        judged = {row["key"]: (row["content"], row["label"]) for row in rows}
        return cls(path, judged, {row["content"]: row["label"] for row in rows})

    def of(self, key: str) -> float | None:
        """Look up a label by the pair's key; None if no reward gave a score. Raises ValueError for an unknown pair."""
        if key not in self.judged:
            raise ValueError(f"{shorten(self.path)} has no label for pair {key}: the data changed, relabel them")
        return self.judged[key][1]

    def of_content(self, pair: Pair) -> float | None:
        """Look up a label by the pair's content. Raises ValueError for an unknown pair."""
        content = content_key(pair)
        if content not in self.by_content:
            raise ValueError(f"{shorten(self.path)} has no label for {pair.key}: the data changed, relabel them")
        return self.by_content[content]

    def check(self, key: str, pair: Pair) -> None:
        """Raise ValueError if the pair's text or images changed after it was labelled."""
        if content_key(pair) != self.judged[key][0]:
            raise ValueError(
                f"{shorten(self.path)}: {pair.key} differs from the labelled pair: the data changed, relabel"
            )
