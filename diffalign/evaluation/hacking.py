"""Plot indicators of reward hacking: trained reward, held-out rewards, diversity, distance to reference, sharpness."""

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

COLORS = ("#1f5fa8", "#d98e23", "#3c9d63", "#a5488f", "#c8322b", "#77702c")
PREFIX = "eval/"
ALARM = "alarm"


def panel_alarm(
    base: Mapping[str, float], now: Mapping[str, float], trained: Sequence[str], held_out: Sequence[str]
) -> str:
    """Explain that trained rewards rose while most held-out judges fell; empty where they did not.

    Args:
        base: Metrics of the first evaluation.
        now: Metrics of this one.
        trained: Names of trained rewards.
        held_out: Names of held-out judges.
    """
    known, judges = (
        [name for name in names if _number(base, name) and _number(now, name)] for names in (trained, held_out)
    )
    fell = [name for name in judges if now[name] < base[name]]
    if not known or not all(now[name] > base[name] for name in known) or 2 * len(fell) <= len(judges):
        return ""
    changes = ", ".join(f"{name} from {base[name]:.3g} to {now[name]:.3g}" for name in fell)
    return f"trained rewards rose, and {len(fell)} of {len(judges)} held-out judges fell ({changes})"


def _number(figures: Mapping[str, Any], name: str) -> bool:
    return isinstance(figures.get(name), int | float) and not math.isnan(figures[name])


def plot_hacking(
    rows: Sequence[Mapping[str, Any]], path: str | Path, trained: Sequence[str], held_out: Sequence[str]
) -> list[str]:
    """Plot evaluation metrics over steps in four panels: trained rewards, held-out rewards, diversity, sharpness.

    Rewards are plotted as the change since the first evaluation, divided by its maximum over the run, so that scales
    are comparable; the legend gives first and last value. Evaluations with a hacking alarm are shaded.

    Args:
        rows: Objects of ``metrics.jsonl``.
        path: Output file.
        trained: Names of trained rewards.
        held_out: Names of held-out rewards.

    Returns:
        Names of the plotted metrics.

    Raises:
        ValueError: ``rows`` has no evaluation.
    """
    evaluations = [row for row in rows if any(key.startswith(PREFIX) for key in row)]
    if not evaluations:
        raise ValueError("no evaluation to plot: set eval_prompts")
    sharp = [key.removeprefix(PREFIX) for key in evaluations[0] if key.startswith(f"{PREFIX}sharpness/")]
    panels = {
        "trained reward, change": trained,
        "held-out rewards, change": ["accuracy", *(name for name in held_out if name not in trained)],
        "diversity, distance to reference": ["diversity", "reference_distance"],
        "sharpness": sharp,
    }

    figure = Figure(figsize=(3.3 * len(panels), 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    drawn: list[str] = []
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        known = [name for name in names if any(isinstance(row.get(PREFIX + name), int | float) for row in evaluations)]
        for name, color in zip(known, COLORS, strict=False):
            steps, values = _series(evaluations, PREFIX + name)
            label = name
            if title.endswith("change"):
                label += f"  {values[0]:.3g} → {values[-1]:.3g}"
                values = values - values[0]
                values = values / (np.abs(values).max() or 1.0)
            axes.plot(steps, values, color=color, linewidth=1.5, marker="o", markersize=3, label=label)
        drawn += known
        _style(axes, title, evaluations, bool(known))

    with replacing(path) as staged:
        figure.savefig(staged, dpi=120)
    return drawn


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], np.ndarray]:
    own = [row for row in rows if isinstance(row.get(key), int | float)]
    return [row["step"] for row in own], np.array([float(row[key]) for row in own])


def _style(axes: Axes, title: str, rows: Sequence[Mapping[str, Any]], legend: bool) -> None:
    for row in rows:
        if row.get(PREFIX + ALARM):
            axes.axvline(row["step"], color="#c8322b", linewidth=4, alpha=0.15)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=7, frameon=False)
