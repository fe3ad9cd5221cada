"""What ``compare_policy_methods.py`` compares: methods, budgets, and learning rates to try, as tables."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.config import load_yaml
from scripts import ROOT

Changes = Mapping[str, object]
RATES = (3.5e-4, 7e-4, 1.4e-3)
STEPWISE = (1e-4, 3.5e-4, 1.4e-3)
# Fields that name or place a run, or that the study sets itself: no part of a method's settings.
APART = frozenset(
    {"output_dir", "eval_prompts", "eval_steps", "eval_rewards", "checkpointing_steps", "max_train_steps", "seed"}
) | {"learning_rate"}


@dataclass(frozen=True)
class Budget:
    """How long a method trains.

    Attributes:
        images: Number of images to score.
        evaluations: Number of passes of the denoiser, sampling and training.
        reference: Iterations of Flow-GRPO whose core-seconds are the budget, if the two above are None.
        changes: Fields that every method changes under this budget.
        near: Budget whose best learning rate, and half of it, are the only ones to try; None: all of a method's.
    """

    images: int | None = None
    evaluations: int | None = None
    reference: int = 0
    changes: Changes = field(default_factory=dict)
    near: str | None = None


# Six minutes on two cores are the 150 iterations of the quickstart, 35 minutes 930. Counted in core-seconds per
# iteration of each method, measured without other work, so that a budget does not depend on the load of a machine.
BUDGETS: dict[str, Budget] = {
    "6144": Budget(images=6_144),
    "evaluations": Budget(evaluations=56_640, near="6144"),  # those of Flow-GRPO for 6,144 images
    "38400": Budget(images=38_400),
    "6min": Budget(reference=150, near="38400"),
    "35min": Budget(
        reference=930,
        changes={"train_prompts": "assets/prompts/shapes_train_long.jsonl", "ema_decay": 0.98},
        near="6min",
    ),
}
REFERENCE = "flow_grpo"
MINUTES_PER_ITERATION = 5.6 / 150  # of the reference, on two cores


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        trainer: Name of its algorithm.
        config: Base configuration, in ``configs/``.
        changes: Fields that differ from it.
        rates: Learning rates to try.
        long: Fields that differ under the longest budget only.
        note: What differs from the authors' settings.
        judged: Images that a path has scored: 1, or one per compared step of predicted clean images.
    """

    trainer: str
    config: str
    changes: Changes = field(default_factory=dict)
    rates: tuple[float, ...] = RATES
    long: Changes = field(default_factory=dict)
    note: str = ""
    judged: int = 1

    @property
    def path(self) -> Path:
        """The base configuration."""
        return ROOT / "configs" / self.config

    def fixed(self, budget: str) -> dict[str, object]:
        """Return all changes under a budget; of two values for a field, the budget's wins."""
        more = self.long if budget == "35min" else {}
        return {**self.changes, **more, **BUDGETS[budget].changes}

    def digest(self, budget: str) -> str:
        """Return a hash of all settings but seed, rate, duration and folders; commits do not enter."""
        settings: dict[str, Any] = {**flat(load_yaml(self.path)), **self.fixed(budget), "trainer": self.trainer}
        kept = {key: value for key, value in settings.items() if key not in APART}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def images_per_iteration(self, budget: str) -> int:
        """Return the images that an iteration samples and scores."""
        settings: dict[str, Any] = {**load_yaml(self.path), **self.fixed(budget)}
        return int(settings["num_groups"]) * int(settings["group_size"]) * self.judged


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def forward(preset: str, note: str = "", rates: tuple[float, ...] = RATES, **changes: object) -> Method:
    """A preset of forward-process RL with two times per image, and lags for a tenth of the published iterations."""
    lag = "{kind: type1, slope: 0.01}"
    common: dict[str, object] = {
        "preset": preset, "num_times": 2, "time_fraction": 0.9, "reference_weight": "null", "sample_lag": lag,
        "old_lag": lag, "train_prompts": "assets/prompts/shapes_train.jsonl", "ema_decay": 0.95,
    }  # fmt: skip
    return Method("forward_rl", "forward_rl/shapes.yaml", {**common, **changes}, rates, note=note)


def online(config: str, rates: tuple[float, ...], **changes: object) -> Method:
    """Online preference data: a config of Diffusion-DPO that samples its images."""
    return Method("diffusion_dpo", f"diffusion_dpo/{config}.yaml", changes, rates)


def policy(config: str, rates: tuple[float, ...] = RATES, note: str = "") -> Method:
    """A method of the Flow-GRPO trainer with a configuration of its own."""
    return Method(REFERENCE, f"flow_grpo/{config}.yaml", rates=rates, note=note)


def stepwise(config: str, judged: int, rates: tuple[float, ...], note: str = "") -> Method:
    """Step-wise preference: a config of Diffusion-DPO that compares sampling steps."""
    return Method("diffusion_dpo", f"diffusion_dpo/{config}.yaml", rates=rates, note=note, judged=judged)


ON_POLICY = {"sample_lag": "{kind: current}", "old_lag": "{kind: current}"}

METHODS: dict[str, Method] = {
    REFERENCE: Method(REFERENCE, "flow_grpo/shapes.yaml", long={"plan.window_range": "[0, 6]"}),
    "flow_grpo, sliding window": Method(
        REFERENCE,
        "flow_grpo/shapes.yaml",
        {"plan.preset": "mix_grpo", "plan.window_range": "null", "plan.shift_every": 5},
        note="the best change to the quickstart in the study of recipes",
    ),
    "online_dpo": online("shapes_online", (5e-4, 1e-3, 2e-3)),
    "online_kto": online("shapes_online", (5e-4, 1e-3, 2e-3), loss="kto", beta=25.0, train_batch_size=128),
    "raft": online("shapes_raft", (5e-5, 1e-4, 2e-4)),
    "nft": forward("nft", "no anchor", reference_weight=0.0),
    "nft, anchored": forward("nft", "an anchor of 0.1 instead of 1e-4", reference_weight=0.1),
    "nft, guided anchor": forward(
        "nft", "an anchor of 0.3 to the base model at guidance 2.5", reference_weight=0.3, reference_guidance=2.5
    ),
    "awm": forward("awm", "two times instead of six", **ON_POLICY, ema_lag="{kind: linear, slope: 0.01}"),
    "epg": forward("epg"),
    "pepg": forward("pepg"),
    "par": forward("par"),
    "dgpo": forward(
        "dgpo",
        "two times instead of four; copies lag from the 20th step",
        time_fraction="null",
        sample_lag="{kind: dgpo_sampling, start: 20, slope: 0.01}",
        old_lag="{kind: dgpo, slope: 0.01}",
    ),
    "crd": forward(
        "crd",
        "four times instead of twenty; copies lag by at most 0.9",
        num_times=4,
        time_fraction="null",
        sample_lag="{kind: type2, start: 8, maximum: 0.9}",
        old_lag="{kind: crd_old, maximum: 0.9}",
    ),
    "ram": forward("ram", "multiplier and lag are not published"),
    "v_grpo": forward("v_grpo", **ON_POLICY, num_times=4, time_fraction="null"),
    "branch_grpo": policy("shapes_branch", note="splits at steps 0, 2 and 4 of 8; flow_sde at 0.7"),
    "tempflow_branch": policy("shapes_tempflow", note="the first four of eight steps"),
    "g2": policy("shapes_g2", note="four children, one optimizer step per iteration"),
    "tree_rpo": policy("shapes_tree_rpo", note="constants are not published"),
    "fdfo": policy("shapes_fdfo", note="one reward, one optimizer step per iteration"),
    "flow_dppo": policy("shapes_dppo"),
    "spo": stepwise("shapes_spo", 4, STEPWISE, "the verifier on predicted clean images"),
    "tailorpo": stepwise("shapes_tailorpo", 4, STEPWISE, "beta is not published"),
    "d3po": stepwise("shapes_d3po", 1, STEPWISE, "pairs by the verifier"),
}
