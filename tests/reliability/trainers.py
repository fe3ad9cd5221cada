"""The trainers that are held to the list: one line each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from diffalign import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    FlowGRPOConfig,
    FlowGRPOTrainer,
    ForwardRLConfig,
    ForwardRLTrainer,
    LoraConfig,
    ReFLConfig,
    ReFLTrainer,
)
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.prompts import load_prompts
from diffalign.diffusion.plan import PlanConfig
from diffalign.diffusion.reward_gradient_config import RecipeConfig
from tests.conftest import PIPELINE, PROMPTS, ROOT

PAIRS = str(ROOT / "assets/preferences/shapes.parquet")
COMMON = {"model": str(PIPELINE), "max_sequence_length": 16, "lora": LoraConfig(rank=2), "learning_rate": 1e-3}
COMMON |= {"ema_decay": 0.9, "lr_scheduler": "cosine", "max_train_steps": 4, "checkpointing_steps": 2}
ROLLOUTS = {"rewards": {"brightness": 1.0}, "num_groups": 1, "group_size": 4, "updates_per_rollout": 2}
ROLLOUTS |= {"rollout_batch_size": 2, "train_batch_size": 1, "train_prompts": PROMPTS / "shapes_train.jsonl"}
FLOW = {"plan": PlanConfig(preset="first_steps", num_steps=2, window_size=1)}
DATA = {"train_data": (PAIRS,), "data": PreferenceDataConfig(scan=2), "num_pairs": 2, "train_batch_size": 1}
DATA |= {"beta": 500.0, "cache": False, "eval_num_steps": 2}
ONLINE = {"plan": PlanConfig(preset="ode", num_steps=2), "shared_start": False, "beta": 500.0}
REFL = {"recipe": RecipeConfig(preset="draft_k", num_steps=2, gradient_steps=1), "rewards": {"brightness": 1.0}}
REFL |= {"num_groups": 2, "rollout_batch_size": 2, "train_batch_size": 1}
REFL |= {"train_prompts": PROMPTS / "shapes_train.jsonl"}


@dataclass(frozen=True)
class Case:
    """A trainer, its configuration, and settings that train in a second."""

    trainer: type
    config: type
    settings: dict[str, Any]

    def make(self, args: Any, **changes: Any) -> Any:
        """The trainer."""
        return self.trainer(args=replace(args, **changes))


TRAINERS = {
    "flow_grpo": Case(FlowGRPOTrainer, FlowGRPOConfig, ROLLOUTS | FLOW),
    "diffusion_dpo": Case(DiffusionDPOTrainer, DiffusionDPOConfig, DATA),
    "online_dpo": Case(DiffusionDPOTrainer, DiffusionDPOConfig, ROLLOUTS | ONLINE),
    "forward_rl": Case(ForwardRLTrainer, ForwardRLConfig, ROLLOUTS | {"plan": ONLINE["plan"]}),
    "refl": Case(ReFLTrainer, ReFLConfig, REFL),
}


def default(*names: str) -> list[Any]:
    """All trainers as parameters: those named belong to the default tests, the others to the slow ones."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in TRAINERS]


QUICK = default("flow_grpo", "diffusion_dpo")  # one that samples, and one that reads pairs


def short(name: str, folder: Path, **changes: Any) -> Any:
    """The configuration of a short run."""
    return TRAINERS[name].config(**(COMMON | TRAINERS[name].settings | {"output_dir": folder} | changes))


def held_out(folder: Path) -> Path:
    """A file of two held-out prompts, for runs that are evaluated."""
    path = folder / "held_out.txt"
    path.write_text("\n".join(p.text for p in load_prompts(PROMPTS / "shapes_validation.jsonl", 2)))
    return path
