"""Check every trainer on the embedded world in bf16: it learns as on a CPU, is on policy, and resumes bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment

from diffalign.atomic import replacing
from diffalign.commands.doctor.trials import settings
from diffalign.config import from_dict
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.registry import algorithm_names, find_algorithm
from scripts import ROOT

STEPS = 4
# A smooth reward, through a network: those that count bytes jump where images round differently.
JUDGE = {"options": {name: str(ROOT / "assets/judges/pickscore") for name in ("path", "tokenizer")}}
# Largest relative difference from the CPU of the first step, which bf16 rounds, and of the direction of all steps.
FIRST_STEP = 0.1
DIRECTION = 0.9
ON_POLICY = ("flow_grpo",)  # trainers whose first ratio is promised to be exactly 1


def measure_trainers(file: Path) -> None:
    """Write the figures and checks of every trainer to a file, after each of them."""
    found: dict[str, Any] = {}
    for name in algorithm_names():
        try:
            found[name] = check(name)
        except Exception as error:  # any error of a trainer is the finding
            found[name] = {"failed": [f"{type(error).__name__}: {error}"[:300]]}
        with replacing(file) as staged:
            staged.write_text(json.dumps(found))


def check(name: str) -> dict[str, Any]:
    """Train in one go, stopped and resumed, and on the CPU; return figures, and the names of checks that failed."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, deterministic():
        whole, stopped, other = (Path(place) / folder for folder in ("whole", "stopped", "cpu"))
        rows, change, last = train(name, whole, checkpointing_steps=STEPS // 2)
        half = whole / f"checkpoint-{STEPS // 2}"
        shutil.copytree(half, stopped / half.name)
        _, _, resumed = train(name, stopped, resume_from_checkpoint="latest")
        with patch_environment(accelerate_use_cpu="true"):
            expected, change_on_cpu, _ = train(name, other)
        direction = torch.cosine_similarity(change, change_on_cpu, dim=0).item()

    first, ratio = difference(rows[0], expected[0]), rows[0].get("ratio_mean")
    checks = {
        "every step has a gradient": all(row["grad_norm"] > 0 for row in rows),
        "on policy": ratio == 1.0 if name in ON_POLICY else ratio in (None, 1.0),
        "resume is exact": torch.equal(last, resumed),
        "the first step is that of the CPU": first <= FIRST_STEP,
        "it learns as on the CPU": direction >= DIRECTION,
    }
    return {
        "failed": [title for title, passed in checks.items() if not passed],
        "losses": [row["loss"] for row in rows],
        "gradient_norms": [row["grad_norm"] for row in rows],
        "first_ratio": ratio,
        "first_step_from_cpu": first,
        "cosine_of_change_with_cpu": direction,
        "seconds": time.perf_counter() - started,
    }


def train(name: str, folder: Path, **changes: Any) -> tuple[list[dict[str, float]], torch.Tensor, torch.Tensor]:
    """Train on the embedded world in bf16.

    Returns:
        The rows of the optimizer steps, the change of the weights in this process, and the last weights, both flat.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    entry = find_algorithm(name)
    given = {**settings(entry, ROOT / "assets", folder), "mixed_precision": "bf16", "max_train_steps": STEPS, **changes}
    if hasattr(entry.config, "old_log_prob"):
        given["old_log_prob"] = "recompute"
    if "rewards" in given:
        given["rewards"] = {"pickscore": JUDGE}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = entry.trainer(args=from_dict(entry.config, given, "gpu_day"))
        before = weights(trainer)
        trainer.train()
    rows = [row for row in MetricsLog.read(folder / "metrics.jsonl") if "loss" in row]
    return rows, weights(trainer) - before, weights(trainer)


def weights(trainer: Any) -> torch.Tensor:
    """Return a copy of the trained weights, flat, on the CPU."""
    return torch.cat([parameter.detach().float().flatten().cpu() for parameter in trainer.loop.state.parameters])


def difference(row: dict[str, float], other: dict[str, float]) -> float:
    """Return the larger relative difference of two steps, in gradient norm and in loss; losses of about 0 are equal."""
    norm = abs(row["grad_norm"] / other["grad_norm"] - 1)
    return max(norm, abs(row["loss"] - other["loss"]) / max(abs(other["loss"]), 0.1))


@contextmanager
def deterministic() -> Iterator[None]:
    """Let kernels that sum in any order be replaced by those that do not, where there are such."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
