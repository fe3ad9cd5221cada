"""Draws what tells learning from reward hacking: the trained reward beside everything that it should not cost."""

from __future__ import annotations

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


def plot_hacking(
    rows: Sequence[Mapping[str, Any]], path: str | Path, trained: Sequence[str], held_out: Sequence[str]
) -> list[str]:
    """Four panels over the step, written to ``path``; returns the figures that were drawn.

    Trained rewards; held-out ones and accuracy; diversity and the distance to the reference; sharpness. Rewards are
    drawn as their change since the first evaluation, in units of its largest over the run, so that different scales
    compare; the legend has their first and last value. Evaluations at which an alarm rang are shaded.

    rows: the objects of ``metrics.jsonl``. ValueError: no evaluation among them.
    """
    found = [row for row in rows if any(key.startswith(PREFIX) for key in row)]
    if not found:
        raise ValueError("no evaluation to draw: give eval_prompts")
    sharp = [key.removeprefix(PREFIX) for key in found[0] if key.startswith(f"{PREFIX}sharpness/")]
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
        known = [name for name in names if any(isinstance(row.get(PREFIX + name), int | float) for row in found)]
        for name, color in zip(known, COLORS, strict=False):
            steps, values = _series(found, PREFIX + name)
            label = name
            if title.endswith("change"):
                label += f"  {values[0]:.3g} → {values[-1]:.3g}"
                values = values - values[0]
                values = values / (np.abs(values).max() or 1.0)
            axes.plot(steps, values, color=color, linewidth=1.5, marker="o", markersize=3, label=label)
        drawn += known
        _dress(axes, title, found, bool(known))
    with replacing(path) as staged:
        figure.savefig(staged, dpi=120)
    return drawn


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], np.ndarray]:
    own = [row for row in rows if isinstance(row.get(key), int | float)]
    return [row["step"] for row in own], np.array([float(row[key]) for row in own])


def _dress(axes: Axes, title: str, rows: Sequence[Mapping[str, Any]], legend: bool) -> None:
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
