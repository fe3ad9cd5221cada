"""Result of a training: its figures, and the paths of what it wrote. A notebook shows it as a table with curves."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.config.sections import JUDGE_FILES
from diffalign.runtime.manifest import checked
from diffalign.runtime.products import CARD, DENOISERS, EXPORTS, WEIGHTS
from diffalign.runtime.tracking import MetricsLog

if TYPE_CHECKING:
    from PIL.Image import Image

CURVES, COMPARISON = "curves.png", "compare.png"
PREFIX = "eval/"
ACCURACY = f"{PREFIX}accuracy"


@dataclass(frozen=True)
class TrainingResult:
    """Figures and paths of a training, as the files in its folder have them.

    The main process writes these files; another one may read them before they are complete.

    Attributes:
        output_dir: Folder of the run.
        step: Optimizer steps, those of earlier processes of a resumed run included.
        weights: Exported weights: the LoRA, the folder of the denoiser, or those of a judge.
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

    @property
    def curves(self) -> Image | None:
        """The picture of the metrics that decide; None if the run wrote none."""
        return _picture(self.output_dir / CURVES)

    @property
    def comparison(self) -> Image | None:
        """The picture of base and tuned model on the same prompts; None without evaluations."""
        return _picture(self.output_dir / COMPARISON)

    def _repr_html_(self) -> str:
        """Format the result for a notebook: held-out figures before and after, and the curves."""
        last, best = max(self.evaluations, default=0), self.best_step
        named = {"base": self.base} | ({f"step {last}": self.tuned} if last else {})
        if best not in (None, 0, last):
            named[f"best, step {best}"] = self.evaluations[best or 0]
        heads = "".join(f"<th>{escape(name)}</th>" for name in ("held-out prompts", *named))
        lines = [
            "".join(f"<td>{escape(cell)}</td>" for cell in (name, *(_figure(own.get(name)) for own in named.values())))
            for name in self.tuned
        ]
        table = f"<table><tr>{heads}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>" if lines else ""
        weights = ", ".join(map(str, self.weights)) or "no weights yet"
        about = f"<p>{self.step} optimizer steps: {escape(weights)}</p>"
        return f"{about}{table}{_embedded(self.output_dir / CURVES)}"


def _picture(path: Path) -> Image | None:
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) and not math.isnan(value) else "–"


def _embedded(path: Path) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="Curves of the metrics that decide" style="max-width: 100%" src="data:image/png;base64,{data}">'


def read_result(folder: Path, step: int) -> TrainingResult:
    """Read the result of a run from its folder."""
    rows = MetricsLog.read(folder / "metrics.jsonl")
    evaluations = {row["step"]: row for row in rows if ACCURACY in row}
    metrics: Mapping[str, float] = next((row for row in reversed(rows) if "loss" in row), {})
    named = checked(folder / EXPORTS)[0].get("files", {})
    parts = dict.fromkeys(
        part for name in named if (part := name.split("/")[0]) in (*WEIGHTS, *DENOISERS, JUDGE_FILES[0])
    )
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
