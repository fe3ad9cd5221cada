"""Write the scores of ``diffalign score`` as CSV, with a summary."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.atomic import replacing, write_text


def scores_of(rows: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """Return the scores of a reward as float64, without missing ones."""
    found = [row.get("rewards", {}).get(name) for row in rows]
    return torch.tensor([value for value in found if value is not None], dtype=torch.float64)


def summary(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compute count, mean, population standard deviation, min and max of each reward."""
    result: dict[str, dict[str, float]] = {}
    for name in names:
        values = scores_of(rows, name)
        result[name] = {"count": len(values)}
        if len(values):
            figures = (values.mean(), values.std(correction=0), values.min(), values.max())
            result[name] |= {key: v.item() for key, v in zip(("mean", "std", "min", "max"), figures, strict=True)}
    return result


def write(folder: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Write ``scores.csv`` and ``summary.json`` to ``folder``; print the summary."""
    with replacing(folder / "scores.csv") as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt", *names])
        for row in rows:
            writer.writerow([row["image"], row["prompt"], *(row.get("rewards", {}).get(name) for name in names)])
    figures = summary(rows, names)
    broken = sum("error" in row for row in rows)
    content = {"pictures": len(rows), "unreadable": broken, "rewards": figures}
    write_text(folder / "summary.json", json.dumps(content, indent=1) + "\n")
    print("| reward | pictures | mean | std | min | max |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, found in figures.items():
        cells = [f"{found[key]:.4g}" if key in found else "–" for key in ("mean", "std", "min", "max")]
        print(f"| {name} | {found['count']} | {' | '.join(cells)} |")
    if broken:
        print(f"{broken} of {len(rows)} pictures cannot be read; scores.jsonl says why")
