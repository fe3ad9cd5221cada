"""What a Flow-GRPO run can be told."""

from __future__ import annotations

import dataclasses
from typing import Literal

from diffalign.config import option
from diffalign.trainers.rollout_config import RolloutConfig


@dataclasses.dataclass(kw_only=True)
class FlowGRPOConfig(RolloutConfig):
    """What a Flow-GRPO run can be told. ``validate`` refuses settings that cannot train."""

    train_batch_size: int = option(64, "images per forward pass while training")
    loss: Literal["flow_grpo", "grpo_guard"] = option("flow_grpo", "clipped surrogate, or with a guarded ratio")
    clip_range: float = option(1.0, "clip range of the ratio, in clip_unit; .inf: no clip", gt=0, infinite=True)
    clip_unit: Literal["joint", "per_dim"] = option("joint", "nats of an image's log-ratio, or per latent dimension")
    filter_zero_advantage: bool = option(
        True, "leave images without an advantage out of the update, unless kl_beta needs them"
    )
    kl_beta: float = option(0.0, "weight of the KL to the reference, in nats per dimension; 0 costs nothing")
    kl_kind: Literal["gaussian", "published"] = option("gaussian", "the true KL, or the one of the paper's code")
    step_weights: Literal["uniform", "tempflow"] = option("uniform", "tempflow: steps that explore more weigh more")
    old_log_prob: Literal["rollout", "recompute"] = option(
        "rollout", "recompute: another pass at training shapes, for bf16 or when batch sizes differ"
    )

    @property
    def filters(self) -> bool:
        """Whether updates leave out images without an advantage: not where a KL pulls on each image."""
        return self.filter_zero_advantage and self.kl_beta == 0

    def validate(self) -> None:
        """ValueError, with what to write instead, for what cannot train; reads no file."""
        super().validate()
        from diffalign.diffusion.plan import make_plan
        from diffalign.losses.flow_grpo import clip_range_per_dimension

        if self.train_batch_size < 1:
            raise ValueError(f"train_batch_size must be at least 1, got {self.train_batch_size}")
        if self.kl_beta < 0:
            raise ValueError(f"kl_beta must be 0 or more, got {self.kl_beta}")
        clip_range_per_dimension(self.clip_range, self.clip_unit, 1)
        if not make_plan(self.plan, 0, self.seed).trained_steps:
            raise ValueError(f"plan.preset {self.plan.preset!r} draws no noise, so that it has no density to train")
