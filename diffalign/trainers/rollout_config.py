"""Configuration of trainers that collect rollouts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffalign.config import option
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig
from diffalign.diffusion.plan_config import PlanConfig
from diffalign.trainers.config import TrainerConfig

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(kw_only=True)
class RolloutConfig(TrainerConfig):
    """Configuration of a trainer that collects rollouts."""

    train_prompts: Path | None = option(None, ".txt or .jsonl of training prompts")
    rewards: dict[str, float | RewardConfig] = option(
        {},
        "reward names and their weights, or {weight, reward, options}; a name alone weighs 1",
        bare=1.0,
        guard=guard_rewards,
    )
    plan: PlanConfig = option(PlanConfig(), "what each step of a rollout does")
    eval_num_steps: int | None = option(None, "ODE steps of the evaluation; default: plan.num_steps", ge=1, le=10_000)
    num_groups: int = option(16, "prompts per iteration, over all processes", le=1_000_000)
    group_size: int = option(16, "images per prompt", le=1_000_000)
    shared_start: bool = option(True, "images of a group start from the same noise")
    rollout_batch_size: int = option(64, "images per forward pass while sampling")
    decode_precision: Literal["no", "bf16"] = option("no", "the VAE's while sampling; evaluations decode in float32")
    updates_per_rollout: int = option(1, "optimizer steps per iteration, each on its share of the images")
    advantage_std: Literal["group", "global"] = option("group", "deviation that advantages are divided by")
    advantage_epsilon: float = option(1e-4, "added to that deviation", ge=0)
    advantage_clip: float = option(5.0, "bound on advantages; .inf: none", gt=0, infinite=True)
    aggregate: Literal["rewards", "advantages"] = option("rewards", "what is summed over several rewards")
    max_unscored: float = option(0.2, "largest share of an iteration's images that rewards may fail on")
    overlap_rewards: bool = option(
        True, "score images while the next ones are sampled, but in the first iteration, and in bf16 on a CPU"
    )
    save_rollouts: bool = option(False, "keep the last iteration's images, latents and rewards in rollouts/")

    def __post_init__(self) -> None:
        """Paths may be given as text."""
        super().__post_init__()
        self.train_prompts = self.train_prompts and Path(self.train_prompts)

    @property
    def decode_dtype(self) -> torch.dtype:
        """What the VAE computes in while sampling."""
        import torch

        return torch.bfloat16 if self.decode_precision == "bf16" else torch.float32

    def validate(self) -> None:
        """ValueError, with what to write instead, for what cannot train; reads no file."""
        super().validate()
        if self.group_size < 2:
            raise ValueError(
                f"group_size {self.group_size}: a lone image has no group to be better than; use 4 or more"
            )
        for name in ("num_groups", "rollout_batch_size", "updates_per_rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"max_unscored is a share, in [0, 1], got {self.max_unscored}")
        self.validate_batches(1)
        from diffalign.diffusion.plan import make_plan

        make_plan(self.plan, 0, self.seed)

    def validate_batches(self, processes: int) -> None:
        """ValueError where images do not divide evenly over processes and updates."""
        images, parts = self.num_groups * self.group_size, processes * self.updates_per_rollout
        if images % parts:
            raise ValueError(
                f"num_groups * group_size = {images} images do not divide by {processes} process(es) times "
                f"updates_per_rollout = {self.updates_per_rollout}: make the product a multiple of {parts}"
            )
