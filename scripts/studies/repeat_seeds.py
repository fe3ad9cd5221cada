"""Train a recipe on several seeds: its gain, its speed, and the spread over seeds.

    python scripts/studies/repeat_seeds.py  # the quickstart: three runs, one by one
    python scripts/studies/repeat_seeds.py --config configs/flow_grpo/shapes_long.yaml
    python scripts/studies/repeat_seeds.py --config configs/refl/shapes_draft_k.yaml  # the folder names the trainer
    python scripts/studies/repeat_seeds.py --check runs/shapes  # exit 1 unless accuracy rose well

A finished run in ``--output_dir`` counts as it is; remove its folder to repeat it. Each run evaluates the base and the
tuned weights on the validation prompts of its config, with the same noise, steps and guidance scale, and this script
the last weights on test prompts, which no setting is chosen on: ``--test_prompts``, or the file beside the validation
prompts. Writes ``assets/results/NAME_seeds.csv``, a line per validation, and ``NAME_test.csv``, a line for base and
tuned weights of each seed, where NAME is trainer and config, e.g. ``flow_grpo_shapes``; prints the table of either.
More than three validations a run are drawn in ``assets/pictures/NAME_seeds.png``, if its prompts have tasks.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.commands.evaluate import evaluate
from diffalign.commands.evaluate_config import EvaluationConfig
from diffalign.config import load_yaml
from diffalign.runtime.tracking import MetricsLog
from diffalign.shapes import TAGS
from scripts import ROOT

QUICKSTART = ROOT / "configs/flow_grpo/shapes.yaml"
LEAST_GAIN = 0.12  # of a single run of the quickstart; seeds and machines differ a little
TASKS = [f"accuracy/{tag}" for tag in TAGS]
EDITS = ("shapes_edit", "shapes_edit_kept", "source_similarity")
FIGURES = ("accuracy", *TASKS, "shapes", *EDITS, "pickscore", "hpsv2.1", "vqascore", "diversity")

TIMES = (("collect", "update"), ("save",))

Row = dict[str, Any]


def evaluations(folder: Path) -> list[Row]:
    """Read the evaluations of a run, with the training seconds up to each."""
    seed = load_yaml(folder / "config.yaml")["seed"]
    seconds, found = 0.0, []
    for row in MetricsLog.read(folder / "metrics.jsonl"):
        if "time/update" in row:
            seconds += row.get("time/collect", 0.0) + row["time/update"]  # data are collected once for several updates
        if "eval/accuracy" in row:
            figures = {name: row[f"eval/{name}"] for name in FIGURES if f"eval/{name}" in row}
            found.append({"seed": seed, "step": row["step"], "training_seconds": seconds, **figures})
    return found


def prompts_apart(config: Path) -> Path:
    """Return the test prompts that belong to the validation prompts of a configuration."""
    return ROOT / str(load_yaml(config)["eval_prompts"]).replace("validation", "test")


def tested(folder: Path, prompts: Path) -> list[Row]:
    """Evaluate base and last weights of a run on other prompts, or read it from the folder ``test`` of the run."""
    out = folder / "test"
    if not (out / "results.json").is_file():
        evaluate(EvaluationConfig(models=(f"tuned={folder}",), prompts=prompts, output_dir=out))
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))["models"]
    seed = load_yaml(folder / "config.yaml")["seed"]

    rows = []
    for weights in ("base", "tuned"):
        own = found[weights]
        rewards = {name: value["mean"] for name, value in own["rewards"].items()}
        tasks = {f"accuracy/{tag}": value["mean"] for tag, value in own["tasks"].items()}
        figures = {"accuracy": rewards[own["primary"]], **tasks, **rewards, "diversity": own["diversity"]["pixels"]}
        rows.append({"seed": seed, "weights": weights, **{k: figures[k] for k in FIGURES if k in figures}})
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def checkpoint_share(folder: Path) -> float:
    """Compute the share of a run's time spent on checkpoints, without evaluations; NaN if none was timed."""
    rows = MetricsLog.read(folder / "metrics.jsonl")
    work, saves = (sum(row.get(f"time/{name}", 0.0) for row in rows for name in names) for names in TIMES)
    return saves / (work + saves) if saves else math.nan


def spread(values: list[float], factor: float = 1.0, digits: int = 1) -> str:
    """Format mean and sample deviation."""
    deviation = statistics.stdev(values) * factor if len(values) > 1 else 0.0
    return f"{statistics.mean(values) * factor:.{digits}f} ± {deviation:.{digits}f}"


def table(runs: list[list[Row]]) -> str:
    """Build the README's table: the first and last evaluation, over the seeds."""
    lines = ["| | base | tuned |", "|---|---:|---:|"]
    for name in (name for name in FIGURES if name in runs[0][0]):
        factor, digits = (100, 1) if name.startswith("accuracy") else (1, 3)
        cells = [spread([run[place][name] for run in runs], factor, digits) for place in (0, -1)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    gains = [run[-1]["accuracy"] - run[0]["accuracy"] for run in runs]
    seconds = [run[-1]["training_seconds"] for run in runs if "training_seconds" in run[-1]]
    training = f"; training {spread(seconds, 1, 0)} s" if seconds else ""
    return "\n".join([*lines, "", f"gain {spread(gains, 100)} points{training}"])


def draw(runs: list[list[Row]], path: Path) -> None:
    """Plot accuracy over iterations for all prompts and per task, a thin line per seed and a thick mean."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 4, sharex=True, sharey=True).flat
    for name, axes in zip(("accuracy", *TASKS), panels, strict=False):
        for run in runs:
            axes.plot([row["step"] for row in run], [100 * row[name] for row in run], color="#b9cfe6", linewidth=1)
        means = [100 * statistics.mean(row[name] for row in rows) for rows in zip(*runs, strict=True)]
        axes.plot([row["step"] for row in runs[0]], means, color="#1f5fa8", linewidth=1.8)
        axes.set_title("all prompts" if name == "accuracy" else name.removeprefix("accuracy/"), fontsize=9, loc="left")
        axes.annotate(f"{means[-1]:.0f}", (runs[0][-1]["step"], means[-1]), (0, 4), "data", "offset points", ha="right")
        axes.set_ylim(0, 100)
        axes.grid(color="#e3e3e3", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    next(panels).axis("off")
    figure.supxlabel("iteration", fontsize=9)
    figure.supylabel("held-out accuracy, %", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def check(folder: Path) -> int:
    """Print the gain of a run; return 1 if held-out accuracy rose by less than ``LEAST_GAIN``."""
    base, *_, tuned = evaluations(folder)
    for name in ("accuracy", "shapes", "diversity"):
        print(f"{folder}: {name} {base[name]:.3f} -> {tuned[name]:.3f}")
    print(f"{folder}: checkpoints took {checkpoint_share(folder):.2%} of the training's time")
    return int(tuned["accuracy"] - base["accuracy"] < LEAST_GAIN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, help="default: runs/NAME_seeds")
    parser.add_argument("--test_prompts", type=Path, help="default: those of the config's validation prompts")
    parser.add_argument("--check", type=Path, metavar="RUN")
    args, overrides = parser.parse_known_args()
    if args.check:
        return check(args.check)
    trainer = args.config.parent.name
    name = f"{trainer}_{args.config.stem}"
    prompts = args.test_prompts or prompts_apart(args.config)
    runs, tests = [], []
    for seed in args.seeds:
        folder = (args.output_dir or Path("runs") / f"{name}_seeds") / f"seed-{seed}"
        if not (folder / "README.md").is_file():  # the last file that a run writes
            options = ["--config", str(args.config), "--seed", str(seed), "--output_dir", str(folder), *overrides]
            script = ROOT / f"scripts/train_{trainer}.py"
            subprocess.run([sys.executable, str(script), *options], check=True)
        runs.append(evaluations(folder))
        tests.append(tested(folder, prompts))
    write(ROOT / f"assets/results/{name}_seeds.csv", [row for run in runs for row in run])
    write(ROOT / f"assets/results/{name}_test.csv", [row for pair in tests for row in pair])
    if len(runs[0]) > 3 and TASKS[0] in runs[0][0]:
        draw(runs, ROOT / f"assets/pictures/{name}_seeds.png")
    print(f"validation prompts\n\n{table(runs)}\n\n{prompts.name}\n\n{table(tests)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
