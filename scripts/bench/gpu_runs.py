"""Runs of every trainer for ``gpu.py``: their configurations, timed iterations, and what rehearsals say of them."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from diffalign.config import from_dict
from diffalign.device import default_device, synchronize
from diffalign.forecast.rehearsal import ENCODE, NOT_FAKE, SAMPLING, SCORING, STEPPING, TRAINING, rehearse
from diffalign.trainers.cost import Share
from diffalign.trainers.registry import find_algorithm
from scripts import ROOT
from scripts.bench.flow_grpo import collect, peak_memory
from scripts.bench.gpu_models import CASES, CUDA, Case, build

PROMPTS = ROOT / "assets/prompts/shapes_train.jsonl"
PAIRS = ROOT / "assets/preferences/shapes.parquet"
GROUPS = 2
BATCHED_TIMES = "train_times_per_forward"
SPEED_ONLY = ("compile", "attention", "overlap_rewards")  # settings that a rehearsal does not see


# Configurations -------------------------------------------------------------------------------------------------------


def flow_grpo(case: Case, batch: int, steps: int) -> dict[str, Any]:
    return {
        **rollout(batch),
        "shared_start": False,
        "plan": {"num_steps": steps, **case.plan},
        "guidance_scale": case.guidance,
        "old_log_prob": "recompute" if CUDA else "rollout",
    }


def forward_rl(case: Case, batch: int, steps: int) -> dict[str, Any]:
    return {
        **rollout(batch),
        "preset": "nft",
        "plan": {"preset": "ode", "num_steps": steps},
        "guidance_scale": 1.0,
        "num_times": 2,
    }


def refl(case: Case, batch: int, steps: int) -> dict[str, Any]:
    recipe = {"preset": "draft_1", "num_steps": steps, "reward_loss": "negative"}
    return {**rollout(batch), "group_size": 1, "num_groups": batch, "guidance_scale": case.guidance, "recipe": recipe}


def diffusion_dpo(case: Case, batch: int, steps: int) -> dict[str, Any]:
    pairs = GROUPS * batch
    return {"train_data": [str(PAIRS)], "data": {"scan": 2 * pairs}, "num_pairs": pairs, "cache": False}


def rollout(batch: int) -> dict[str, Any]:
    """Return the fields that trainers on prompts share."""
    return {
        "train_prompts": str(PROMPTS),
        "rewards": {"brightness": 1.0},
        "num_groups": GROUPS,
        "group_size": batch,
        "rollout_batch_size": batch,
    }


RUNS = {"flow_grpo": flow_grpo, "forward_rl": forward_rl, "diffusion_dpo": diffusion_dpo, "refl": refl}


def configuration(trainer: str, case: Case, size: str, changes: Mapping[str, Any], folder: str) -> Any:
    """Build the configuration of a run. ValueError: the trainer has no option of ``changes``."""
    kind, small = find_algorithm(trainer).config, size == "tiny"
    batch, steps = (2, 3) if small else (case.batch, 10)
    given = {
        **case.options(size),
        **RUNS[trainer](case, batch, steps),
        "output_dir": folder,
        "lora": {"rank": 4 if small else 32},
        "train_batch_size": batch,
        "mixed_precision": "bf16" if CUDA else "no",
        "base_precision": "bf16" if CUDA else "no",
    }
    return from_dict(kind, {**given, **changes}, "bench")


def batched_times(trainer: str) -> dict[str, int]:
    """Return the setting that trains two times of an image in a forward pass. ValueError: the trainer has none."""
    known = {field.name for field in dataclasses.fields(find_algorithm(trainer).config)}
    if BATCHED_TIMES not in known:
        raise ValueError(f"{trainer} has no option {BATCHED_TIMES}")
    return {BATCHED_TIMES: 2}


# Measurements ---------------------------------------------------------------------------------------------------------


class Bench:
    """Time the iterations of one trainer."""

    def __init__(self, trainer: str, case: Case, size: str, changes: Mapping[str, Any], folder: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        args, entry = configuration(trainer, case, size, changes, folder), find_algorithm(trainer)
        self.trainer = entry.trainer(model=build(case, size, args.quantise), args=args)
        self.args = self.trainer.args
        self.samples = getattr(args, "num_pairs", 0) or args.num_groups * args.group_size
        scale = self.trainer.model.guidance_factor(self.args.guidance_scale)
        self.work = entry.cost.iteration(dataclasses.replace(self.args, guidance_scale=scale), Share(), 0, 1)

    def iterate(self, iteration: int) -> tuple[float, float]:
        """Time sampling and training, in seconds."""
        device, algorithm = default_device(), self.trainer.algorithm
        started = now(device)
        batch = collect(self.trainer, iteration)
        collected = now(device)
        for minibatch in algorithm.minibatches(batch, iteration):
            metrics = self.trainer.loop._update(batch, minibatch)
            algorithm.on_step(batch, metrics)
        self.loss = metrics["loss"]
        return collected - started, now(device) - collected

    def figures(self, repeats: int) -> dict[str, Any]:
        """Measure this setting; the first iteration compiles, checks and warms up."""
        warm_up = sum(self.iterate(0))
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        times = [self.iterate(1 + number) for number in range(repeats)]
        sampling, update = (statistics.median(column) for column in zip(*times, strict=True))
        rates = {"sampling": self.samples / sampling, "training": self.samples / update}
        work = {name: getattr(self.work, name) / self.samples for name in ("sampling", "training", "comparing")}
        return {
            "images": self.samples,
            "batch": self.args.train_batch_size,
            "images_per_second": {**rates, "iteration": self.samples / (sampling + update)},
            "evaluations_per_image": work,
            "loss": self.loss,
            "peak_memory_gib": peak_memory(),
            "warm_up_seconds": warm_up,
        }


def now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


# Rehearsals -----------------------------------------------------------------------------------------------------------


def rehearsed(trainer: str, case: Case, size: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Rehearse the iteration that ``Bench`` measures: its peak in GiB, and its operations by phase.

    Prompts are not encoded there at published sizes, so the text encoders are left out.
    """
    changes = {name: value for name, value in changes.items() if name not in SPEED_ONLY}
    config = configuration(trainer, case, size, changes, str(Path("rehearsed")))
    if size != "tiny":
        config = dataclasses.replace(config, offload=("text_encoders",))
    try:
        found = rehearse(find_algorithm(trainer), config, cpu=not CUDA)
    except (ValueError, *NOT_FAKE) as error:
        return {"not_rehearsed": f"{type(error).__name__}: {error}"[:300]}

    sampling = sum(n for (phase, part), n in found.flops.items() if phase in (SAMPLING, SCORING) and part != ENCODE)
    training = found.updates * sum(found.total(found.flops, phase) for phase in (TRAINING, STEPPING))
    peak = max(size for (_, part), size in found.peaks.items() if part != ENCODE)
    return {"rehearsed_memory_gib": peak / 2**30, "flops": {"sampling": sampling, "training": training}}


class Rehearsals:
    """Rehearse in a process of its own, so that the device does not wait; small models at once, in this process."""

    def __init__(self, size: str) -> None:
        self.size, self.known = size, dict[str, Future[dict[str, Any]]]()
        self.pool = None if size == "tiny" else ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def start(self, trainer: str, case: str, changes: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """Start a rehearsal, unless one of equal settings has been."""
        seen = {name: value for name, value in changes.items() if name not in SPEED_ONLY}
        key = f"{trainer} {case} {sorted(seen.items())}"
        if key not in self.known:
            arguments = trainer, CASES[case], self.size, seen
            if self.pool is not None:
                self.known[key] = self.pool.submit(rehearsed, *arguments)
            else:
                self.known[key] = Future()
                self.known[key].set_result(rehearsed(*arguments))
        return self.known[key]


def beside(row: Mapping[str, Any], found: Mapping[str, Any], matrix_peak: float) -> dict[str, Any]:
    """Put what a rehearsal found beside what was measured: memory, and the share of the matrix peak."""
    if "flops" not in found:
        return {**row, **found}
    speed = {phase: flops * row["images_per_second"][phase] / row["images"] for phase, flops in found["flops"].items()}
    result = {
        **row,
        "rehearsed_memory_gib": found["rehearsed_memory_gib"],
        "flops_per_second": speed,
        "share_of_matrix_peak": {phase: rate / matrix_peak for phase, rate in speed.items()},
    }
    if CUDA:
        result["rehearsed_over_measured"] = found["rehearsed_memory_gib"] / row["peak_memory_gib"]
    return result
