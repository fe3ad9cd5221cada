"""Run many short trainings side by side, resume them, and plot their results.

A trial is one training. Its learning rate is tuned: the best of several factors on the first seed, which then runs with
the other seeds too.
"""

from __future__ import annotations

import csv
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scripts import ROOT

Row = dict[str, object]
COST = "cost.json"
# A process of few megabytes starts the training and prints its peak in KiB: the peak that a system reports begins at
# the size of the process that started it.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)
sys.exit(code if code >= 0 else 1)
"""


class Trial(Protocol):
    """One training. ``row``: its figures, among them "gain", a share of held-out accuracy."""

    def folder(self, root: Path) -> Path: ...

    def command(self, root: Path) -> list[str]: ...

    def row(self, root: Path) -> Row: ...


def train_command(trainer: str, config: Path, changes: Mapping[str, object]) -> list[str]:
    """Build the command that trains with some fields of ``config`` changed."""
    options = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / f"scripts/train_{trainer}.py"), "--config", str(config), *options]


def done(trial: Trial, root: Path) -> bool:
    """Return whether a run is finished: the model card is the last file that it writes."""
    return (trial.folder(root) / "README.md").is_file()


def work(
    trials: Sequence[Trial], root: Path, jobs: int, *, threads: int | None = None, go_on: bool = False
) -> list[str]:
    """Train the unfinished trials, ``jobs`` at a time, each on its share of the cores.

    Args:
        trials: The trials.
        root: Folder of their runs and logs.
        jobs: Number of trials at a time.
        threads: Threads of each training; default: one per core of its share.
        go_on: Whether to train the others after a failure.

    Returns:
        The failures, each with the name of its log.

    Raises:
        RuntimeError: One failed, without ``go_on``.
    """
    root = root.resolve()  # trainings begin in the repository, where their configurations' paths do
    waiting: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    for trial in trials:
        if not done(trial, root):
            waiting.put(trial)
    total, failed = waiting.qsize(), []
    cores = sorted(os.sched_getaffinity(0))
    root.mkdir(parents=True, exist_ok=True)

    def worker(own: list[int]) -> None:
        while go_on or not failed:
            try:
                trial = waiting.get_nowait()
            except queue.Empty:
                return
            name = trial.folder(root).name
            log = root / f"{name}.log"
            if code := _train(trial, root, own, log, threads):
                failed.append(f"{log} (exit {code})")
                print(f"failed: {failed[-1]}", flush=True)
                continue
            try:
                gain = 100 * trial.row(root)["gain"]
            except Exception as error:  # what one run left must not end the others
                if not go_on:
                    raise
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
                print(f"failed: {failed[-1]}", flush=True)
                continue
            print(f"{total - waiting.qsize()}/{total} {name}: {gain:+.1f}", flush=True)

    workers = [threading.Thread(target=worker, args=(cores[i::jobs] or cores,)) for i in range(jobs)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    if failed and not go_on:
        raise RuntimeError(f"failed: {', '.join(failed)}")
    return failed


def _train(trial: Trial, root: Path, cores: Sequence[int], log: Path, threads: int | None = None) -> int:
    """Run a trial on these cores; record its peak memory and core-seconds, and return its exit code."""
    env = None if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", MEASURED, *trial.command(root)],
            stdout=subprocess.PIPE,
            stderr=file,
            cwd=ROOT,
            env=env,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        printed = process.communicate()[0]
    if process.returncode == 0:
        peak, seconds = printed.split()
        cost = {"peak_memory_gib": int(peak) / 2**20, "core_seconds": float(seconds)}
        (trial.folder(root) / COST).write_text(json.dumps(cost) + "\n")
    return process.returncode


def peak_memory(folder: Path) -> float | None:
    """Return the peak GiB of the training process; None if it did not run from here to its end."""
    return json.loads((folder / COST).read_text())["peak_memory_gib"] if (folder / COST).is_file() else None


def core_seconds(folder: Path) -> float:
    """Return the seconds that all cores together spent on a training that ran from its start to its end."""
    return float(json.loads((folder / COST).read_text())["core_seconds"])


def finished(trials: Sequence[Trial], root: Path) -> list[Row]:
    """List the rows of finished trials."""
    return [trial.row(root) for trial in trials if done(trial, root)]


def tuned(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Select the rows at each variant's tuned learning rate: the one that has more seeds than the first.

    names: the columns that name a variant.
    """
    key = lambda row: (*(row[name] for name in names), row["factor"])  # noqa: E731
    seeds = Counter(map(key, rows))
    return [row for row in rows if seeds[key(row)] > 1]


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write a line per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def canvas(entries: int, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure with a line per entry, the first on top, and panels side by side."""
    figure = Figure(figsize=(8, 0.9 + 0.24 * entries), layout="constrained")
    FigureCanvasAgg(figure)
    (row,) = figure.subplots(1, panels, sharey=True, squeeze=False)
    for axes in row:
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="#e3e3e3", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(row)


def gain_bars(axes: Axes, gains: Mapping[str, Sequence[float]], own: str, label: str) -> None:
    """Plot a bar for the mean of each entry, in points, and a dot per seed; ``own`` is the baseline."""
    for place, (name, values) in enumerate(gains.items()):
        points = [100 * value for value in values]
        mean = statistics.mean(points)
        axes.barh(place, mean, color="#1f5fa8" if name == own else "#b9c7da", height=0.7)
        axes.plot(points, [place] * len(points), "o", color="#202327", markersize=3.5)
        if name == own:
            axes.axvline(mean, color="#1f5fa8", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(gains)), gains, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="#404040", linewidth=0.8)
    axes.set_xlabel(label, fontsize=8)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
