"""The reliability list, row by row, and the figures to print: ``python scripts/trust.py`` (about an hour), ``--short``.

Runs tests/reliability and, for some rows, the tests beside the code; a row is green if all of its tests pass and one
ran at least. With --short the tests marked slow are left out, so that the rows that are slow only are not run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WRITE = ROOT / "assets/results/trust.json"
ROWS = 41
# Rows that are held beside the code as well.
ELSEWHERE = {
    1: ["tests/runtime/test_checkpoint_crash.py"],
    28: ["tests/rewards/test_contract.py"],
    30: ["tests/data/test_images.py"],
    36: ["tests/models/test_lora.py"],
}
COUNTS = ("kills", "points", "null_points", "damaged", "accepted", "canaries", "executed")


def run(rows: list[int], report: Path, short: bool) -> None:
    """Runs the tests of rows, at every point of every run unless it is to be short; outcomes are in ``report``."""
    which = "not slow and not gpu" if short else "not gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, f"--junitxml={report}", "-o", "junit_family=xunit1"]
    tests = ["tests/reliability", *(file for row, files in ELSEWHERE.items() for file in files)]
    if len(rows) < ROWS:
        tests = ["tests/reliability", "-k", " or ".join(f"test_r{row}_" for row in rows)]
    environment = {**os.environ, **({} if short else {"EVERY_POINT": "1"})}
    subprocess.run([*command, *tests], cwd=ROOT, env=environment, check=False)


def cases(report: Path) -> list[tuple[str, str, dict[str, int]]]:
    """(name, outcome, counts) of each test in a report of pytest."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        counts = {p.get("name", ""): int(p.get("value", "0")) for p in case.iter("property")}
        name = f"{case.get('file') or case.get('classname')}::{case.get('name')}"
        found.append((name, bad[0] if bad else "passed", counts))
    return found


def rows_of(name: str) -> list[int]:
    """The rows that a test belongs to."""
    own = re.search(r"::test_r(\d+)_", name)
    beside = [row for row, files in ELSEWHERE.items() if any(file in name for file in files)]
    return beside + ([int(own[1])] if own else [])


def summary(found: list[tuple[str, str, dict[str, int]]]) -> dict[str, object]:
    """What to print: rows that are green, and the figures that tests have noted."""
    outcomes: dict[int, list[str]] = defaultdict(list)
    counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
    survived = exact = 0
    for name, outcome, noted in found:
        for row in rows_of(name):
            outcomes[row].append(outcome)
        for key in counts:
            counts[key] += noted.get(key, 0)
        survived += noted.get("kills", 0) if outcome == "passed" else 0
        exact += noted.get("points", 0) + noted.get("null_points", 0) if outcome == "passed" else 0
    good = {row for row, seen in outcomes.items() if "passed" in seen and not {"failure", "error"} & set(seen)}
    return {
        "rows": ROWS,
        "green": len(good),
        "not_green": [row for row in range(1, ROWS + 1) if row in outcomes and row not in good],
        "not_run": [row for row in range(1, ROWS + 1) if row not in outcomes],
        "kills": counts["kills"],
        "kills_survived": survived,
        "resume_points": counts["points"] + counts["null_points"],
        "resume_points_exact": exact,
        "resume_points_of_trainers": counts["points"],
        "checkpoints_damaged": counts["damaged"],
        "damaged_checkpoints_accepted": counts["accepted"],
        "canaries_planted": counts["canaries"],
        "canary_pickles_executed": counts["executed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="leave the slow tests out")
    parser.add_argument("--rows", type=int, nargs="+", default=range(1, ROWS + 1), help="these alone")
    parser.add_argument("--write", type=Path, default=WRITE, help="where the figures go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run(list(args.rows), report, args.short)
        found = summary(cases(report))
    where = {"torch": torch.__version__, "python": platform.python_version(), "short": args.short}
    args.write.parent.mkdir(parents=True, exist_ok=True)
    args.write.write_text(json.dumps({**found, **where}, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["not_green"]))


if __name__ == "__main__":
    main()
