"""Configuration of trainers that sample images and score them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffalign.config import option
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig
from diffalign.diffusion.plan_config import PlanConfig
from diffalign.rollout.cache_config import RolloutCacheConfig
from diffalign.rollout.collapse_config import CollapseConfig
from diffalign.runtime.trainer_config import TrainerConfig

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(kw_only=True)
class ScoredSamplesConfig(TrainerConfig):
    """Configuration of a trainer that samples images of prompts and scores them with rewards."""

    train_prompts: Path | None = option(
        None,
        "training prompts: file, address (s3://...), hub id or named set, e.g. geneval",
        section="data",
    )
    rewards: dict[str, float | RewardConfig] = option(
        {},
        "rewards to train on and their weights, or {weight, reward, options}; a name alone weighs 1",
        bare=1.0,
        section="rewards",
        guard=guard_rewards,
        infinite=False,
    )
    max_unscored: float = option(
        0.2,
        "largest share of an iteration's images that rewards may fail on",
        section="rewards",
        resume="free",
        ge=0,
        le=1,
    )
    num_groups: int = option(16, "prompts per iteration, over all processes", section="sampling", ge=1, le=1_000_000)
    group_size: int = option(16, "images per prompt", section="sampling", ge=1, le=1_000_000)
    rollout_batch_size: int = option(
        64, "images per forward pass while sampling, also in evaluations", section="sampling", resume="free", ge=1
    )
    collapse: CollapseConfig = option(
        CollapseConfig(), "alarm for a reward or diversity that collapses", section="run", resume="free"
    )
    decode_precision: Literal["no", "bf16"] = option(
        "no", "precision of the VAE while sampling; evaluations decode in float32", section="performance"
    )

    @property
    def decode_dtype(self) -> torch.dtype:
        """The dtype that the VAE decodes training images in."""
        import torch

        return torch.bfloat16 if self.decode_precision == "bf16" else torch.float32


@dataclasses.dataclass(kw_only=True)
class RolloutConfig(ScoredSamplesConfig):
    """Configuration of a trainer that collects rollouts along a plan."""

    plan: PlanConfig = option(PlanConfig(), "solver, noise and training of each sampling step", section="sampling")
    shared_start: bool = option(True, "start the images of a group from the same noise", section="sampling")
    updates_per_rollout: int = option(
        1, "optimizer steps per iteration, each on its share of the images", section="optimizer", ge=1
    )
    overlap_rewards: bool = option(
        True,
        "score images while the next ones are sampled, except in the first iteration and in bf16 on a CPU",
        section="performance",
        resume="free",
    )
    rollout_cache: RolloutCacheConfig = option(
        RolloutCacheConfig(),
        "lossy cache over the steps of a rollout, for trainers that need no density of it",
        section="performance",
    )
    save_rollouts: bool = option(
        False,
        "save the last iteration's images, latents and rewards to rollouts/",
        section="checkpoints",
        resume="free",
    )

    def validate(self) -> None:
        """Check field combinations. Raises ValueError with a suggested fix; does no I/O."""
        super().validate()
        if self.reads_rollouts:
            self._validate_rollouts()
        if self.compile and self.rollout_cache.kind != "none":
            raise ValueError("rollout_cache decides at run time what to compute, and compile before: give one of them")

    def validate_shards(self) -> None:
        """Refuse settings that are not known to work with sharded weights. Raises ValueError with a suggested fix."""
        super().validate_shards()
        if self.rollout_cache.kind != "none":
            raise ValueError(
                "rollout_cache may skip layers on one process alone, and shards are gathered by all: set "
                "rollout_cache: none, or launch with ddp.yaml"
            )

    def unread(self) -> Mapping[str, str]:
        """Fields that a run of this configuration does not read: see ``TrainerConfig``."""
        return {f"rollout_cache.{name}": reason for name, reason in self.rollout_cache.unread().items()}

    @property
    def reads_rollouts(self) -> bool:
        """Whether the run collects rollouts."""
        return True

    def _validate_rollouts(self) -> None:
        from diffalign.diffusion.plan import make_plan
        from diffalign.rollout.tree import trees_per_group

        if self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2, got {self.group_size}: a lone image has no group to compare it with; "
                "4 or more are usual"
            )
        self.validate_batches(1)
        plan = make_plan(self.plan, 0, self.seed, trees=True)
        trees_per_group(plan, self.group_size)
        if plan.anchors and not self.shared_start:
            raise ValueError(
                f"plan.preset {self.plan.preset!r} branches from one ODE per prompt: set shared_start: true"
            )

    def validate_batches(self, processes: int) -> None:
        """Check that images divide evenly over processes and updates. Raises ValueError with a suggested fix."""
        images, parts = self.num_groups * self.group_size, processes * self.updates_per_rollout
        if self.plan.anchored and self.num_groups % processes:
            raise ValueError(
                f"the trees of a prompt share one ODE, on one process: make num_groups a multiple of the {processes} "
                "processes"
            )
        leaves = self.plan.leaves
        if images % (parts * leaves):
            trees = f" in trees of {leaves} (plan.branch)" if leaves > 1 else ""
            raise ValueError(
                f"num_groups * group_size = {images} images{trees} do not divide by {processes} process(es) times "
                f"updates_per_rollout = {self.updates_per_rollout}: make the product a multiple of {parts * leaves}"
            )


RULES = {"branch_grpo": "per_depth", "tempflow_branch": "per_depth", "g2": "granular", "tree_rpo": "per_depth"}


@dataclasses.dataclass(kw_only=True)
class AdvantageConfig:
    """Configuration of advantages within the groups of a rollout."""

    advantage_std: Literal["group", "global", "unit"] = option(
        "group",
        "standard deviation to divide advantages by: of each group, of the iteration (global), or none (unit)",
        section="advantages",
    )
    advantage_epsilon: float = option(1e-4, "added to that standard deviation", section="advantages", ge=0)
    advantage_clip: float = option(
        5.0, "bound on advantages; .inf disables it", section="advantages", gt=0, infinite=True
    )
    aggregate: Literal["rewards", "advantages"] = option(
        "rewards", "what to sum over several rewards", section="advantages"
    )
    advantage_diversity: str = option(
        "",
        "name of a reward, such as novelty with weight 0, by which positive advantages are multiplied, relative to its "
        "mean in the group (GARDO); default: none",
        section="advantages",
    )
    advantage_rule: Literal["leaf", "subtree_mean", "per_depth", "per_depth_weighted", "granular"] | None = option(
        None,
        "advantage of a tree's nodes: leaf (nothing above the last branching), subtree_mean of the leaves below, "
        "per_depth (BranchGRPO, TempFlow-GRPO), per_depth_weighted (by the density of paths) or granular (G2); "
        "default: the plan preset's, else subtree_mean",
        section="advantages",
    )

    @property
    def rule(self) -> str:
        """The advantage rule: the configured one, else that of the plan's method."""
        plan: PlanConfig = self.plan  # type: ignore[attr-defined]
        return self.advantage_rule or RULES.get(plan.preset, "subtree_mean")

    @property
    def normalisation(self) -> Literal["group", "global", "unit"]:
        """What advantages are divided by."""
        return self.advantage_std
