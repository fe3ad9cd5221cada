"""Results of ``compare_policy_methods.py``: evaluation of a run, rows of a file that only grows, table and picture."""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from diffalign.data.prompts import load_prompts
from diffalign.evaluation.diversity import pairwise_distance
from diffalign.evaluation.win_rate import mean_interval, win_rate
from diffalign.models.base import DiffusionModel
from diffalign.models.checkpoint_context import with_tuned_weights
from diffalign.models.load import load_model
from diffalign.rewards import get_reward
from diffalign.rng import KeyedRNG
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from diffalign.shapes import TAGS
from diffalign.structures import Prompt
from scripts import ROOT
from scripts.studies.policy_methods import BUDGETS, METHODS, REFERENCE
from scripts.studies.repeat_seeds import spread

RESULTS = ROOT / "assets/results"
CSV, TABLE, PICTURE = (RESULTS / f"policy_methods.{suffix}" for suffix in ("csv", "md", "png"))
SPLITS = ("validation", "test")
STEPS, PER_PROMPT, BATCH = 8, 2, 105
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
QUANTILES = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
FIGURES = (
    "accuracy", "low", "high", *(f"accuracy/{tag}" for tag in TAGS), "base", "win_rate", "win_low", "win_high",
    "diversity", "distance", "shapes",
)  # fmt: skip
KEY = ("method", "settings", "budget", "learning_rate", "seed", "split")
COLUMNS = (*KEY, "iterations", "images", "evaluations", "core_seconds", "minutes", *FIGURES, "complete")
COMPLETE = "yes"
Row = dict[str, Any]
LEGEND = """\
Test prompts. Accuracy and win rate over the base: mean of the seeds ± half of a 95 % interval, which covers new
seeds and new prompts. All methods see the same prompts, so differences between methods are a little surer than
these intervals. Tasks: mean ± deviation over seeds. Rate: learning rate, tuned on validation prompts. Distance:
root mean square of the pixels' change from the base. Minutes: computed from an iteration's core-seconds, on 2
cores."""


@dataclass(frozen=True)
class Drawn:
    """Images of a model for all prompts of a split, with scores; a row per image.

    Attributes:
        prompt: (N,), index of the prompt.
        images: (N, 3, H, W), in [0, 1].
        scores: Reward -> (N,).
    """

    prompt: Tensor
    images: Tensor
    scores: Mapping[str, Tensor]


@cache
def prompts(split: str, limit: int | None = None) -> list[Prompt]:
    """Read the prompts of a split; ``limit`` keeps some of every task."""
    found = load_prompts(ROOT / f"assets/prompts/shapes_{split}.jsonl")
    return found if limit is None else found[:: max(1, len(found) // limit)]


@cache
def base_model() -> DiffusionModel:
    """Load the embedded model."""
    return load_model(ROOT / "assets/shapes-sd3", max_sequence_length=16)


def draw(folder: Path | None, split: str, limit: int | None = None) -> Drawn:
    """Sample and score the prompts of a split with a run's weights, or the base's, from the same noise."""
    model, asked = base_model(), prompts(split, limit)
    own = torch.arange(len(asked)).repeat_interleave(PER_PROMPT)
    keys = NoiseKeys(KeyedRNG(0), "evaluation", 0, own, torch.arange(len(own)) % PER_PROMPT)
    with torch.no_grad(), with_tuned_weights(model, folder):
        plan = SamplingPlan(ode_plan(STEPS), model.levels(STEPS))
        conditioning = model.encode([p.text for p in asked])
        images = torch.cat([found for _, found in generate(model, plan, conditioning, own, keys, BATCH)])
    rows = [asked[i] for i in own.tolist()]
    texts, metadata = [p.text for p in rows], [p.metadata for p in rows]
    scores = {name: get_reward(name)(images, texts, metadata) for name in ("shapes_strict", "shapes")}
    return Drawn(own, images, scores)


@cache
def base_images(split: str, limit: int | None = None) -> Drawn:
    """Sample a split with the base weights, once."""
    return draw(None, split, limit)


def evaluate(folder: Path, split: str, limit: int | None = None) -> Row:
    """Return ``FIGURES`` of a run on a split; intervals are 95 % ones over prompts."""
    own, base = draw(folder, split, limit), base_images(split, limit)
    strict = own.scores["shapes_strict"]
    interval = mean_interval(strict, own.prompt)
    wins = win_rate(own.scores["shapes"], base.scores["shapes"], own.prompt).rate
    asked = prompts(split, limit)
    tags = [str(asked[i].metadata["tag"]) for i in own.prompt.tolist()]
    tasks = {f"accuracy/{tag}": _mean(strict, tags, tag) for tag in TAGS}
    difference = (own.images - base.images).double().square().flatten(1).mean(1).sqrt().mean().item()
    return {
        "accuracy": interval.mean, "low": interval.low, "high": interval.high, **tasks,
        "base": base.scores["shapes_strict"].mean().item(),
        "win_rate": wins.mean, "win_low": wins.low, "win_high": wins.high,
        "diversity": pairwise_distance(own.images, own.prompt), "distance": difference,
        "shapes": own.scores["shapes"].mean().item(),
    }  # fmt: skip


def _mean(values: Tensor, tags: Sequence[str], tag: str) -> float:
    return values[torch.tensor([own == tag for own in tags])].mean().item()


# The file of rows -----------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """Read the rows. ValueError: another version of this study wrote them."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} has other columns than this study: rename it, or check out the study that wrote it"
            )
        return [row for row in reader if row["complete"] == COMPLETE]  # a crash may cut a line


def append(path: Path, rows: Sequence[Row]) -> None:
    """Append rows in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.is_file() or not path.stat().st_size
    cut = not fresh and not path.read_bytes().endswith(b"\n")
    with path.open("a", newline="") as file:
        if cut:
            file.write("\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        last = {"complete": COMPLETE}
        writer.writerows([{**row, "learning_rate": rate_text(row["learning_rate"]), **last} for row in rows])
        file.flush()
        os.fsync(file.fileno())


def rate_text(rate: object) -> str:
    """Format a learning rate as rows name it."""
    return f"{float(str(rate)):.4g}"


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what identifies a row."""
    return tuple(rate_text(row[name]) if name == "learning_rate" else str(row[name]) for name in KEY)


# Table and picture ----------------------------------------------------------------------------------------------------


def chosen(rows: Sequence[Row], budget: str) -> dict[str, list[Row]]:
    """Return method -> test rows of all seeds at the learning rate that won on validation, for current settings."""
    found: dict[str, list[Row]] = {}
    for name, method in METHODS.items():
        wanted = (name, budget, method.digest(budget))
        own = [row for row in rows if (row["method"], row["budget"], row["settings"]) == wanted]
        tuning = [r for r in own if r["split"] == "validation" and r["seed"] == "0"]
        if tuning:
            best = max(tuning, key=lambda r: float(r["accuracy"]))["learning_rate"]
            found[name] = [r for r in own if r["split"] == "test" and r["learning_rate"] == best]
    return {name: runs for name, runs in found.items() if runs}


def interval(runs: Sequence[Row], mean: str, low: str, high: str) -> tuple[float, float]:
    """Return the mean over seeds and half its 95 % interval, which covers new seeds and new prompts.

    Seeds share their prompts, so the error over prompts is that of one run. One seed says nothing about others: NaN.
    """
    values = [float(run[mean]) for run in runs]
    over_prompts = statistics.mean(float(run[high]) - float(run[low]) for run in runs) / 2
    if len(values) < 2:
        return values[0], math.nan
    quantile = QUANTILES.get(len(values) - 1, 2.0)
    return statistics.mean(values), math.hypot(over_prompts, quantile * statistics.stdev(values) / len(values) ** 0.5)


def title(budget: str) -> str:
    """Return what a budget is."""
    limits = BUDGETS[budget]
    if limits.images is not None:
        return f"{limits.images:,} images"
    if limits.evaluations is not None:
        return f"{limits.evaluations:,} evaluations of the denoiser"
    return f"{budget[:-3]} minutes on 2 cores"


def table(rows: Sequence[Row]) -> str:
    """Format a table per budget: test figures, most accurate method first."""
    parts = []
    for budget in BUDGETS:
        found = chosen(rows, budget)
        if not found:
            continue
        ordered = sorted(found.items(), key=lambda item: -statistics.mean(float(r["accuracy"]) for r in item[1]))
        lines = [_header(budget, found), *(_line(name, runs) for name, runs in ordered)]
        parts.append("\n".join(lines))
    return "\n\n".join([LEGEND, *parts]) + "\n" if parts else ""


def _header(budget: str, found: Mapping[str, list[Row]]) -> str:
    bases = [float(run["base"]) for runs in found.values() for run in runs]
    tags = " | ".join(TAGS)
    columns = (
        f"method | accuracy, % | {tags} | win rate, % | diversity | distance | minutes | evaluations | rate | seeds"
    )
    rule = "|---|" + "---:|" * (len(TAGS) + 8)
    return f"**{title(budget)}** (base {100 * statistics.mean(bases):.1f} %)\n\n| {columns} |\n{rule}"


def _line(name: str, runs: Sequence[Row]) -> str:
    mean = lambda column: statistics.mean(float(run[column]) for run in runs)  # noqa: E731
    cells = [
        name,
        _plus_minus(*interval(runs, "accuracy", "low", "high")),
        *(spread([float(run[f"accuracy/{tag}"]) for run in runs], 100, 0) for tag in TAGS),
        _plus_minus(*interval(runs, "win_rate", "win_low", "win_high")),
        f"{mean('diversity'):.3f}",
        f"{mean('distance'):.3f}",
        f"{mean('minutes'):.1f}",
        f"{mean('evaluations'):,.0f}",
        f"{float(runs[0]['learning_rate']):g}",
        str(len(runs)),
    ]
    return f"| {' | '.join(cells)} |"


def _plus_minus(mean: float, half: float) -> str:
    return f"{100 * mean:.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def picture(rows: Sequence[Row], path: Path) -> None:
    """Plot test accuracy per method, a panel per budget: a dot per seed, a bar for the interval."""
    panels = {budget: found for budget in BUDGETS if (found := chosen(rows, budget))}
    names = [name for name in METHODS if any(name in found for found in panels.values())]
    figure = Figure(figsize=(2.4 + 2.6 * len(panels), 1.0 + 0.26 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    (axes_row,) = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)
    for axes, (budget, found) in zip(axes_row, panels.items(), strict=True):
        for name, runs in found.items():
            place, color = names.index(name), "#1f5fa8" if name.startswith(REFERENCE) else "#202327"
            mean, half = interval(runs, "accuracy", "low", "high")
            if not math.isnan(half):
                axes.plot([100 * (mean - half), 100 * (mean + half)], [place, place], color="#b9c7da", linewidth=5)
            axes.plot([100 * float(run["accuracy"]) for run in runs], [place] * len(runs), "o", color=color, ms=3.5)
        base = statistics.mean(float(run["base"]) for runs in found.values() for run in runs)
        axes.axvline(100 * base, color="#404040", linewidth=0.8, linestyle="--")
        axes.set_title(title(budget), fontsize=9, loc="left")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="#e3e3e3", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    axes_row[0].invert_yaxis()
    figure.supxlabel("accuracy on test prompts, %; dashed: the base; dots: seeds; bars: 95 % intervals", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def render(rows: Sequence[Row], table_path: Path, picture_path: Path) -> str:
    """Write table and picture of all finished runs; return the table, empty if there is none."""
    text = table(rows)
    if text:
        table_path.write_text(text)
        picture(rows, picture_path)
    return text
