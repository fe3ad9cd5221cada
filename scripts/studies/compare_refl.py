"""Compare gain and cost of all presets of direct reward gradients on the embedded world.

    python scripts/studies/compare_refl.py                            # all presets; hours, goes on where it stopped
    python scripts/studies/compare_refl.py --variants draft_1 drtune  # some of them
    python scripts/studies/compare_refl.py --factors 0.5 1 2          # learning rates tuned for each, at twice the cost
    python scripts/studies/compare_refl.py --judge vqascore           # another judge trains, the rest are held out
    python scripts/studies/compare_refl.py --draw                     # the table and the picture of what is finished

Every run takes as many images as the others. With several ``--factors`` of the learning rate, the one of the best
held-out reward, not of the verifier, on the first seed runs with the other seeds too. ``--jobs`` runs go side by side,
each on its share of the cores. Writes ``assets/results/refl.csv`` (a line per run), ``refl.md`` (the README's table)
and ``assets/pictures/refl.png``: trained reward, held-out ones, the verifier's accuracy and diversity, as changes, red
where an alarm rang.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.config import load_yaml
from diffalign.runtime.tracking import MetricsLog
from scripts import ROOT
from scripts.studies import trials
from scripts.studies.repeat_seeds import spread

CONFIGS = ROOT / "configs/refl"
CSV = ROOT / "assets/results/refl.csv"
TABLE = ROOT / "assets/results/refl.md"
PICTURE = ROOT / "assets/pictures/refl.png"
STEPS = 40
JUDGES: dict[str, dict[str, object]] = {
    "pickscore": {"path": "assets/judges/pickscore", "tokenizer": "assets/judges/pickscore"},
    "hpsv2.1": {"path": "assets/judges/hps"},
    "vqascore": {
        "path": "assets/judges/vqascore",
        "tokenizer": "assets/judges/vqascore",
        "answer": "yes_no",
        "precision": "no",
    },
}
# It knows no captions: what trains on it shows what the alarm is for.
WEAK = {"aesthetic": {"path": "assets/judges/aesthetic/aesthetic-model.pth", "clip": "assets/judges/pickscore"}}
THRESHOLDS = {"pickscore": 16.0, "hpsv2.1": 0.9, "vqascore": 1.0}

LARGER = {"rollout_batch_size": 32}  # but for DRTune, which draws its steps for each batch, and needs many draws
# Variant -> its configuration, and what differs from it.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "refl": ("shapes_published", {}),
    "refl_script": ("shapes_leapalign", {"recipe.preset": "refl_script"}),
    "draft_1": ("shapes", {"recipe.preset": "draft_1", **LARGER}),
    "draft_k": ("shapes", {"recipe.preset": "draft_k", **LARGER}),
    "draft_lv": ("shapes", {"recipe.preset": "draft_lv", **LARGER}),
    "alignprop": ("shapes", {"recipe.preset": "alignprop", **LARGER}),
    "drtune": ("shapes", {}),
    "imagerefl": ("shapes_imagerefl", {}),
    "direct_align": ("shapes_leapalign", {"recipe.preset": "direct_align"}),
    "srpo": ("shapes_srpo", {}),
    "leapalign": ("shapes_leapalign", {}),
    "reneg": ("shapes_reneg", {}),
    "drtune, epsilon": ("shapes_sd", {}),
    "drtune, aesthetic": ("shapes", {}),
}
OWN_JUDGE = {"drtune, aesthetic": "aesthetic"}  # instead of the one that the others train on
FIGURES = ("accuracy", *JUDGES, *WEAK, "diversity", "reference_distance")
COLUMNS = (
    *("variant", "judge", "factor", "learning_rate", "seed", "images", "minutes", "peak_memory_gib"),
    *("gain", "alarms", "sharpness_ratio"),
    *(f"{name}/{when}" for name in FIGURES for when in ("base", "tuned")),
)


@dataclass(frozen=True)
class Run:
    """One training of one variant."""

    variant: str
    judge: str
    factor: float
    seed: int

    @property
    def config(self) -> Path:
        return CONFIGS / f"{VARIANTS[self.variant][0]}.yaml"

    @property
    def trains(self) -> str:
        """Name of the reward that gives the gradient."""
        return OWN_JUDGE.get(self.variant, self.judge)

    @property
    def learning_rate(self) -> float:
        settings = load_yaml(self.config) | VARIANTS[self.variant][1]
        return float(settings["learning_rate"]) * self.factor

    def folder(self, root: Path) -> Path:
        name = f"{self.variant}-{self.judge}-{self.factor:g}-{self.seed}"
        return root / name.replace(" ", "_").replace(",", "")

    def command(self, root: Path) -> list[str]:
        config = load_yaml(self.config)
        others = {name: {"options": options} for name, options in JUDGES.items() if name != self.trains}
        images = config["num_groups"] * config.get("group_size", 1)
        changes: dict[str, object] = {
            **VARIANTS[self.variant][1],
            "rewards": json.dumps({self.trains: {"options": (JUDGES | WEAK)[self.trains]}}),
            "held_out": json.dumps(others),
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "output_dir": self.folder(root),
            "max_train_steps": STEPS,
            "eval_steps": STEPS // 2,
            "checkpointing_steps": 0,
        }
        assert images == 64, f"{self.config} takes {images} images per step, the others 64"
        if "thresholds" in config:
            changes["thresholds"] = json.dumps({self.judge: THRESHOLDS[self.judge]})
        return trials.train_command("refl", self.config, changes)

    def row(self, root: Path) -> trials.Row:
        folder = self.folder(root)
        rows = MetricsLog.read(folder / "metrics.jsonl")
        found = [row for row in rows if "eval/accuracy" in row]
        base, tuned = found[0], found[-1]
        seconds = sum(row.get("time/collect", 0.0) + row["time/update"] for row in rows if "time/update" in row)
        config = load_yaml(folder / "config.yaml")
        sharp = f"eval/sharpness/{self.trains}"
        head = {
            "variant": self.variant,
            "judge": self.judge,
            "factor": self.factor,
            "learning_rate": float(f"{self.learning_rate:.3g}"),
            "seed": self.seed,
            "images": tuned["step"] * config["num_groups"] * config["group_size"],
            "minutes": round(seconds / 60, 2),
            "peak_memory_gib": trials.peak_memory(folder),
            "alarms": sum(bool(row["eval/alarm"]) for row in found),
            "sharpness_ratio": tuned[sharp] / base[sharp],
            "gain": tuned["eval/accuracy"] - base["eval/accuracy"],
        }
        ends = {"base": base, "tuned": tuned}
        return head | {f"{n}/{when}": row.get(f"eval/{n}") for n in FIGURES for when, row in ends.items()}


def chosen_by(row: trials.Row) -> float:
    """Compute the learning-rate criterion: the gain in held-out rewards, each relative to its score on the base."""
    names = [name for name in JUDGES if name != row["judge"]]
    return statistics.mean((row[f"{n}/tuned"] - row[f"{n}/base"]) / abs(row[f"{n}/base"]) for n in names)


def best_factor(root: Path, variant: str, judge: str, seed: int, factors: Sequence[float]) -> float:
    return max(factors, key=lambda factor: chosen_by(Run(variant, judge, factor, seed).row(root)))


def every(seeds: Sequence[int], factors: Sequence[float]) -> list[Run]:
    return [Run(v, j, f, s) for v in VARIANTS for j in JUDGES for f in factors for s in seeds]


def markdown(rows: Sequence[trials.Row], judge: str) -> str:
    """A line per variant: means over seeds, the verifier's accuracy with its deviation; before and after the arrow base
    and tuned model. "distance": to the reference. "alarms": evaluations of all seeds at which one rang. "minutes": of
    training alone.
    """
    figures = {judge: 2, **{name: 3 for name in JUDGES if name != judge}, "diversity": 3}
    lines = [
        f"| | accuracy, % | gain, points | {' | '.join(figures)} | distance | alarms | GiB | minutes |",
        "|---|" + "---:|" * (len(figures) + 6),
    ]
    for name in dict.fromkeys(str(row["variant"]) for row in rows):
        own = [row for row in rows if row["variant"] == name]
        mean = {key: statistics.mean(row[key] for row in own) for key in own[0] if isinstance(own[0][key], float)}
        cells = [
            name,
            f"{100 * mean['accuracy/base']:.1f} → {spread([row['accuracy/tuned'] for row in own], 100)}",
            spread([row["gain"] for row in own], 100),
            *(f"{mean[f'{n}/base']:.{digits}f} → {mean[f'{n}/tuned']:.{digits}f}" for n, digits in figures.items()),
            f"{mean['reference_distance/tuned']:.3f}",
            f"{sum(row['alarms'] for row in own)}",
            f"{max(row['peak_memory_gib'] for row in own):.2f}",
            f"{mean['minutes']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[trials.Row], judge: str) -> None:
    """Plot a row of bars per variant in three panels: trained reward, held-out rewards, accuracy; dots are seeds."""
    held_out = [name for name in JUDGES if name != judge]
    panels = {
        f"{judge} (trained)": judge,
        **{f"{name} (held out)": name for name in held_out},
        "accuracy, points": "accuracy",
        "diversity": "diversity",
    }
    names = list(dict.fromkeys(str(row["variant"]) for row in rows))
    figure = Figure(figsize=(2.5 * len(panels) + 1, 0.9 + 0.3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, key) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        factor = 100 if key == "accuracy" else 1
        for place, name in enumerate(names):
            own = [row for row in rows if row["variant"] == name]
            gains = [factor * (row[f"{key}/tuned"] - row[f"{key}/base"]) for row in own]
            rang = any(row["alarms"] for row in own)
            axes.barh(place, statistics.mean(gains), color="#e3a6a2" if rang else "#b9c7da", height=0.7)
            axes.plot(gains, [place] * len(gains), "o", color="#202327", markersize=3.5)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.axvline(0, color="#404040", linewidth=0.8)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", color="#e3e3e3", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.supxlabel("change from base to tuned; red: an alarm rang in a run", fontsize=8)
    trials.save(figure, PICTURE)


def write(root: Path, seeds: Sequence[int], factors: Sequence[float], judge: str) -> None:
    rows = trials.finished(every(seeds, factors), root)
    trials.write_csv(CSV, COLUMNS, rows)
    if reported := [row for row in trials.tuned(rows, ("variant", "judge")) if row["judge"] == judge]:
        TABLE.write_text(markdown(reported, judge))
        draw(reported, judge)
        print(TABLE.read_text(), end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--judge", choices=list(JUDGES), default="pickscore")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0], help="of the learning rate")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/refl_recipes"))
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    root, first = args.output_dir, args.seeds[0]
    if not args.draw:
        tries = [Run(name, args.judge, factor, first) for name in args.variants for factor in args.factors]
        trials.work(tries, root, args.jobs)
        best = {name: best_factor(root, name, args.judge, first, args.factors) for name in args.variants}
        chosen = [Run(name, args.judge, best[name], seed) for name in args.variants for seed in args.seeds]
        trials.work(chosen, root, args.jobs)
    write(root, args.seeds, args.factors, args.judge)


if __name__ == "__main__":
    main()
