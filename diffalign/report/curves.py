"""Plot the metrics of a run, one panel each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffalign.atomic import replacing

# plotted first; other metrics follow in the order of logging
FIRST = ("eval/accuracy", "reward/mean", "reward/std", "eval/diversity", "kl", "clip_share", "grad_norm", "lr", "loss")
MAX_PANELS = 24
COLUMNS = 3
SMOOTH_FROM = 40  # points; shorter curves are not smoothed
INK, FAINT = "#1f5fa8", "#b9cfe6"


def plot_curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    keys: Sequence[str] | None = None,
    meanings: Mapping[str, str] | None = None,
) -> list[str]:
    """Plot metrics over steps, a panel each; write the figure to ``path``.

    Non-finite values leave a gap. Long curves get a running mean over faint raw values; its window is in the title.

    Args:
        rows: Objects of ``metrics.jsonl``, each with "step". If a resumed run repeats a step, the later row counts.
        path: Output file, PNG, SVG or PDF by its suffix.
        keys: Metrics to plot; None for all numbers, sorted by ``FIRST``. At most 24 are plotted, the rest is named.
        meanings: Metric -> addition to its title.

    Returns:
        Names of the plotted metrics.

    Raises:
        ValueError: No metric to plot.
    """
    series = _series(rows)
    wanted = list(series if keys is None else [key for key in keys if key in series])
    chosen, left = wanted[:MAX_PANELS], wanted[MAX_PANELS:]
    if not chosen:
        logged = ", ".join(series) or "none"
        raise ValueError(f"no metric to plot (numbers logged: {logged}): train some steps, or change keys")

    columns = min(COLUMNS, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.3 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, key in enumerate(chosen, start=1):
        _draw(figure.add_subplot(lines, columns, panel), key, series[key], (meanings or {}).get(key, ""))
    if left:
        figure.supxlabel(f"not plotted: {', '.join(left)}", fontsize=7, wrap=True)
    with replacing(path) as staged:
        figure.savefig(staged, dpi=110)
    return chosen


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return metric -> step -> value, the metrics of ``FIRST`` first."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and (number := _number(value)) is not None:
                found.setdefault(key, {})[row["step"]] = number
    drawn = {key: points for key, points in found.items() if any(map(math.isfinite, points.values()))}
    return {key: drawn[key] for key in (*FIRST, *drawn) if key in drawn}


def _number(value: Any) -> float | None:
    """Parse a logged value (NaN is null, infinity a string); None if it is not a number."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        return float(value) if value in ("inf", "-inf") else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _draw(axes: Axes, key: str, points: Mapping[int, float], meaning: str) -> None:
    steps = np.array(sorted(points))
    values = np.array([points[step] for step in steps])
    values[~np.isfinite(values)] = np.nan
    kept = np.isfinite(values) | np.isfinite(np.append(0.0, values[:-1]))  # one NaN per gap
    steps, values = steps[kept], values[kept]
    if len(values) >= SMOOTH_FROM:
        axes.plot(steps, values, color=FAINT, linewidth=0.8)
        reach = len(values) // 20
        axes.plot(steps, _running_mean(values, reach), color=INK, linewidth=1.6)
        meaning = "; ".join(filter(None, [meaning, f"line: mean of {2 * reach + 1} points"]))
    else:
        axes.plot(steps, values, color=INK, linewidth=1.4, marker="o", markersize=3)
    axes.set_title(key, fontsize=9, loc="left", y=1.02)
    axes.set_title(meaning, fontsize=6, loc="right", y=1.02, color="#606060")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", integer=True)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
    axes.yaxis.get_offset_text().set(fontsize=7, x=1, horizontalalignment="right")  # not over the title
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Average the finite values within ``reach`` points on both sides; NaN stays NaN."""
    finite = np.isfinite(values)
    window = np.ones(2 * reach + 1)
    count = np.convolve(finite, window, mode="same")
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)
