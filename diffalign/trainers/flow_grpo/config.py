"""Configuration of Flow-GRPO."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from diffalign.config import option
from diffalign.rollout.config import AdvantageConfig, RolloutConfig


@dataclasses.dataclass(kw_only=True)
class FlowGRPOConfig(AdvantageConfig, RolloutConfig):
    """Configuration of Flow-GRPO. ``validate`` refuses combinations that cannot train."""

    usage: ClassVar[str] = "diffalign train flow_grpo --config FILE.yaml [--field VALUE ...] [--dry_run]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign train flow_grpo --config configs/flow_grpo/shapes.yaml --max_train_steps 50",
        "diffalign train flow_grpo --model stabilityai/stable-diffusion-3.5-medium --train_prompts prompts.txt "
        "--rewards pickscore --dry_run",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "model", "train_prompts", "rewards", "output_dir", "max_train_steps", "learning_rate", "lora.rank",
        "num_groups", "group_size", "plan.preset",
    )  # fmt: skip

    train_batch_size: int = option(
        64, "images per forward pass while training", section="optimizer", resume="free", ge=1
    )
    train_times_per_forward: int = option(
        1,
        "trained steps of an image in one forward pass; more pay off with few images per pass, or with shards",
        section="optimizer",
        resume="free",
        ge=1,
        le=1000,
    )
    loss: str = option(
        "flow_grpo",
        "flow_grpo: surrogate of the ratio; grpo_guard: of normalised ratios; dppo: Flow-DPPO; fdfo: pairs of images; "
        "or module:function",
        section="loss",
    )
    trust_region: Literal["clip", "quadratic", "dppo", "kl"] = option(
        "clip",
        "what bounds a ratio to 1 +- clip_range: clip, a quadratic penalty, dropped steps of large divergence (dppo), "
        "or a KL penalty; clip_range bounds the divergence for the last two",
        section="loss",
    )
    clip_range: float = option(
        1.0,
        "clip range of the ratio, or bound of the divergence, in clip_unit; .inf disables it",
        section="loss",
        gt=0,
        infinite=True,
    )
    clip_growth: float = option(
        0.0,
        "growth of clip_range with the advantage: times 1 + clip_growth |A| (Dynamic-TreeRPO)",
        section="loss",
        ge=0,
        infinite=False,
    )
    clip_unit: Literal["joint", "per_dim"] = option(
        "joint", "log-ratio to clip: of an image (sum), or per latent dimension (mean)", section="loss"
    )
    filter_zero_advantage: bool = option(
        True, "skip images with zero advantage, unless kl_beta needs them", section="loss"
    )
    width_pruning: Literal["none", "best", "best_worst"] = option(
        "none",
        "branches after the last split of a tree to train: all, those of the best images per split state, or those of "
        "the best and the worst images of a tree",
        section="loss",
    )
    width_pruning_ratio: float = option(
        0.5, "share of these images that width_pruning keeps, at least one of each", section="loss", gt=0, le=1
    )
    best_path_weight: float = option(
        0.0,
        "weight of fine-tuning on the best path of each tree: squared distance of velocities (Dynamic-TreeRPO)",
        section="loss",
        ge=0,
        infinite=False,
    )
    kl_beta: float = option(
        0.0, "weight of the KL to the reference, in nats per dimension; 0: no KL", section="loss", ge=0
    )
    kl_kind: Literal["gaussian", "published"] = option(
        "gaussian", "gaussian: the exact KL; published: that of the paper's code", section="loss"
    )
    step_weights: Literal["uniform", "tempflow"] = option(
        "uniform", "weights of the steps; tempflow: by their noise", section="loss"
    )
    old_log_prob: Literal["rollout", "recompute"] = option(
        "rollout", "recompute: another pass at training shapes, for bf16 or unequal batch sizes", section="loss"
    )

    @property
    def filters(self) -> bool:
        """Whether updates skip images with zero advantage: not where a KL acts on every image, and not of trees."""
        return self.filter_zero_advantage and self.kl_beta == 0 and self.plan.leaves == 1 and not self.partners

    @property
    def partners(self) -> bool:
        """Whether the loss compares the two images of a prompt, which stay on one process."""
        from diffalign.losses.registry import get_objective

        return get_objective(self.loss, self.allow_reward_code).partners

    @property
    def means(self) -> bool:
        """Whether the loss needs the means of steps under the sampling weights."""
        from diffalign.losses.policy import TRUST_REGIONS
        from diffalign.losses.registry import get_objective

        objective = get_objective(self.loss, self.allow_reward_code)
        return objective.means or (objective.regions and TRUST_REGIONS[self.trust_region].means)

    def unread(self) -> Mapping[str, str]:
        """Fields that a run of this configuration does not read: see ``TrainerConfig``."""
        from diffalign.losses.registry import get_objective

        names = {"rollout_cache": "a rollout that is not the model's own has no density to train"}
        names |= {} if self.kl_beta else {"kl_kind": "read only with a kl_beta above 0"}
        if not get_objective(self.loss, self.allow_reward_code).regions:
            names |= {"trust_region": f"read only by losses of a ratio, flow_grpo and grpo_guard, unlike {self.loss!r}"}
        if self.width_pruning == "none":
            names |= {"width_pruning_ratio": "read only with width_pruning"}
        if self.clip_range == math.inf:
            names |= {"clip_growth": "read only with a finite clip_range"}
        if self.partners:
            names |= {"filter_zero_advantage": "read only by losses of single images"}
        if self.plan.leaves == 1:
            trees = ("advantage_rule", "width_pruning", "best_path_weight")
            return names | dict.fromkeys(trees, "read only with plan.branch")
        from diffalign.rollout.advantages import ADVANTAGE_RULES

        if ADVANTAGE_RULES[self.rule].of == "rewards":
            own = ("advantage_std", "advantage_epsilon", "aggregate", "advantage_diversity")
            names |= dict.fromkeys(own, f"not read by advantage_rule {self.rule!r}, which normalises rewards itself")
        if self.plan.anchored:
            names |= {"width_pruning": "read only by trees with several splits, as branch_grpo's"}
        return names | {"filter_zero_advantage": "read only without plan.branch"}

    def validate(self) -> None:
        """Check field combinations. Raises ValueError with a suggested fix; does no I/O."""
        super().validate()
        from diffalign.diffusion.plan import make_plan
        from diffalign.losses.flow_grpo import clip_range_per_dimension
        from diffalign.losses.registry import get_objective

        get_objective(self.loss, self.allow_reward_code)
        clip_range_per_dimension(self.clip_range, self.clip_unit, 1)
        if self.partners:
            self._validate_partners()
        if not make_plan(self.plan, 0, self.seed, trees=True).trained_steps:
            raise ValueError(f"plan.preset {self.plan.preset!r} draws no noise, so that it has no density to train")

    def _validate_partners(self) -> None:
        if self.group_size != 2 or self.plan.leaves != 1:
            raise ValueError(
                f"{self.loss!r} compares two images of a prompt, got group_size {self.group_size}"
                f"{' in trees' if self.plan.leaves != 1 else ''}: set group_size: 2, and no plan.branch"
            )
        if not self.shared_start:
            raise ValueError(f"{self.loss!r} compares images that start from one noise: set shared_start: true")
        if self.advantage_std != "unit":
            raise ValueError(
                f"{self.loss!r} weighs images by half the difference of their rewards, without a deviation, got "
                f"{self.advantage_std!r}: set advantage_std: unit"
            )
        if self.clip_range == math.inf:
            raise ValueError(f"clip_range bounds the penalty of {self.loss!r}: give a finite one, 0.03 is published")
