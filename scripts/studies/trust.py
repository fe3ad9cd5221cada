"""Run the reliability list row by row, and summarise its figures.

    python scripts/studies/trust.py                                   # all of it, 200 kills
    python scripts/studies/trust.py --short                           # no slow test, each kind of resume point once
    python scripts/studies/trust.py --rows 2 --kills 2000 --jobs 2    # one row, more kills, two at a time

Runs tests/reliability and, for some rows, the tests beside the code; a row is green if all of its tests pass and one
ran at least. What is done is kept in ``--output_dir``, in a folder for these sources, as it is done: the run can be
stopped at any time, and the same command goes on. Changed sources start a new run.

A kill: see tests/reliability/kills.py. A resume point: a trainer is stopped before one of its micro-steps, or its
process is gone there; started again, it leaves the checkpoints, log, pictures and weights of a run without
interruption, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import signal
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by libraries on import

from diffalign.runtime.provenance import machine
from scripts import ROOT
from scripts.studies.repeat_seeds import checkpoint_share

WRITE = ROOT / "assets/results/trust.json"
ROWS = 41
# Rows that are held beside the code as well.
ELSEWHERE = {
    1: ["tests/runtime/test_checkpoint_crash.py"],
    26: [f"tests/trainers/test_{name}_processes.py" for name in ("flow_grpo", "diffusion_dpo", "refl")],
    28: ["tests/rewards/test_contract.py", "tests/rewards/test_reward_server.py"],
    30: ["tests/data/test_images.py"],
    31: ["tests/data/test_prompts.py"],
    36: ["tests/models/test_lora.py"],
}
# What tests count with ``record_property(name, number)``. Of each pair the first is tried, the second ended as it
# should: in a bounded, right message or as if nothing had been, with no finished step lost and no code run. A test that
# tries attacks or requests under load records these names, here or beside the code (then it is named in BESIDE).
TRIED = {
    "settings": "settings_right",  # hostile numbers in every numeric field of every configuration
    "folders": "folders_right",  # run folders and checkpoints that are damaged, forged or somebody else's
    "attacks": "attacks_refused",  # files that try to run code, read secrets or leave their folder
    "requests": "requests_answered",  # of clients of the reward server, under load
}
BESIDE: list[str] = []  # files of tests that record these and belong to no row
COUNTS = ("kills", "points", "null_points", "damaged", "accepted", "canaries", "executed")
COUNTS += (*TRIED, *TRIED.values())
KILLS = "tests/reliability/kills.py::test_r2_kills"  # what they are called among the tests
BY_KILLS = "::test_r2_two_hundred_kills"
LIBRARIES = ("diffalign", "torch", "diffusers", "accelerate", "peft", "safetensors")
SWEEPS = ("tests/reliability/test_hostile_settings.py", "tests/reliability/test_damaged_folders.py")
Row = dict[str, Any]


class Unfinished(Exception):
    """Some of the requested tests were not run, so there is no summary."""


class Ledger:
    """A JSON line per finished item, flushed at once; an incomplete line is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """Read the finished items."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [row for row in found if isinstance(row, dict)]

    def add(self, row: Row) -> None:
        """Append an item; a line break first, in case the last line is incomplete."""
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(row) + "\n")


class Watcher:
    """A plug-in of pytest: runs the tests of some rows that have not passed yet, and notes each when it is over.

    job, jobs: this process takes each jobs-th test from the job-th on.
    """

    def __init__(self, ledger: Ledger, rows: Sequence[int], job: int, jobs: int) -> None:
        self.ledger, self.wanted, self.job, self.jobs = ledger, set(rows), job, jobs
        self.outcome, self.spent, self.over, self.total = "passed", 0.0, 0, 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect finished tests, and those of other jobs."""
        done = {row["name"] for row in self.ledger.rows() if row["outcome"] in ("passed", "skipped")}
        wanted = [item for item in items if self._belongs(item.nodeid) and BY_KILLS not in item.nodeid]
        mine = [item for item in wanted[self.job :: self.jobs] if item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:], self.total = mine, len(mine)

    def _belongs(self, name: str) -> bool:
        """Return whether a test is of a wanted row; those that count attempts come with all rows."""
        counting = any(file in name for file in (*SWEEPS, *BESIDE)) and len(self.wanted) == ROWS
        return counting or bool(self.wanted & set(rows_of(name)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """The clock starts, and a signal stops the work again: commands that a test has called have handlers too."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.outcome, self.spent = "passed", cpu()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Set-up, test and tear-down come by, in this order."""
        if report.outcome != "passed":
            self.outcome = {"skipped": "skipped"}.get(report.outcome, "failure" if report.when == "call" else "error")
        if report.when != "teardown":
            return
        counts = {name: value for name, value in report.user_properties if name in COUNTS}
        row = {"name": report.nodeid, "outcome": self.outcome, "counts": counts, "cpu": round(cpu() - self.spent, 2)}
        self.ledger.add(row)
        self.over += 1
        print(f"[{self.over}/{self.total}] {row['name']}: {row['outcome']}, {row['cpu']} core-seconds", flush=True)


def run_tests(folder: Path, rows: Sequence[int], short: bool, job: int, jobs: int) -> None:
    """Run the tests of some rows in this process."""
    beside = BESIDE if len(rows) == ROWS else []
    files = ["tests/reliability", *beside, *(file for row, found in ELSEWHERE.items() if row in rows for file in found)]
    os.environ.update({} if short else {"EVERY_POINT": "1"})
    which = "not slow and not gpu" if short else "not gpu"
    options = [
        "-q",
        "-m",
        which,
        "--no-header",
        "--show-capture=no",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    code = pytest.main([*options, *files], plugins=[Watcher(Ledger(folder / "tests.jsonl"), rows, job, jobs)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise Unfinished


def run_kills(folder: Path, count: int, job: int, jobs: int) -> None:
    """Run this process's share of ``count`` kills that are not done, and the comparison at the end."""
    from tests.reliability.kills import FIRST_SAVE, kill, same_in_the_end

    torch.set_num_threads(1)
    ledger, run = Ledger(folder / f"kills-{job}.jsonl"), folder / f"killed-{job}"
    done = [row for row in ledger.rows() if "kill" in row]
    share = max(len(done), len(range(job, count, jobs)))
    first_save = next((row["first_save"] for row in reversed(done) if "first_save" in row), FIRST_SAVE)
    try:
        for number in range(len(done), share):
            found = kill(run, number, first_save)
            first_save = found.get("first_save", first_save)
            ledger.add({"kill": number, **found})
            print(f"[{number + 1}/{share}] killed, sound at step {found['step']}", flush=True)
        if not any(row.get("compared") == share for row in ledger.rows()):
            same_in_the_end(run)
            ledger.add({"compared": share})
    except AssertionError as error:
        ledger.add({"failed": str(error)})
        print(f"kill {len(ledger.rows())}: {error}", flush=True)


def kills(folder: Path) -> list[Row]:
    """Summarise the kills as a test of row 2; those of a share count when its run has been compared."""
    found = []
    for path in sorted(folder.glob("kills-*.jsonl")):
        rows = Ledger(path).rows()
        done = [row for row in rows if "kill" in row]
        sound = not any("failed" in row for row in rows) and any(row.get("compared") == len(done) for row in rows)
        spent = sum(row["cpu"] for row in done)
        found.append(
            {"name": KILLS, "outcome": "passed" if sound else "failure", "counts": {"kills": len(done)}, "cpu": spent}
        )
    return found


def cpu() -> float:
    """Return the core-seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def rows_of(name: str) -> list[int]:
    """List the rows that a test belongs to."""
    own = re.search(r"::test_r(\d+)_", name)
    beside = [row for row, files in ELSEWHERE.items() if any(file in name for file in files)]
    return beside + ([int(own[1])] if own else [])


def summary(found: Sequence[Row]) -> Row:
    """Summarise the rows that pass, and the figures that tests recorded."""
    outcomes: dict[int, list[str]] = defaultdict(list)
    counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
    passed: dict[str, int] = dict.fromkeys(COUNTS, 0)
    for test in found:
        for row in rows_of(test["name"]):
            outcomes[row].append(test["outcome"])
        for key, value in test["counts"].items():
            counts[key] += value
            passed[key] += value if test["outcome"] == "passed" else 0
    good = {row for row, seen in outcomes.items() if "passed" in seen and not {"failure", "error"} & set(seen)}
    return {
        "rows": ROWS,
        "green": len(good),
        "not_green": [row for row in range(1, ROWS + 1) if row in outcomes and row not in good],
        "not_run": [row for row in range(1, ROWS + 1) if row not in outcomes],
        "kills": counts["kills"],
        "kills_survived": passed["kills"],
        "resume_points": counts["points"] + counts["null_points"],
        "resume_points_exact": passed["points"] + passed["null_points"],
        "resume_points_of_trainers": counts["points"],
        "checkpoints_damaged": counts["damaged"],
        "damaged_checkpoints_accepted": counts["accepted"],
        "canaries_planted": counts["canaries"],
        "canary_pickles_executed": counts["executed"],
        "tried": {name: {"tried": counts[name], "right": passed[right]} for name, right in TRIED.items()},
        "core_seconds": cost(found),
    }


def cost(found: Sequence[Row]) -> dict[str, float]:
    """Compute core-seconds: of everything, of a kill, and of a resume point of a trainer."""
    spent = {"all": sum(test.get("cpu", 0.0) for test in found)}
    for name, key in (("kill", "kills"), ("resume_point", "points")):
        own = [test for test in found if test["counts"].get(key)]
        if number := sum(test["counts"][key] for test in own):
            spent[name] = sum(test.get("cpu", 0.0) for test in own) / number
    return {name: round(seconds, 2) for name, seconds in spent.items()}


def together(work: Callable[[int, int], None], jobs: int) -> None:
    """Call ``work(job, jobs)`` in that many forks of this process, which has imported everything; one needs no fork."""
    if jobs == 1:
        work(0, 1)
        return
    children = []
    for job in range(jobs):
        if (child := os.fork()) == 0:
            try:
                work(job, jobs)
                code = 0
            except (KeyboardInterrupt, Unfinished):
                code = 1
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    try:
        codes = [os.waitpid(child, 0)[1] for child in children]
    except KeyboardInterrupt:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
        raise
    if any(codes):
        raise Unfinished


def sources() -> str:
    """Compute a digest of the package and the tests."""
    found = hashlib.sha256()
    for folder in ("diffalign", "tests", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def where() -> Row:
    """Return versions and hardware."""
    hardware = {"processor": machine(1, "cpu")["processor"], "cores": len(os.sched_getaffinity(0))}
    hardware |= {"memory_gib": round(psutil.virtual_memory().total / 2**30, 1), "system": platform.platform()}
    return {
        "versions": {"python": platform.python_version(), **{n: version(n) for n in LIBRARIES}},
        "hardware": hardware,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="leave the slow tests out, and most resume points")
    parser.add_argument("--rows", type=int, nargs="+", default=range(1, ROWS + 1), help="these alone")
    parser.add_argument("--kills", type=int, help="how many; default 200, with --short none but those of the tests")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs/trust", help="what is done already")
    parser.add_argument("--quickstart", type=Path, default=ROOT / "runs/shapes", help="whose checkpoints' cost to note")
    parser.add_argument("--write", type=Path, default=WRITE, help="where the figures go")
    args = parser.parse_args()
    folder = args.output_dir.resolve() / f"{sources()}{'-short' if args.short else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    count = (0 if args.short else 200) if args.kills is None else args.kills
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if count and 2 in args.rows:
            together(lambda job, jobs: run_kills(folder, count, job, jobs), args.jobs)
        together(lambda job, jobs: run_tests(folder, args.rows, args.short, job, jobs), args.jobs)
    except (KeyboardInterrupt, Unfinished):
        print(f"stopped before the end; the same command goes on from {folder}")
        return 130
    tests = {row["name"]: row for row in Ledger(folder / "tests.jsonl").rows()}
    found = summary([*tests.values(), *kills(folder)])
    if (args.quickstart / "metrics.jsonl").is_file():
        found["checkpoint_share_of_quickstart"] = checkpoint_share(args.quickstart)
    context = {"command": shlex.join(["python", *sys.argv]), "short": args.short, **where()}
    args.write.parent.mkdir(parents=True, exist_ok=True)
    args.write.write_text(json.dumps({**found, **context}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    wrong = [name for name, count in found["tried"].items() if count["right"] < count["tried"]]
    return int(bool(found["not_green"] or wrong))


if __name__ == "__main__":
    sys.exit(main())
