"""Result of a training: its figures, and the paths of what it wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.runtime.manifest import checked
from diffalign.runtime.products import CARD, DENOISERS, EXPORTS, WEIGHTS
from diffalign.runtime.tracking import MetricsLog

PREFIX = "eval/"
ACCURACY = f"{PREFIX}accuracy"


@dataclass(frozen=True)
class TrainingResult:
    """Figures and paths of a training, as the files in its folder have them.

    The main process writes these files; another one may read them before they are complete.

    Attributes:
        output_dir: Folder of the run.
        step: Optimizer steps, those of earlier processes of a resumed run included.
        weights: Exported weights: the LoRA, or the folder of the denoiser.
        card: Model card; None before the end of the run.
        evaluations: Step -> figures ``eval/...`` of each evaluation.
        metrics: Metrics of the last optimizer step.
    """

    output_dir: Path
    step: int
    weights: tuple[Path, ...] = ()
    card: Path | None = None
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation by ``eval/accuracy``, the earlier of two; None without one that is a number."""
        known = {step: row[ACCURACY] for step, row in self.evaluations.items() if not math.isnan(row[ACCURACY])}
        return max(known, key=lambda step: known[step], default=None)

    @property
    def base(self) -> Mapping[str, float]:
        """Figures of the base model; empty without evaluations."""
        return self.evaluations.get(0, {})

    @property
    def tuned(self) -> Mapping[str, float]:
        """Figures of the last evaluation; empty without evaluations."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}


def read_result(folder: Path, step: int) -> TrainingResult:
    """Read the result of a run from its folder."""
    rows = MetricsLog.read(folder / "metrics.jsonl")
    evaluations = {row["step"]: row for row in rows if ACCURACY in row}
    metrics: Mapping[str, float] = next((row for row in reversed(rows) if "loss" in row), {})
    named = checked(folder / EXPORTS)[0].get("files", {})
    parts = dict.fromkeys(part for name in named if (part := name.split("/")[0]) in (*WEIGHTS, *DENOISERS))
    return TrainingResult(
        folder,
        step,
        tuple(folder / part for part in parts),
        folder / CARD if CARD in named else None,
        {at: _figures(row) for at, row in evaluations.items()},
        _figures(metrics),
    )


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without its step; the log writes NaN as null, and infinity as text."""
    special = {None: math.nan, "inf": math.inf, "-inf": -math.inf}
    named = ((name, value) for name, value in row.items() if name != "step")
    return {n: special[v] if v is None or v in ("inf", "-inf") else v for n, v in named}
