"""Compare policy-gradient, forward-process and online preference methods on the embedded world, at equal budgets.

    python scripts/studies/compare_policy_methods.py --jobs 1                      # all; days, goes on where it stopped
    python scripts/studies/compare_policy_methods.py --methods nft awm --budget 6144
    python scripts/studies/compare_policy_methods.py --only_rates                  # learning rates alone, on validation
    python scripts/studies/compare_policy_methods.py --render                      # table and picture of what is there

Methods and budgets are tables in ``policy_methods.py``: equal images, equal evaluations of the denoiser, or equal
core-seconds, which a short training of each method measures. A learning rate is tuned per method and budget: by
accuracy on the validation prompts with seed 0, among the method's rates and at most two beyond them; the best one then
runs with the other seeds. Figures are those on the test prompts, which nothing is chosen on. Runs evaluate nothing
while they train and use one core.

Every finished run appends two rows to ``assets/results/policy_methods.csv``, for validation and test; the costs are in
``policy_methods_cost.csv``. A run whose rows are there is not repeated, on whatever machine, without its folder. A
failed one is listed in ``failures.log`` of ``--output_dir``, and tried again by the next call. Writes
``assets/results/policy_methods.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.config import parse
from diffalign.forecast.cost import run_work
from diffalign.trainers.cost import Share
from diffalign.trainers.registry import find_algorithm
from scripts import ROOT
from scripts.studies import policy_results as results
from scripts.studies import trials
from scripts.studies.policy_methods import BUDGETS, METHODS, MINUTES_PER_ITERATION, REFERENCE, Method

TUNING_SEED = 0
BEYOND = 2  # rates to try beyond a method's, by factors of two
SHORT, LONGER = 2, 8  # iterations of the two trainings that measure what an iteration costs
SAMPLE = 24  # iterations over which evaluations are averaged: their number may change from one to the next
LOCK = threading.Lock()


@dataclass(frozen=True)
class Study:
    """Where a study keeps its runs and rows.

    Attributes:
        root: Folder of runs and logs.
        rows: File of the rows.
        jobs: Trainings at a time.
        scale: Share of each budget to train, for a try.
        limit: Number of prompts of each split to evaluate; None: all.
    """

    root: Path
    rows: Path = results.CSV
    jobs: int = 1
    scale: float = 1.0
    limit: int | None = None

    @property
    def costs(self) -> Path:
        """File of the core-seconds per iteration."""
        return self.rows.with_name(f"{self.rows.stem}_cost.csv")


@dataclass(frozen=True)
class Timing:
    """A short training of a method, which measures costs."""

    name: str
    budget: str
    iterations: int

    def folder(self, root: Path) -> Path:
        method = METHODS[self.name]
        return root / "timing" / f"{folder_name(self.name)}-{method.digest(self.budget)}-{self.iterations}"

    def command(self, root: Path) -> list[str]:
        return train(METHODS[self.name], self.budget, self.folder(root), self.iterations, 1e-5, 0)

    def row(self, root: Path) -> trials.Row:
        return {"gain": 0.0}


@dataclass(frozen=True)
class Run:
    """One training of one method under one budget."""

    study: Study
    name: str
    budget: str
    rate: float
    seed: int
    iterations: int
    cost: float  # core-seconds per iteration
    minutes: float

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    def folder(self, root: Path) -> Path:
        rate = results.rate_text(self.rate)
        names = (folder_name(self.name), self.method.digest(self.budget), self.iterations, rate, self.seed)
        return root / "-".join(map(str, names))

    def command(self, root: Path) -> list[str]:
        folder = self.folder(root)
        tried, latest = (
            folder.with_name(f"{folder.name}.resumed"),
            sorted(path.name for path in folder.glob("checkpoint-*")),
        )
        if latest and (not tried.is_file() or tried.read_text() != str(latest)):
            tried.write_text(str(latest))
            return [*self.fresh_command(root), "--resume_from_checkpoint", "latest"]
        # Stopped before its first checkpoint, or a resumed training took no step, e.g. for other settings.
        shutil.rmtree(folder, ignore_errors=True)
        tried.unlink(missing_ok=True)
        return self.fresh_command(root)

    def fresh_command(self, root: Path) -> list[str]:
        """Build the command of the training from its start."""
        return train(self.method, self.budget, self.folder(root), self.iterations, self.rate, self.seed)

    def evaluations(self) -> int:
        """Count the training's evaluations of the denoiser."""
        entry = find_algorithm(self.method.trainer)
        config = parse(entry.config, self.fresh_command(self.study.root)[2:])
        assert entry.cost is not None
        return run_work(entry.cost, config, Share(), 0).evaluations

    def keyed(self, split: str) -> results.Row:
        """Return the columns that identify the run's row of a split."""
        values = (self.name, self.method.digest(self.budget), self.budget, self.rate, self.seed, split)
        return dict(zip(results.KEY, values, strict=True))

    def row(self, root: Path) -> trials.Row:
        """Evaluate the finished run, and append its rows."""
        images = self.iterations * self.method.images_per_iteration(self.budget)
        work = {
            "iterations": self.iterations,
            "images": images,
            "evaluations": self.evaluations(),
            "core_seconds": round(self.cost, 4),
            "minutes": round(self.minutes, 2),
        }
        with LOCK:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            figures = {s: results.evaluate(self.folder(root), s, self.study.limit) for s in results.SPLITS}
            torch.set_num_threads(threads)
            known = {results.key(row) for row in results.read(self.study.rows)}
            rows = [{**self.keyed(split), **work, **figures[split]} for split in results.SPLITS]
            results.append(self.study.rows, [row for row in rows if results.key(row) not in known])
        return {"gain": figures["validation"]["accuracy"] - figures["validation"]["base"]}


def folder_name(name: str) -> str:
    """Return a method's name without characters that a folder name should not have."""
    return name.replace(", ", "-").replace(" ", "_")


def train(method: Method, budget: str, folder: Path, iterations: int, rate: float, seed: int) -> list[str]:
    """Build the command of a training without evaluations."""
    changes = {
        **method.fixed(budget), "learning_rate": rate, "seed": seed, "output_dir": folder, "eval_prompts": "null",
        "eval_steps": 0, "checkpointing_steps": 100, "max_train_steps": iterations,
    }  # fmt: skip
    return trials.train_command(method.trainer, method.path, changes)


# Costs ----------------------------------------------------------------------------------------------------------------


def cost(study: Study, name: str, budget: str) -> float:
    """Return the core-seconds of an iteration, as recorded or else measured by two short trainings."""
    settings = METHODS[name].digest(budget)
    if study.costs.is_file():
        with study.costs.open(newline="") as file:
            for row in csv.DictReader(file):
                if (row["method"], row["settings"]) == (name, settings):
                    return float(row["core_seconds"])
    pair = [Timing(name, budget, iterations) for iterations in (SHORT, LONGER)]
    root = study.root.resolve()
    for timing in pair:
        shutil.rmtree(timing.folder(root), ignore_errors=True)
        timing.folder(root).parent.mkdir(parents=True, exist_ok=True)
    trials.work(pair, study.root, 1, threads=1)

    low, high = (trials.core_seconds(timing.folder(root)) for timing in pair)
    found = max(high - low, 1e-3) / (LONGER - SHORT)
    fresh = not study.costs.is_file()
    study.costs.parent.mkdir(parents=True, exist_ok=True)
    with study.costs.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(["method", "settings", "core_seconds"])
        writer.writerow([name, settings, f"{found:.4f}"])
    return found


def planned(study: Study, name: str, budget: str) -> Callable[[float, int], Run]:
    """Return a function (learning rate, seed) -> run, of as many iterations as the budget gives this method."""
    limits, each = BUDGETS[budget], cost(study, name, budget)
    reference = cost(study, REFERENCE, "6144")
    if limits.images is not None:
        iterations = limits.images / METHODS[name].images_per_iteration(budget)
    elif limits.evaluations is not None:
        low, high = (Run(study, name, budget, 1e-5, 0, n * SAMPLE, 0, 0).evaluations() for n in (1, 2))
        iterations = SAMPLE + (limits.evaluations - low) * SAMPLE / (high - low)  # without what a run does once
    else:
        iterations = limits.reference * reference / each
    count = max(1, round(iterations * study.scale))
    minutes = count * each / reference * MINUTES_PER_ITERATION
    return lambda rate, seed: Run(study, name, budget, rate, seed, count, each, minutes)


# Runs -----------------------------------------------------------------------------------------------------------------


def finish(study: Study, runs: Sequence[Run]) -> None:
    """Train and evaluate the runs that have no rows yet; log failures, and go on."""
    rows = results.read(study.rows)
    known = {results.key(row) for row in rows}
    missing = [run for run in runs if any(results.key(run.keyed(split)) not in known for split in results.SPLITS)]
    waiting, failed = [], []
    for run in missing:
        if same := _equal_rows(run, rows):
            results.append(study.rows, same)
        elif trials.done(run, study.root.resolve()):
            try:
                run.row(study.root.resolve())
            except Exception as error:  # a damaged folder must not end the study
                failed.append(f"{run.folder(study.root)}: {type(error).__name__}: {str(error)[:500]}")
        else:
            waiting.append(run)

    failed += trials.work(waiting, study.root, study.jobs, threads=1, go_on=True)
    if failed:
        study.root.mkdir(parents=True, exist_ok=True)
        with (study.root / "failures.log").open("a") as file:
            file.writelines(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n" for line in failed)


def _equal_rows(run: Run, rows: Sequence[results.Row]) -> list[results.Row]:
    """Return the rows of the same training under another budget's name, renamed; empty if there is none."""
    found = []
    for split in results.SPLITS:
        wanted = run.keyed(split) | {"budget": ""}
        for row in rows:
            if results.key(row | {"budget": ""}) == results.key(wanted) and int(row["iterations"]) == run.iterations:
                found.append(row | {"budget": run.budget})
                break
    return found if len(found) == len(results.SPLITS) else []


def accuracies(study: Study, name: str, budget: str) -> dict[float, float]:
    """Return rate -> validation accuracy of the tuning seed."""
    wanted = (name, METHODS[name].digest(budget), budget, str(TUNING_SEED), "validation")
    columns = ("method", "settings", "budget", "seed", "split")
    rows = [row for row in results.read(study.rows) if tuple(row[column] for column in columns) == wanted]
    return {float(row["learning_rate"]): float(row["accuracy"]) for row in rows}


def best_rate(study: Study, name: str, budget: str) -> float | None:
    """Return the rate of the highest validation accuracy; None if no training finished."""
    found = accuracies(study, name, budget)
    return max(found, key=lambda rate: found[rate]) if found else None


def tune(study: Study, name: str, budget: str, make: Callable[[float, int], Run]) -> None:
    """Try a method's learning rates, then further ones while the best is at an end of those tried."""
    near = BUDGETS[budget].near
    found = best_rate(study, name, near) if near else None
    rates = METHODS[name].rates if found is None else (found / 2, found)
    finish(study, [make(rate, TUNING_SEED) for rate in rates])
    for _ in range(BEYOND):
        tried, best = accuracies(study, name, budget), best_rate(study, name, budget)
        if best is None or min(tried) < best < max(tried):
            return
        finish(study, [make(best / 2 if math.isclose(best, min(tried)) else best * 2, TUNING_SEED)])


def compare(study: Study, names: Sequence[str], budgets: Sequence[str], seeds: Sequence[int], only_rates: bool) -> None:
    """Tune and train each method under each budget, the cheapest budget first; a method that fails is passed over."""
    for budget in budgets:
        for name in names:
            try:
                make = planned(study, name, budget)
            except RuntimeError as error:
                print(f"{name}, {budget}: not timed, passed over: {error}", flush=True)
                continue
            tune(study, name, budget, make)
            best = best_rate(study, name, budget)
            if best is not None and not only_rates:
                finish(study, [make(best, seed) for seed in seeds])
            results.render(results.read(study.rows), *outputs(study))


def outputs(study: Study) -> Iterator[Path]:
    """Yield the paths of the table and the picture, beside the rows."""
    return (study.rows.with_suffix(suffix) for suffix in (".md", ".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--budget", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--only_rates", action="store_true", help="tune learning rates, without the other seeds")
    parser.add_argument("--render", action="store_true", help="train nothing; write table and picture")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/policy_methods"))
    parser.add_argument("--rows", type=Path, default=results.CSV, help="file that finished runs are appended to")
    args = parser.parse_args()
    study = Study(args.output_dir.resolve(), args.rows.resolve(), args.jobs)
    os.chdir(ROOT)  # where the paths in configurations begin
    if not args.render:
        compare(study, args.methods, args.budget, args.seeds, args.only_rates)
    print(results.render(results.read(study.rows), *outputs(study)) or f"{study.rows}: no finished run yet")


if __name__ == "__main__":
    main()
