"""What every training run can be told, whatever it optimises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from diffalign.config import check_numbers, option

# What is written, watched or looked at, and how work is cut into batches: the weights are the same, up to rounding.
CHANGEABLE = frozenset(
    {"output_dir", "eval_steps", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"}
    | {"report_to", "hang_timeout", "auto_batch", "rollout_batch_size", "train_batch_size", "gradient_checkpointing"}
    | {"save_rollouts", "cache", "cache_dir", "eval_prompts", "eval_rewards", "eval_images_per_prompt"}
    | {"eval_num_steps", "max_unscored", "allow_reward_code", "offload", "overlap_rewards"}
)


@dataclass(kw_only=True)
class TrainingConfig:
    """Fields that the loop reads. A trainer's own config adds what to collect and how to score it."""

    numbers_checked: ClassVar[bool] = True

    output_dir: Path = option(Path("runs/default"), "the run folder")
    seed: int = option(0, "the only source of randomness of a run")
    max_train_steps: int = option(100, "optimizer steps")
    learning_rate: float = option(3e-4, "peak learning rate")
    lr_scheduler: str = option("constant", "constant, linear or cosine, after the warm-up")
    lr_warmup_steps: int = option(0, "optimizer steps of linear warm-up")
    optimizer: Literal["adamw", "adamw_8bit"] = option("adamw", "adamw_8bit: smaller moments; needs bitsandbytes")
    adam_beta1: float = option(0.9, "AdamW", ge=0, lt=1)
    adam_beta2: float = option(0.999, "AdamW", ge=0, lt=1)
    adam_weight_decay: float = option(1e-4, "AdamW", ge=0)
    adam_epsilon: float = option(1e-8, "AdamW", ge=1e-30)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; .inf: never", infinite=True)
    ema_decay: float = option(0.0, "decay of the averaged weights, which are evaluated and exported; 0 turns them off")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "precision of the denoiser's passes")
    eval_steps: int = option(0, "optimizer steps between evaluations; 0: at the start and the end only")
    checkpointing_steps: int = option(0, "optimizer steps between checkpoints; 0: at the end only")
    checkpoints_total_limit: int = option(2, "checkpoints kept, at least 2")
    resume_from_checkpoint: str | None = option(None, '"latest", or the path of a checkpoint')
    report_to: str = option("none", "none, tensorboard, wandb, trackio, or several with commas")
    max_grad_spike: float = option(
        100.0, "a gradient so many times the usual norm is not taken; 0 or .inf: all are", infinite=True
    )
    hang_timeout: float = option(
        3600.0, "seconds without progress after which a run ends with all stacks; 0 or .inf: never", infinite=True
    )
    auto_batch: bool = option(False, "halve a batch that does not fit into memory, and go on; one process only")

    def __post_init__(self) -> None:
        """Paths may be given as text."""
        self.output_dir = Path(self.output_dir)

    def validate(self) -> None:
        """ValueError for a setting that cannot train."""
        check_numbers(self)
        at_least = {"max_train_steps": 1, "eval_steps": 0, "checkpointing_steps": 0, "lr_warmup_steps": 0}
        at_least |= {"max_grad_spike": 0, "hang_timeout": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if 0 < self.hang_timeout < 1:
            raise ValueError(f"hang_timeout must be at least 1 second, got {self.hang_timeout}; 0 turns it off")
        if self.checkpoints_total_limit < 2:
            raise ValueError("checkpoints_total_limit must be at least 2: with 1, a crash while saving leaves none")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay lies in [0, 1), got {self.ema_decay}; 0 turns it off, 0.9 to 0.999 are usual")
        if self.lr_scheduler not in ("constant", "linear", "cosine"):
            raise ValueError(f"lr_scheduler must be constant, linear or cosine, got {self.lr_scheduler!r}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
