"""Draws the metrics of a run as small multiples."""

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

# What a reader looks at first; every other metric follows in the order in which it was logged.
FIRST = ("eval/accuracy", "reward/mean", "reward/std", "eval/diversity", "kl", "clip_share", "grad_norm", "lr", "loss")
MAX_PANELS = 24
COLUMNS = 3
SMOOTH_FROM = 40  # points; a shorter curve is drawn as it is
INK, FAINT = "#1f5fa8", "#b9cfe6"


def plot_curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    keys: Sequence[str] | None = None,
    meanings: Mapping[str, str] | None = None,
) -> list[str]:
    """A panel per metric over the step, written to ``path`` (PNG, SVG or PDF by its suffix); returns what was drawn.

    rows: the objects of ``metrics.jsonl``, each with "step"; a metric need not be in every row; where a resumed run
    repeats a step the later row counts. keys: the metrics to draw; None for all numbers, the telling ones first. At
    most 24 are drawn, and a line below names the others. meanings: by metric, what is added to its title. A value that
    is not finite leaves a gap. Long curves get a running mean over faint raw values, of which the title says the width.

    ValueError: nothing to draw.
    """
    series = _series(rows)
    wanted = list(series if keys is None else [key for key in keys if key in series])
    chosen, left = wanted[:MAX_PANELS], wanted[MAX_PANELS:]
    if not chosen:
        logged = ", ".join(series) or "none"
        raise ValueError(f"no metric to draw (numbers logged: {logged}): let the run log some steps, or change keys")
    columns = min(COLUMNS, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.3 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for place, key in enumerate(chosen, start=1):
        _draw(figure.add_subplot(lines, columns, place), key, series[key], (meanings or {}).get(key, ""))
    if left:
        figure.supxlabel(f"not drawn: {', '.join(left)}", fontsize=7, wrap=True)
    with replacing(path) as staged:
        figure.savefig(staged, dpi=110)
    return chosen


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Metric -> step -> value, the metrics of ``FIRST`` first."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and (number := _number(value)) is not None:
                found.setdefault(key, {})[row["step"]] = number
    drawn = {key: points for key, points in found.items() if any(map(math.isfinite, points.values()))}
    return {key: drawn[key] for key in (*FIRST, *drawn) if key in drawn}


def _number(value: Any) -> float | None:
    """A value of a log; ``metrics.jsonl`` writes NaN as null and infinity as text."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        return float(value) if value in ("inf", "-inf") else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _draw(axes: Axes, key: str, points: Mapping[int, float], meaning: str) -> None:
    steps = np.array(sorted(points))
    values = np.array([points[step] for step in steps])
    values[~np.isfinite(values)] = np.nan
    kept = np.isfinite(values) | np.isfinite(np.append(0.0, values[:-1]))  # one point for a gap of several
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
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
    axes.yaxis.get_offset_text().set(fontsize=7, x=1, horizontalalignment="right")  # clear of the title
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of the finite values within ``reach`` places on both sides; a gap stays one."""
    finite = np.isfinite(values)
    window = np.ones(2 * reach + 1)
    count = np.convolve(finite, window, mode="same")
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)
