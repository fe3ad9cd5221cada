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
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone needs no installation

from diffalign.commands.doctor.trials import settings
from diffalign.config import from_dict
from diffalign.device import default_device, device_name, synchronize
from diffalign.rewards import FunctionReward
from diffalign.runtime.tracking import MetricsLog
from diffalign.structures import Prompt
from diffalign.trainers.cost import Share
from diffalign.trainers.registry import algorithm_names, find_algorithm
from scripts import ROOT
from scripts.bench.flow_grpo import collect, peak_memory
from scripts.bench.gpu_models import CASES, CUDA, build

BUDGET = 540.0  # seconds
PRECISION = "bf16" if CUDA else "no"
STEPS = 4  # of a run in the embedded world


@dataclass(frozen=True)
class Part:
    """A process: what it answers, its arguments after ``python``, and its limit in seconds."""

    question: str
    arguments: tuple[str, ...]
    limit: float


def bench(*arguments: str) -> tuple[str, ...]:
    return ("scripts/bench/gpu.py", "--repeats", "2", *arguments)


def own(name: str) -> tuple[str, ...]:
    return ("scripts/bench/gpu_day.py", "--measure", name)


PARTS: dict[str, Part] = {
    "trainers": Part("does every trainer learn as on a CPU, on policy, and resume bit for bit?", own("trainers"), 90),
    "tests": Part("do the tests that need a card pass?", ("-m", "pytest", "-m", "gpu", "-q", "-x", "tests"), 70),
    "flow_grpo_sd35": Part(
        "Flow-GRPO on SD3.5-medium, 512 px",
        bench("--models", "sd35_medium_512", "--settings", "plain", "attention", "checkpointing", "compile"),
        120,
    ),
    "dpo_sdxl": Part("Diffusion-DPO on SDXL, 1024 px", own("dpo_sdxl"), 60),
    "refl_sd35": Part("ReFL on SD3.5-medium, 512 px", own("refl_sd35"), 50),
    "flow_grpo_flux": Part(
        "Flow-GRPO on FLUX.1-dev, 512 px, in bf16 and in 4 bits",
        bench("--models", "flux1_dev_512", "--settings", "plain", "base_4bit"),
        90,
    ),
    "plain_diffusers": Part(
        "the work of Flow-GRPO on SD3.5-medium in plain diffusers",
        bench(
            *("--models", "sd35_medium_512", "--settings", "plain"),
            *("--against", "scripts/bench", "--adapter", "scripts/bench/diffusers_loop.py:prepare"),
        ),
        60,
    ),
}


# Parts that this file measures --------------------------------------------------------------------------------------


def rows_of(name: str, folder: Path, **changes: Any) -> list[dict[str, float]]:
    """Train on the embedded world; return the rows of its optimizer steps."""
    entry = find_algorithm(name)
    given = {**settings(entry, ROOT / "assets", folder), "mixed_precision": PRECISION, **changes}
    if hasattr(entry.config, "old_log_prob") and PRECISION != "no":
        given["old_log_prob"] = "recompute"
    entry.trainer(args=from_dict(entry.config, given, "gpu_day")).train()
    return [row for row in MetricsLog.read(folder / "metrics.jsonl") if "loss" in row]


def trainers(size: str) -> dict[str, Any]:
    """Train each trainer in one go, and stopped and resumed; compare the last checkpoints byte for byte."""
    found = {}
    for name in algorithm_names():
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            whole, stopped = Path(place) / "whole", Path(place) / "stopped"
            rows = rows_of(name, whole, max_train_steps=STEPS, checkpointing_steps=STEPS // 2)
            half = whole / f"checkpoint-{STEPS // 2}"
            shutil.copytree(half, stopped / half.name)
            rows_of(name, stopped, max_train_steps=STEPS, resume_from_checkpoint="latest")
            last = f"checkpoint-{STEPS}/weights.safetensors"
            found[name] = {
                "losses": [row["loss"] for row in rows],
                "gradient_norms": [row["grad_norm"] for row in rows],
                "first_ratio": rows[0].get("ratio_mean"),
                "resume_is_exact": (whole / last).read_bytes() == (stopped / last).read_bytes(),
                "seconds": time.perf_counter() - started,
            }
    return found


def brightness(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    return images.mean((1, 2, 3))


BRIGHTNESS = FunctionReward("brightness", brightness, differentiable=True)


def dpo_sdxl(size: str) -> dict[str, Any]:
    batch = 2 if size == "tiny" else 4
    pairs = {"train_data": (str(ROOT / "assets/preferences/shapes.parquet"),), "num_pairs": batch, "cache": False}
    return timed("diffusion_dpo", "sdxl_1024", size, {**pairs, "data": {"scan": 8}, "train_batch_size": batch})


def refl_sd35(size: str) -> dict[str, Any]:
    batch = 2 if size == "tiny" else 4
    recipe = {"preset": "draft_1", "num_steps": 4 if size == "tiny" else 10}
    sizes = {"num_groups": batch, "rollout_batch_size": batch, "train_batch_size": batch}
    prompts = [Prompt(f"prompt {i}") for i in range(batch)]
    options = {"reward_funcs": BRIGHTNESS, "train_dataset": prompts}
    return timed("refl", "sd35_medium_512", size, {"recipe": recipe, **sizes, "gradient_checkpointing": True}, options)


def timed(
    name: str, case: str, size: str, changes: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Time three iterations of a trainer after one that warms up.

    A place for the rehearsed peak beside the measured one: "forecast_memory_gib".
    """
    entry, device = find_algorithm(name), default_device()
    rank = 4 if size == "tiny" else 32
    with tempfile.TemporaryDirectory() as folder:
        given = {"model": "random", "output_dir": folder, "mixed_precision": PRECISION, **changes}
        args = from_dict(entry.config, {**given, "lora": {"rank": rank}}, "gpu_day")
        trainer = entry.trainer(model=build(CASES[case], size), args=args, **(options or {}))
        seconds = []
        for iteration in range(4):
            synchronize(device)
            started = time.perf_counter()
            batch = collect(trainer, iteration)
            for minibatch in trainer.algorithm.minibatches(batch, iteration):
                metrics = trainer.loop._update(batch, minibatch)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        work = entry.cost.iteration(trainer.args, Share(), 0, 1)
    return {
        "seconds_per_iteration": sorted(seconds[1:])[1],
        "warm_up_seconds": seconds[0],
        "evaluations": {"sampling": work.sampling, "training": work.training, "comparing": work.comparing},
        "loss": metrics["loss"],
        "peak_memory_gib": peak_memory(),
        "forecast_memory_gib": None,
    }


MEASURES = {"trainers": trainers, "dpo_sdxl": dpo_sdxl, "refl_sd35": refl_sd35}


# All parts ------------------------------------------------------------------------------------------------------------


def run(part: Part, size: str, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own; return its results, or why there are none."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        takes_file = "-m" not in part.arguments[:1]
        more = ("--size", size, "--write", str(file)) if takes_file else ()
        log = Path(folder) / "log.txt"
        with log.open("w") as output:
            try:
                command = [sys.executable, *part.arguments, *more]
                code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, timeout=limit).returncode
                problem = "" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                problem = f"stopped after {limit:.0f} s"
        said = log.read_text(errors="replace").strip().splitlines() or [""]
        found = json.loads(file.read_text()) if file.exists() else {"said": said[-1][:300]}
    if problem:
        found["problem"] = f"{problem}: {said[-1][:300]}"
    return {"question": part.question, "seconds": time.perf_counter() - started, "results": found}


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
        file.write_text(json.dumps(result, indent=1) + "\n")
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
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)  # what a part's process does
    args = parser.parse_args()
    if args.size == "published" and not CUDA:
        parser.error("published sizes need a CUDA device, and there is none: use --size tiny")
    if args.measure is not None:
        args.write.write_text(json.dumps(MEASURES[args.measure](args.size)))
        return
    parts = {name: PARTS[name] for name in args.parts}
    if args.against is not None and args.adapter is not None:
        other = ("--against", str(args.against.resolve()), "--adapter", args.adapter)
        command = bench("--models", "sd35_medium_512", "--settings", "plain", *other)
        parts["against"] = Part(f"the same work in {args.against}", command, 120)
    run_all(parts, args.size, args.write)


if __name__ == "__main__":
    main()
