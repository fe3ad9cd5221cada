"""Measure this package on a GPU in nine minutes: correctness, memory and speed, the most telling parts first.

    python scripts/bench/gpu_day.py                       # a card with 24 GB or more; writes assets/results/gpu.json
    python scripts/bench/gpu_day.py --parts trainers tests
    python scripts/bench/gpu_day.py --size tiny           # a rehearsal on CPUs

Each part runs in a process of its own with a time limit. The results file is written after every part, with the card,
versions and command; a part that fails or does not fit is recorded with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.atomic import replacing
from diffalign.device import default_device, device_name
from scripts import ROOT
from scripts.bench.gpu_models import CUDA
from scripts.bench.gpu_trainers import measure_trainers

BUDGET = 540.0  # seconds
SLOW_ON_CPUS = "compile"  # takes minutes without a GPU, and rehearses nothing


@dataclass(frozen=True)
class Part:
    """A process.

    Attributes:
        question: What it answers.
        arguments: After ``python``; ``--size`` and ``--write FILE`` follow.
        limit: Seconds.
        tests: Whether it is pytest, whose results are counted.
    """

    question: str
    arguments: tuple[str, ...]
    limit: float
    tests: bool = False


def bench(
    trainer: str, model: str, *settings: str, repeats: int = 2, adapters: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return the arguments of a part that measures a trainer on a model."""
    own = ("scripts/bench/gpu.py", "--trainer", trainer, "--models", model, "--repeats", str(repeats))
    other = ("--against", "scripts/bench", "--adapter", *(f"scripts/bench/{name}.py:prepare" for name in adapters))
    return (*own, "--settings", *settings, *(other if adapters else ()))


def gpu_tests() -> tuple[str, ...]:
    """Return the test files with tests that need a card: reading these alone saves seconds."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return tuple(str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text())


PARTS: dict[str, Part] = {
    "trainers": Part(
        "does every trainer learn as on a CPU, on policy, and resume bit for bit?",
        ("scripts/bench/gpu_day.py", "--measure"),
        90,
    ),
    "tests": Part("do the tests that need a card pass?", ("-m", "pytest", "-m", "gpu", *gpu_tests()), 50, tests=True),
    "flow_grpo_sd35": Part(
        "Flow-GRPO on SD3.5-medium, 512 px",
        bench("flow_grpo", "sd35_medium_512", "plain", "batched_times", "checkpointing", "compile"),
        100,
    ),
    "forward_rl_sd35": Part(
        "forward-process RL (NFT) on SD3.5-medium, 512 px",
        bench("forward_rl", "sd35_medium_512", "plain", "batched_times", repeats=1),
        45,
    ),
    "dpo_sdxl": Part(
        "Diffusion-DPO on SDXL, 1024 px, and the inner loop of diffusers' training scripts",
        bench("diffusion_dpo", "sdxl_1024", "plain", "checkpointing", adapters=("dpo_loop",)),
        55,
    ),
    "refl_sd35": Part(
        "ReFL on SD3.5-medium, 512 px", bench("refl", "sd35_medium_512", "checkpointing", "plain", repeats=1), 45
    ),
    "flow_grpo_flux": Part(
        "Flow-GRPO on FLUX.1-dev, 512 px, in bf16 and in 4 bits",
        bench("flow_grpo", "flux1_dev_512", "plain", "base_4bit", repeats=1),
        100,
    ),
    "other_loops": Part(
        "the work of Flow-GRPO on SD3.5-medium in the inner loop of Flow-GRPO's trainers, and in plain diffusers",
        bench("flow_grpo", "sd35_medium_512", "plain", adapters=("flow_grpo_loop", "diffusers_loop")),
        55,
    ),
}


# All parts ------------------------------------------------------------------------------------------------------------


def run(part: Part, size: str, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own; return its results, or why there are none."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "part.json", Path(folder) / "log.txt"
        more = ("--junitxml", str(file)) if part.tests else ("--size", size, "--write", str(file))
        problem = run_process([sys.executable, *arguments_of(part, size), *more], log, limit)
        said = log.read_text(errors="replace").strip().splitlines() or [""]
        found: dict[str, Any] = {}
        if file.exists():
            found = test_counts(file) if part.tests else json.loads(file.read_text())
    if problem:
        found["problem"] = f"{problem}: {said[-1][:300]}"
    return {"question": part.question, "seconds": time.perf_counter() - started, "results": found}


def arguments_of(part: Part, size: str) -> list[str]:
    """Return the arguments of a part, without what says nothing on a CPU."""
    return [word for word in part.arguments if size != "tiny" or word != SLOW_ON_CPUS]


def run_process(command: list[str], log: Path, limit: float) -> str:
    """Run a command and all that it starts for ``limit`` seconds at most; return what went wrong, or ""."""
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit:.0f} s"
    return "" if code == 0 else f"exit code {code}"


def test_counts(file: Path) -> dict[str, Any]:
    """Count the tests of a JUnit file, and name those that failed."""
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def run_all(parts: Mapping[str, Part], size: str, file: Path, budget: float = BUDGET) -> dict[str, Any]:
    """Run parts in order until the budget is spent; write what is known after each."""
    begin, device = time.perf_counter(), default_device()
    result: dict[str, Any] = {
        "command": " ".join(["python", "scripts/bench/gpu_day.py", *sys.argv[1:]]),
        "card": device_name(device),
        "size": size,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")},
        "parts": {},
    }
    for name, part in parts.items():
        left = budget - (time.perf_counter() - begin)
        if left <= 0:
            result["parts"][name] = {"question": part.question, "results": {"problem": "no time was left"}}
        else:
            result["parts"][name] = run(part, size, min(part.limit, left))
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as staged:
            staged.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result["parts"][name]), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in order of worth"
    )
    parser.add_argument("--size", choices=("published", "tiny"), default="published")
    parser.add_argument("--write", type=Path, default=ROOT / "assets/results/gpu.json")
    parser.add_argument("--against", type=Path, help="a checkout of another trainer, for a part of its own")
    parser.add_argument("--adapter", help="what drives it, file.py:function; see scripts/bench/against.py")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # the process of "trainers"
    args = parser.parse_args()
    if args.size == "published" and not CUDA:
        parser.error("published sizes need a CUDA device, and there is none: use --size tiny")
    if args.measure:
        measure_trainers(args.write)
        return
    parts = {name: PARTS[name] for name in args.parts}
    if args.against is not None and args.adapter is not None:
        other = ("--against", str(args.against.resolve()), "--adapter", args.adapter)
        command = (*bench("flow_grpo", "sd35_medium_512", "plain"), *other)
        parts["against"] = Part(f"the same work in {args.against}", command, 120)
    run_all(parts, args.size, args.write)


if __name__ == "__main__":
    main()
