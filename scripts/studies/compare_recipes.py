"""Compare changes to the Flow-GRPO recipe on the embedded world, one at a time.

    python scripts/studies/compare_recipes.py                            # all of it; hours, goes on where it stopped
    python scripts/studies/compare_recipes.py --axes noise "group size"  # some of it
    python scripts/studies/compare_recipes.py --draw                     # the table and the picture of what is finished

Every variant changes one thing of the quickstart and trains on the same number of images. Its learning rate is tuned on
the first seed: two factors, and a third beyond the better one; the best then runs with the other seeds too. Each run
evaluates base and tuned weights on the same held-out prompts, noise, steps and guidance scale. ``--jobs`` runs go side
by side, each on its share of the cores. Writes ``assets/results/recipes.csv`` (a line per run) and
``assets/pictures/recipes.png``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.config import load_yaml
from scripts import ROOT
from scripts.studies import trials
from scripts.studies.repeat_seeds import QUICKSTART as CONFIG
from scripts.studies.repeat_seeds import evaluations

CSV = ROOT / "assets/results/recipes.csv"
PICTURE = ROOT / "assets/pictures/recipes.png"
STEPS = 24  # iterations of a run
FACTORS = (0.25, 0.5, 1.0, 2.0)  # of the learning rate, tried on the first seed: the middle ones, then one beyond
COLUMNS = ("axis", "variant", "factor", "learning_rate", "seed", "images", "base", "accuracy", "gain", "diversity")
WINDOW = {"plan.preset": "flow_grpo_fast", "plan.window_size": 2}
NO_WINDOW = {"plan.window_size": "null", "plan.window_range": "null"}

# The quickstart itself is the variant without changes; it is drawn beside every axis.
QUICKSTART = "quickstart"
AXES: dict[str, dict[str, dict[str, object]]] = {
    "": {QUICKSTART: {}},
    "trained steps": {
        "all": {"plan.preset": "flow_grpo", **NO_WINDOW},
        "random window": {**WINDOW, "plan.window_range": "[0, 7]"},
        "sliding window": {"plan.preset": "mix_grpo", "plan.window_range": "null", "plan.shift_every": 5},
        "first two": {"plan.preset": "first_steps", "plan.window_range": "null"},
        "fifth and sixth": {**WINDOW, "plan.window_range": "[4, 6]"},
    },
    "solver": {"cps": {"plan.solver": "cps"}, "dance_sde": {"plan.solver": "dance_sde"}},
    "noise": {str(level): {"plan.noise_level": level} for level in (0.35, 1.0)},
    "start noise": {"own": {"shared_start": "false"}},
    "guidance": {"2": {"guidance_scale": 2.0}},
    "group size": {str(size): {"group_size": size, "num_groups": 256 // size} for size in (4, 16)},
    "KL": {str(beta): {"kl_beta": beta} for beta in (0.03,)},
    "weights": {
        "rank 32": {"lora.rank": 32},
        "all": {"lora.rank": 0, "lora.targets": "null", "learning_rate": 1.5e-4},
    },
    "loss": {"GRPO-Guard": {"loss": "grpo_guard"}, "TempFlow weights": {"step_weights": "tempflow"}},
}


@dataclass(frozen=True)
class Run:
    """One training of one variant."""

    axis: str
    variant: str
    factor: float
    seed: int

    @property
    def changes(self) -> dict[str, object]:
        return AXES[self.axis][self.variant]

    @property
    def learning_rate(self) -> float:
        config = load_yaml(CONFIG)
        return float(self.changes.get("learning_rate", config["learning_rate"])) * self.factor

    def folder(self, root: Path) -> Path:
        name = f"{self.axis or 'all'}-{self.variant}-{self.factor:g}-{self.seed}"
        return root / name.replace(" ", "_")

    def command(self, root: Path) -> list[str]:
        changes = {
            **self.changes,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "output_dir": self.folder(root),
            "max_train_steps": STEPS,
            "eval_steps": 0,
            "checkpointing_steps": 0,
        }
        return trials.train_command("flow_grpo", CONFIG, changes)

    def row(self, root: Path) -> dict[str, object]:
        base, *_, tuned = evaluations(self.folder(root))
        config = load_yaml(self.folder(root) / "config.yaml")
        images = tuned["step"] * config["num_groups"] * config["group_size"]
        rate = float(f"{self.learning_rate:.3g}")
        gain = tuned["accuracy"] - base["accuracy"]
        figures = (base["accuracy"], tuned["accuracy"], gain, tuned["diversity"])
        return dict(
            zip(COLUMNS, (self.axis, self.variant, self.factor, rate, self.seed, images, *figures), strict=True)
        )


def best_factor(root: Path, axis: str, variant: str, seed: int) -> float:
    """Return the best learning-rate factor among those tried."""
    tried = {factor: Run(axis, variant, factor, seed) for factor in FACTORS}
    gains = {factor: run.row(root)["gain"] for factor, run in tried.items() if trials.done(run, root)}
    return max(gains, key=lambda factor: gains[factor])


def compare(axis: str, seeds: Sequence[int], root: Path, jobs: int) -> None:
    """Tune every variant of an axis on the first seed, then train it with all seeds."""
    lowest, low, high, highest = FACTORS

    def best() -> dict[str, float]:
        return {name: best_factor(root, axis, name, seeds[0]) for name in AXES[axis]}

    trials.work([Run(axis, name, factor, seeds[0]) for name in AXES[axis] for factor in (low, high)], root, jobs)
    beyond = {name: lowest if factor <= low else highest for name, factor in best().items()}
    trials.work([Run(axis, name, factor, seeds[0]) for name, factor in beyond.items()], root, jobs)
    trials.work([Run(axis, name, factor, seed) for name, factor in best().items() for seed in seeds], root, jobs)


def every(seeds: Sequence[int]) -> list[Run]:
    return [
        Run(axis, name, factor, seed)
        for axis, names in AXES.items()
        for name in names
        for factor in FACTORS
        for seed in seeds
    ]


def tuned(rows: Sequence[trials.Row]) -> list[trials.Row]:
    return trials.tuned(rows, ("axis", "variant"))


def draw(rows: Sequence[trials.Row]) -> None:
    """Plot gains at the tuned learning rate of complete variants: a dot per seed, a bar for their mean."""
    gains: dict[str, list[float]] = {}
    for row in tuned(rows):
        name = f"{row['axis']}: {row['variant']}" if row["axis"] else row["variant"]
        gains.setdefault(name, []).append(float(row["gain"]))
    figure, (axes,) = trials.canvas(len(gains))
    label = f"points of held-out accuracy gained with {STEPS * 256:,} images; dots are seeds"
    trials.gain_bars(axes, gains, QUICKSTART, label)
    trials.save(figure, PICTURE)


def write(root: Path, seeds: Sequence[int]) -> None:
    rows = trials.finished(every(seeds), root)
    trials.write_csv(CSV, COLUMNS, rows)
    if tuned(rows):
        draw(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=[axis for axis in AXES if axis], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    root = args.output_dir
    if not args.draw:
        for axis in ("", *(args.axes or [axis for axis in AXES if axis])):
            compare(axis, args.seeds, root, args.jobs)
            write(root, args.seeds)
    write(root, args.seeds)


if __name__ == "__main__":
    main()
