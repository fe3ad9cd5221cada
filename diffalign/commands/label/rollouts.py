"""Pairs of a rollout buffer to label, with the rewards that it stores as scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from diffalign.commands.label.comparison import Scores
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.folders import listed
from diffalign.data.rollouts import rollout_pairs
from diffalign.files import shorten
from diffalign.structures import Pair

Line = Mapping[str, Any]


def read_buffer(path: Path) -> list[Line] | None:
    """Read the lines of a rollout buffer; None if a folder is none."""
    entries = listed(path) if path.is_dir() else None
    is_buffer = entries is not None and {"group", "rewards", "file_name"} <= set(entries.columns)
    return list(entries) if entries is not None and is_buffer else None


def buffer_rows(lines: Sequence[Line], settings: PreferenceDataConfig, where: Path) -> list[dict[str, Any]]:
    """Pair the images of each group.

    With one reward, or rewards named in ``data.rollouts``, pairs are those that training would read. Otherwise no
    reward decides: each image is paired with the next one of its group, or with all others by the rule "all".
    """
    names = {name for line in lines if isinstance(line.get("rewards"), Mapping) for name in line["rewards"]}
    pairing = settings.rollouts
    if pairing.rewards or len(names) == 1:
        return rollout_pairs(lines, pairing, shorten(where))
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.get("group"), []).append(line)
    return [
        {
            "name": f"group {group}, samples {first.get('sample')} and {second.get('sample')}",
            "image_0": Path(str(first.get("file_name"))),
            "image_1": Path(str(second.get("file_name"))),
            "prompt": first.get("prompt"),
            "metadata": first.get("metadata"),
        }
        for group, own in groups.items()
        for first, second in (combinations(own, 2) if pairing.rule == "all" else zip(own[::2], own[1::2], strict=False))
    ]


def stored_rewards(lines: Sequence[Line], where: Path) -> dict[Path, Mapping[str, float | None]]:
    """Map the file of each image to the rewards that the buffer stores."""
    return {where / str(line.get("file_name")): line.get("rewards") or {} for line in lines}


def scores_of(pair: Pair, stored: Mapping[Path, Mapping[str, float | None]]) -> Scores:
    """Return the stored rewards of both images of a pair."""
    first, second = (stored.get(i.content, {}) if isinstance(i.content, Path) else {} for i in pair.images)
    return {name: (first[name], second.get(name)) for name in first}
