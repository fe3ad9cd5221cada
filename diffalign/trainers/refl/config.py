"""What a ReFL run can be told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffalign.config import option
from diffalign.config.reward_consent import guard_rewards
from diffalign.config.sections import RewardConfig
from diffalign.data.config import PreferenceDataConfig
from diffalign.diffusion.reward_gradient_config import RecipeConfig
from diffalign.trainers.config import TrainerConfig

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(kw_only=True)
class ReFLConfig(TrainerConfig):
    """What a ReFL run can be told. ``validate`` refuses settings that cannot train."""

    train_prompts: Path | None = option(None, ".txt or .jsonl of training prompts")
    train_rollouts: Path | None = option(
        None, "rollout buffer on disk (save_rollouts): samplings go on from its states, with its prompts"
    )
    train_images: tuple[str, ...] = option((), "real images with captions, where the recipe uses some; as train_data")
    data: PreferenceDataConfig = option(
        PreferenceDataConfig(), "how these are read; of pairs the preferred image counts"
    )
    rewards: dict[str, float | RewardConfig] = option(
        {},
        "differentiable rewards and their weights, or {weight, reward, options}; a name alone weighs 1",
        bare=1.0,
        guard=guard_rewards,
    )
    thresholds: dict[str, float] = option({}, "c of the losses hinge and distance, by reward, in its units")
    recipe: RecipeConfig = option(RecipeConfig(), "which steps carry the gradient, what the reward sees, the losses")
    max_unscored: float = option(0.2, "largest share of a step's images that rewards may fail on")
    num_groups: int = option(16, "prompts per optimizer step, over all processes", le=1_000_000)
    group_size: int = option(1, "images per prompt", le=1_000_000)
    rollout_batch_size: int = option(16, "images that are sampled together, on the same random steps")
    train_batch_size: int = option(16, "images per pass with gradients; gradients of passes add up")
    step_checkpointing: bool = option(False, "keep the inputs of the denoiser's recorded calls only, one process")
    vae_checkpointing: bool = option(False, "gradient checkpointing of the VAE's decoder")
    decode_slice: int = option(0, "images decoded and judged at once, with exact gradients; 0: those of a pass")
    decode_precision: Literal["no", "bf16"] = option("no", "the VAE's while training; evaluations decode in float32")
    eval_batch_size: int = option(64, "images per forward pass of an evaluation")
    eval_num_steps: int | None = option(None, "ODE steps of the evaluation; default: recipe.num_steps", ge=1, le=10_000)
    base_share: float = option(0.0, "of an evaluation's steps, the first ones, made by the base: ImageReFL")
    held_out: dict[str, float | RewardConfig] = option(
        {}, "rewards that evaluations report and nothing trains on", bare=1.0, guard=guard_rewards
    )
    sharpness_step: float = option(0.01, "of the sharpness alarm, in pixel values; 0 turns it off")
    alarm_factor: float = option(
        2.0, "the alarm rings where sharpness is so many times that of the base's images", infinite=True
    )
    watch: str | None = option(None, "what early stopping follows; default: the first of held_out, else accuracy")
    early_stopping: int = option(0, "evaluations without a better watched figure before a run ends; 0: never")

    def __post_init__(self) -> None:
        """Paths may be given as text."""
        super().__post_init__()
        self.train_prompts = self.train_prompts and Path(self.train_prompts)
        self.train_rollouts = self.train_rollouts and Path(self.train_rollouts)

    @property
    def decode_dtype(self) -> torch.dtype:
        """What the VAE computes in while training."""
        import torch

        return torch.bfloat16 if self.decode_precision == "bf16" else torch.float32

    @property
    def watched(self) -> str:
        """The figure that early stopping follows."""
        return self.watch or next(iter(self.held_out), "accuracy")

    def validate(self) -> None:
        """ValueError, with what to write instead, for what cannot train; reads no file."""
        super().validate()
        for name in ("num_groups", "group_size", "rollout_batch_size", "train_batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decode_slice", "sharpness_step", "early_stopping"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"max_unscored is a share, in [0, 1], got {self.max_unscored}")
        if not 0 <= self.base_share < 1:
            raise ValueError(f"base_share lies in [0, 1), got {self.base_share}")
        if not self.alarm_factor > 1:
            raise ValueError(f"alarm_factor must be more than 1, got {self.alarm_factor}")
        if self.early_stopping and not self.eval_steps:
            raise ValueError("early_stopping needs evaluations on the way: give eval_steps")
        self._validate_recipe()
        self.validate_batches(1)

    def _validate_recipe(self) -> None:
        from diffalign.losses.registry import get_reward_loss

        recipe = self.recipe.resolve()
        loss = get_reward_loss(recipe.reward_loss, self.allow_reward_code)
        if self.thresholds and not loss.threshold:
            raise ValueError(f"thresholds: the loss {recipe.reward_loss!r} has none; leave them out")
        if (recipe.from_images or recipe.regulariser == "pretraining") and not self.train_images:
            raise ValueError(
                f"recipe {self.recipe.preset!r} needs real images: give train_images, or for a pretraining "
                "regulariser write recipe.regulariser: none"
            )
        if self.train_images and not (recipe.from_images or recipe.regulariser == "pretraining"):
            raise ValueError(f"train_images: recipe {self.recipe.preset!r} uses none; leave them out")
        if self.train_rollouts and (self.train_prompts or recipe.from_images):
            raise ValueError("train_rollouts brings prompts and states along: leave out train_prompts and from_images")
        if recipe.from_images and self.train_prompts:
            raise ValueError("images bring their captions along: leave out train_prompts")
        if recipe.negative and (not self.guidance_scale or recipe.guidance != "full"):
            raise ValueError("a negative prompt acts by guidance: give a guidance_scale and recipe.guidance: full")
        if recipe.negative and recipe.regulariser == "pretraining":
            raise ValueError("a negative prompt takes no part in denoising images: leave out the regulariser")
        if self.base_share and recipe.negative:
            raise ValueError("base_share is for trained weights: leave it out with a trained negative prompt")
        if recipe.compensate and (not self.guidance_scale or recipe.guidance == "off"):
            raise ValueError("recipe.compensate divides by a guidance that is off: leave it out")

    def validate_batches(self, processes: int) -> None:
        """ValueError where images do not divide over processes, or groups over passes."""
        from diffalign.losses.registry import get_reward_loss

        images = self.num_groups * self.group_size
        if images % processes:
            raise ValueError(f"num_groups * group_size = {images} images do not divide by {processes} processes")
        if processes > 1 and self.step_checkpointing:
            raise ValueError("step_checkpointing works in one process: use gradient_checkpointing over several")
        if not get_reward_loss(self.recipe.resolve().reward_loss).groups:
            return
        if self.group_size < 2:
            raise ValueError(
                f"group_size {self.group_size}: a lone image has no group to be compared with; use 2 or more"
            )
        sizes = {"rollout_batch_size": self.rollout_batch_size, "train_batch_size": self.train_batch_size}
        sizes |= {"decode_slice": self.decode_slice, "the images of a process": images // processes}
        if split := [name for name, size in sizes.items() if size % self.group_size]:
            raise ValueError(f"the loss 'group' needs whole groups: make {split[0]} a multiple of {self.group_size}")
