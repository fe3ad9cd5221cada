"""Plot the results of several models side by side, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffalign.atomic import replacing
from diffalign.evaluation.win_rate import Interval
from diffalign.report.results import ModelResults

COLORS = ("#8f9bab", "#1f5fa8", "#d98e23", "#3c9d63", "#a5488f", "#5bb5c9", "#c8322b", "#77702c")
BAR = 0.8  # of the distance between groups


def plot_figures(models: Mapping[str, ModelResults], path: str | Path, prompts: int) -> None:
    """Write up to three panels to ``path`` (PNG, SVG or PDF): rewards, tasks, win rates against the base.

    Args:
        models: Model -> results.
        path: Output file.
        prompts: Number of prompts that the images are of.
    """
    first = next(iter(models.values()))
    wins = {name: {reward: won.rate for reward, won in f.wins.items()} for name, f in models.items() if f.wins}
    panels: dict[str, Mapping[str, Mapping[str, Interval | None]]] = {
        f"mean over {first.images} images, {first.images / prompts:g} per prompt": {
            name: f.rewards for name, f in models.items()
        },
        f"{first.primary} by task": {name: f.tasks for name, f in models.items() if f.tasks},
        "win rate over base, by reward": wins,
    }
    shown = {title: bars for title, bars in panels.items() if any(bars.values())}
    widths = [1.2 + 0.28 * sum(map(len, bars.values())) for bars in shown.values()]
    figure = Figure(figsize=(max(6.0, sum(widths)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(shown), squeeze=False, width_ratios=widths)[0]
    for panel, (title, bars) in zip(axes, shown.items(), strict=True):
        _bars(panel, title, bars, list(models))
    figure.legend(*_handles(axes), loc="outside lower center", ncols=min(4, len(models)), fontsize=8, frameon=False)
    with replacing(path) as staged:
        figure.savefig(staged, dpi=120)


def _bars(axes: Axes, title: str, bars: Mapping[str, Mapping[str, Interval | None]], order: Sequence[str]) -> None:
    groups = list(dict.fromkeys(group for values in bars.values() for group in values))
    width = BAR / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        found = [values.get(group) or Interval(np.nan, np.nan, np.nan) for group in groups]
        means = np.array([interval.mean for interval in found])
        error = np.array([[i.mean - i.low for i in found], [i.high - i.mean for i in found]]).clip(min=0)
        center = np.arange(len(groups)) + (number - (len(bars) - 1) / 2) * width
        color = COLORS[order.index(name) % len(COLORS)]
        axes.bar(center, means, width * 0.92, yerr=error, label=name, color=color, error_kw={"lw": 0.8, "capsize": 2})
    if title.startswith("win"):
        axes.axhline(0.5, color="#404040", linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 1)
    axes.set_title(title, fontsize=9, loc="left")
    slanted = len(groups) > 2
    axes.set_xticks(range(len(groups)), groups, fontsize=8, rotation=30 * slanted, ha="right" if slanted else "center")
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _handles(axes: Sequence[Axes]) -> tuple[list, list]:
    """Return legend handles and labels, each model once."""
    found = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)
