"""Describe the work of a bench to other code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.data.prompts import load_prompts
from diffalign.diffusion.plan import make_plan
from diffalign.losses.registry import get_loss
from diffalign.rewards.pixel_stats import brightness
from scripts.bench.against import Job, PreferenceJob, RolloutJob
from scripts.bench.gpu_models import Case, build
from scripts.bench.gpu_runs import PROMPTS, configuration


def job_of(trainer: str, case: Case, size: str, checkout: Path) -> Job:
    """Describe the work of ``gpu_runs.Bench``. NotImplementedError: a trainer whose work has no description."""
    if trainer not in JOBS:
        raise NotImplementedError(f"the work of {trainer} is described to no other code")
    with tempfile.TemporaryDirectory() as folder:
        args = configuration(trainer, case, size, {}, folder)
    model = build(case, size)
    common = {
        "checkout": checkout,
        "pipeline": model.pipeline,
        "batch": args.train_batch_size,
        "resolution": model.default_resolution[0],
        "lora_rank": args.lora.rank,
        "lora_targets": tuple(model.lora_targets),
        "learning_rate": args.learning_rate,
        "precision": args.mixed_precision,
    }
    texts = [prompt.text for prompt in load_prompts(PROMPTS)]
    return JOBS[trainer](args, common, texts)


def rollout_job(args: Any, common: dict[str, Any], texts: list[str]) -> RolloutJob:
    plan = make_plan(args.plan, 0, args.seed)
    return RolloutJob(
        **common,
        prompts=tuple(texts[: args.num_groups]),
        group_size=args.group_size,
        num_steps=args.plan.num_steps,
        trained_steps=tuple(plan.trained_steps),
        noise_level=plan.rows[plan.trained_steps[0]].noise_level,
        guidance_scale=args.guidance_scale,
        reward=score,
    )


def preference_job(args: Any, common: dict[str, Any], texts: list[str]) -> PreferenceJob:
    beta = get_loss(args.loss).beta if args.beta is None else args.beta
    return PreferenceJob(**common, prompts=tuple(texts[: args.num_pairs]), beta=beta or 1.0)


def score(images: Tensor) -> Tensor:
    """Score images (B, 3, H, W) in [0, 1]."""
    return brightness(images, [""] * len(images), [{}] * len(images))


JOBS = {"flow_grpo": rollout_job, "diffusion_dpo": preference_job}
