"""Plot the metrics of a run: those that decide in one picture, all of them in another."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from diffalign.atomic import replacing
from diffalign.report.metrics import BETTER, FREE, LEARNS, QUESTIONS, SHARE, STABLE, Axis, describe, place

DECIDING = 8  # panels of the first picture, at most
ROW = 3  # of them side by side
MAX_PANELS = 36
SMOOTH_FROM = 40  # points; shorter curves are not smoothed
LEAST = 0.1  # smallest extent of an axis, as a share of the values
INK, FAINT, SOFT = "#1f5fa8", "#b9cfe6", "#606060"


@dataclass(frozen=True)
class Layout:
    """Sizes of a picture of panels, in inches: a cell, the margins of the axes within it, and the picture's foot."""

    columns: int
    cell: tuple[float, float]
    left: float
    top: float
    bottom: float
    foot: float
    right: float = 0.15


GROUPED = Layout(ROW, (4.2, 2.85), left=0.6, top=0.95, bottom=0.45, foot=0.35)
ALL = Layout(4, (3.2, 1.9), left=0.55, top=0.32, bottom=0.3, foot=0.3)

Series = Mapping[int, float]  # step -> value


@dataclass(frozen=True)
class Known:
    """What a run knows of its metrics beyond their names.

    Attributes:
        meanings: Metric -> its meaning in this run, in place of the general one.
        axes: Metric -> its axis in this run, e.g. the range of a reward.
    """

    meanings: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, Axis] = field(default_factory=dict)


def plot_curves(rows: Sequence[Mapping[str, Any]], path: str | Path, known: Known | None = None) -> list[str]:
    """Plot metrics over steps: at most eight that decide to ``path``, grouped; all of them to ``<path>_all``.

    Axes include the natural range of a metric (diversity starts at 0) and cover at least a tenth of its values, so that
    noise does not look like a trend. Non-finite values leave a gap. Long curves get a running mean over raw values.

    Args:
        rows: Objects of ``metrics.jsonl``, each with "step". If a resumed run repeats a step, the later row counts.
        path: Output file, PNG, SVG or PDF by its suffix.
        known: What the run knows of its metrics.

    Returns:
        Names of the metrics in the first picture.

    Raises:
        ValueError: No metric to plot.
    """
    series, path, known = _series(rows), Path(path), known or Known()
    if "reward/mean" in series and "reward/std" in series:  # a change is large or small beside the spread of images
        spread = max(filter(math.isfinite, series["reward/std"].values()))
        known = replace(known, axes={"reward/mean": Axis(span=2 * spread), **known.axes})
    if not series:
        raise ValueError("no metric to plot (no numbers are logged): train some steps")
    groups = deciding(series)
    _draw_groups(groups, series, path, known)
    _draw_all(series, _all(path), known)
    return [name for names in groups.values() for name in names]


def deciding(series: Mapping[str, Series]) -> dict[str, list[str]]:
    """Choose the metrics that decide: group -> names, at most ``ROW`` of a group and ``DECIDING`` in all."""
    known = sorted(series, key=place)
    primary = {name for name in known if name.startswith("eval/accuracy/")}  # the tasks, and the reward by its own name
    primary |= {
        name for name in known if name.startswith("eval/") and _equal(series[name], series.get("eval/accuracy"))
    }
    chosen: dict[str, list[str]] = {}
    for group in (BETTER, LEARNS, STABLE):
        names = [name for name in known if (found := describe(name)) and found.group == group and found.watch]
        names = [name for name in names if name == "eval/accuracy" or name not in primary]
        if own := [name for name in names if name not in still(series)][:ROW]:
            chosen[group] = own
    if sum(map(len, chosen.values())) > DECIDING:
        chosen[LEARNS].pop()
    return chosen or {"": known[:DECIDING]}


def still(series: Mapping[str, Series]) -> dict[str, float]:
    """Return the metrics of training that never change, with their value: a line of text says it as well as a panel."""
    found = {name: set(series[name].values()) for name in sorted(series, key=place) if len(series[name]) > 1}
    return {name: values.pop() for name, values in found.items() if len(values) == 1 and not name.startswith("eval/")}


def _equal(one: Series, other: Series | None) -> bool:
    return other is not None and one.keys() == other.keys() and np.allclose(list(one.values()), list(other.values()))


def _draw_groups(groups: Mapping[str, Sequence[str]], series: Mapping[str, Series], path: Path, known: Known) -> None:
    lines = [(group, names[i : i + ROW]) for group, names in groups.items() for i in range(0, len(names), ROW)]
    figure, panels = _panels(GROUPED, len(lines))
    for row, (group, names) in enumerate(lines):
        for panel, name in zip(panels[row], names, strict=False):
            _draw(panel, name, series[name], known, explained=True)
        above = panels[row][0].get_position()
        height = above.y1 + (GROUPED.top - 0.2) / figure.get_figheight()
        figure.text(above.x0, height, QUESTIONS.get(group, ""), fontsize=12, weight="bold")
        for panel in panels[row][len(names) :]:
            panel.remove()
    notes = ["first → last value", "faint: each step, line: mean of neighbouring steps", f"all: {_all(path).name}"]
    quiet = [f"{name} {value:.3g}" for name, value in still(series).items() if (m := describe(name)) and m.watch]
    notes += [f"constant: {', '.join(quiet)}"] if quiet else []
    _save(figure, "; ".join(notes), path)


def _draw_all(series: Mapping[str, Series], path: Path, known: Known) -> None:
    names = sorted(series, key=place)
    chosen, left = names[:MAX_PANELS], names[MAX_PANELS:]
    figure, panels = _panels(ALL, math.ceil(len(chosen) / ALL.columns))
    every = [panel for row in panels for panel in row]
    for panel, name in zip(every, chosen, strict=False):
        _draw(panel, name, series[name], known, explained=False)
    for panel in every[len(chosen) :]:
        panel.remove()
    _save(figure, f"not plotted: {', '.join(left)}" if left else "first → last value", path)


def _all(path: Path) -> Path:
    return path.with_stem(f"{path.stem}_all")


def _panels(layout: Layout, lines: int) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with rows of axes at fixed places, so that those of all rows align."""
    (width, height), columns = layout.cell, layout.columns
    size = (width * columns, height * lines + layout.foot)
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    inner = (width - layout.left - layout.right, height - layout.top - layout.bottom)

    def place_of(row: int, column: int) -> tuple[float, float, float, float]:
        x, y = column * width + layout.left, layout.foot + (lines - 1 - row) * height + layout.bottom
        return x / size[0], y / size[1], inner[0] / size[0], inner[1] / size[1]

    return figure, [[figure.add_axes(place_of(row, column)) for column in range(columns)] for row in range(lines)]


def _save(figure: Figure, note: str, path: Path) -> None:
    text = textwrap.shorten(note, 190, placeholder=" …")
    figure.text(0.1 / figure.get_figwidth(), 0.1 / figure.get_figheight(), text, fontsize=8, color=SOFT)
    with replacing(path) as staged:
        figure.savefig(staged, dpi=100)


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return metric -> step -> value, of metrics with a finite value."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and (number := _number(value)) is not None:
                found.setdefault(key, {})[row["step"]] = number
    return {key: points for key, points in found.items() if any(map(math.isfinite, points.values()))}


def _number(value: Any) -> float | None:
    """Parse a logged value (NaN is null, infinity a string); None if it is not a number."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        return float(value) if value in ("inf", "-inf") else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _draw(axes: Axes, name: str, points: Series, known: Known, explained: bool) -> None:
    steps = np.array(sorted(points))
    values = np.array([points[step] for step in steps])
    values[~np.isfinite(values)] = np.nan
    kept = np.isfinite(values) | np.isfinite(np.append(0.0, values[:-1]))  # one NaN per gap
    steps, values = steps[kept], values[kept]
    line = values
    if len(values) >= SMOOTH_FROM:
        axes.plot(steps, values, color=FAINT, linewidth=0.8)
        line = _running_mean(values, len(values) // 20)
        axes.plot(steps, line, color=INK, linewidth=1.6)
    else:
        axes.plot(steps, values, color=INK, linewidth=1.4, marker="o", markersize=3)
    metric = describe(name)
    axes.set_ylim(*limits(values, known.axes.get(name) or (metric.axis if metric else FREE)))
    size, pad = (10, 30) if explained else (8, 4)
    axes.set_title(name, fontsize=size, loc="left", pad=pad)
    axes.set_title(_change(line), fontsize=size - 1, loc="right", pad=pad, color=INK)
    if explained:
        _explain(axes, known.meanings.get(name) or (metric.meaning if metric else ""))
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _explain(axes: Axes, meaning: str) -> None:
    """Write up to two lines between title and curve, and the unit of the x axis below."""
    text = "\n".join(textwrap.wrap(meaning, 60)[:2])
    axes.annotate(text, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=SOFT)
    axes.set_xlabel("optimizer step", fontsize=8, color=SOFT)


def _change(line: np.ndarray) -> str:
    """Format the first and the last value of a curve."""
    found = line[np.isfinite(line)]
    first, last = (f"{value:.3g}" for value in (found[0], found[-1]))
    return first if len(found) == 1 or first == last else f"{first} → {last}"


def limits(values: np.ndarray, axis: Axis) -> tuple[float, float]:
    """Return the ends of an axis that includes the values and their natural range.

    It covers at least ``axis.span`` and a tenth of the largest value, around the values where no end is given.
    """
    lowest, highest = float(np.nanmin(values)), float(np.nanmax(values))
    low = lowest if axis.low is None else min(axis.low, lowest)
    high = highest if axis.high is None else max(axis.high, highest)
    least = max(axis.span, LEAST * max(abs(low), abs(high))) or 1.0
    if (missing := least - (high - low)) > 0:
        free = (axis.low is None or low < axis.low, axis.high is None or high > axis.high)
        low -= missing * free[0] / max(1, sum(free))
        high += missing * (free[1] or not any(free)) / max(1, sum(free))
    margin = 0.05 * (high - low)
    return low - margin * (low != axis.low), high + margin * (high != axis.high)


def score_axis(scores: Tensor) -> Axis:
    """Return the axis of a mean of scores, (N,): [0, 1] if all are within it, else as wide as their deviation."""
    found = scores[scores.isfinite()]
    if not len(found):
        return FREE
    if found.min() >= 0 and found.max() <= 1:
        return SHARE
    return Axis(span=found.std(correction=0).item())


def _running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Average the finite values within ``reach`` points on both sides; NaN stays NaN."""
    finite = np.isfinite(values)
    window = np.ones(2 * reach + 1)
    count = np.convolve(finite, window, mode="same")
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)
