"""Benchmark the trainers on a GPU: SD3.5-medium, SDXL and FLUX.1-dev at published sizes, with random weights.

    python scripts/bench/gpu.py                                              # Flow-GRPO: every model, every setting
    python scripts/bench/gpu.py --trainer diffusion_dpo --models sdxl_1024 --settings plain compile
    python scripts/bench/gpu.py --size tiny --models sd35_medium_512         # a small model, on a CPU in seconds
    python scripts/bench/gpu.py --against ~/other --adapter adapter.py:prepare   # and through other code

Per model and setting: images (for Diffusion-DPO: pairs) per second while sampling, while training and of whole
iterations; evaluations of the denoiser per image; peak memory beside that of the rehearsal of --dry_run; and the
operations that the rehearsal counts, over the measured time, as a share of what the card reaches on large matrices in
the same run. Text encoders do not take part: prompts are random embeddings. A setting that does not run is recorded
with its reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation


from diffalign.atomic import replacing
from diffalign.cli import use_all_cores
from diffalign.device import synchronize
from scripts import ROOT
from scripts.bench.against import Adapter, load_adapter, measure_against
from scripts.bench.flow_grpo import device, peak_memory
from scripts.bench.gpu_models import CASES, CUDA, DEVICE, DTYPE, Case
from scripts.bench.gpu_runs import RUNS, Bench, Rehearsals, batched_times, beside
from scripts.bench.jobs import job_of

BATCHED = "batched_times"
# Each optimisation alone, then those that are free of charge together.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"attention": "auto"},
    "xformers": {"attention": "xformers"},
    "compile": {"compile": True},
    "checkpointing": {"gradient_checkpointing": True},
    BATCHED: {},  # the option's name is that of the trainer
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "base_4bit": {"quantise": "4bit"},
    "rewards_in_turn": {"overlap_rewards": False},
    "fast": {"attention": "auto", "compile": True},
}


def now() -> float:
    synchronize(DEVICE)
    return time.perf_counter()


def matrix_peak(side: int | None = None) -> float:
    """Measure the FLOP/s of the best of ten large square matrix multiplications in the training dtype."""
    side = side or (8192 if CUDA else 512)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    seconds = []
    for _ in range(11):
        started = now()
        a @ b
        seconds.append(now() - started)
    return 2 * side**3 / min(seconds[1:])


def measure(trainer: str, case: Case, size: str, setting: str, repeats: int) -> dict[str, Any]:
    """Measure a setting, or say why it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            changes = changes_of(trainer, setting)
            return Bench(trainer, case, size, changes, folder).figures(repeats)
        except (ValueError, RuntimeError, ImportError) as error:
            return {"refused": str(error).splitlines()[0]}


def changes_of(trainer: str, setting: str) -> dict[str, Any]:
    """Return the fields of a setting. ValueError: the trainer has no such option."""
    return batched_times(trainer) if setting == BATCHED else SETTINGS[setting]


def against(
    trainer: str,
    case: Case,
    size: str,
    checkout: Path,
    adapter: Adapter,
    rows: Mapping[str, Mapping[str, Any]],
    repeats: int,
) -> dict[str, Any]:
    """Measure the other code beside the first of our settings that ran."""
    ours = next((name for name, row in rows.items() if "refused" not in row), None)
    if ours is None:
        return {"refused": "none of our settings ran: there is nothing to compare with"}
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        job = job_of(trainer, case, size, checkout)
    except NotImplementedError as error:
        return {"refused": str(error)}
    found = measure_against(adapter, job, rows[ours], repeats, now)
    return {"setting": ours, **found, "peak_memory_gib": peak_memory()}


class Report:
    """The results file, rewritten after every row."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.file, self.models = args.write, dict[str, dict[str, dict[str, Any]]]()
        self.peak = matrix_peak()
        self.head = {
            "command": f"python scripts/bench/gpu.py {' '.join(sys.argv[1:])}",
            "trainer": args.trainer,
            "size": args.size,
            "device": device(),
            "torch": torch.__version__,
            "matrix_peak_flops_per_second": self.peak,
        }

    def set(self, model: str, row: str, found: dict[str, Any]) -> None:
        """Print a row, and write the results so far."""
        self.models.setdefault(model, {})[row] = found
        print(model, row, json.dumps(found), flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as staged:
            staged.write_text(json.dumps({**self.head, "models": self.models}, indent=1) + "\n")


class Waiting:
    """Rehearsals of rows, put beside what was measured as soon as both are known."""

    def __init__(self, report: Report, rehearsals: Rehearsals) -> None:
        self.report, self.rehearsals = report, rehearsals
        self.rows: dict[tuple[str, str], Future[dict[str, Any]]] = {}

    def start(self, trainer: str, model: str, setting: str) -> None:
        """Start to rehearse a setting, unless the trainer has no such option."""
        with suppress(ValueError):
            found = self.rehearsals.start(trainer, model, changes_of(trainer, setting))
            self.rows[model, setting] = found

    def settle(self, everything: bool = False) -> None:
        """Complete the rows whose rehearsal has ended, or all of them."""
        for (model, setting), rehearsal in list(self.rows.items()):
            row = self.report.models.get(model, {}).get(setting)
            if row is None or not (everything or rehearsal.done()):
                continue
            del self.rows[model, setting]
            if "refused" not in row:
                self.report.set(model, setting, beside(row, outcome(rehearsal), self.report.peak))


def outcome(rehearsal: Future[dict[str, Any]]) -> dict[str, Any]:
    """Wait for a rehearsal; return what it found, or why it found nothing: measurements are kept either way."""
    try:
        return rehearsal.result()
    except Exception as error:  # its process may have been killed
        return {"not_rehearsed": f"{type(error).__name__}: {error}"[:300]}


def run(args: argparse.Namespace, adapters: Mapping[str, Adapter]) -> None:
    """Measure every model and setting, then the other code; rehearsals run meanwhile."""
    report = Report(args)
    waiting = Waiting(report, Rehearsals(args.size))
    for name in args.models:
        case = CASES[name]
        for setting in args.settings:
            waiting.start(args.trainer, name, setting)
            report.set(name, setting, measure(args.trainer, case, args.size, setting, args.repeats))
            waiting.settle()
        for title, adapter in adapters.items():
            rows = {setting: report.models[name][setting] for setting in args.settings}
            found = against(args.trainer, case, args.size, args.against, adapter, rows, args.repeats)
            report.set(name, title, found)
            waiting.settle()
    waiting.settle(everything=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=RUNS, default="flow_grpo")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--size", choices=("published", "tiny"), default="published")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path, default=ROOT / "assets/results/bench_gpu.json")
    parser.add_argument("--against", type=Path, help="a checkout of another trainer's repository")
    parser.add_argument("--adapter", nargs="+", help="what drives it, file.py:function; see scripts/bench/against.py")
    args = parser.parse_args()
    if (args.against is None) != (args.adapter is None):
        parser.error("--against and --adapter go together: the checkout, and what drives it")
    try:
        adapters = {f"against {spec}": load_adapter(spec) for spec in args.adapter or ()}
    except ValueError as error:
        parser.error(str(error))
    if args.size == "published":
        if not CUDA:
            parser.error("published sizes need a CUDA device, and there is none: use --size tiny")
        use_all_cores()
    run(args, adapters)


if __name__ == "__main__":
    main()
