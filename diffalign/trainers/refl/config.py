"""Configuration of ReFL and other direct reward gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from diffalign.config import option
from diffalign.data.config import PreferenceDataConfig
from diffalign.diffusion.reward_gradient_config import RecipeConfig
from diffalign.rollout.config import ScoredSamplesConfig


@dataclasses.dataclass(kw_only=True)
class ReFLConfig(ScoredSamplesConfig):
    """Configuration of ReFL and other direct reward gradients. ``validate`` refuses combinations that cannot train."""

    usage: ClassVar[str] = "diffalign train refl --config FILE.yaml [--field VALUE ...] [--dry_run]"
    examples: ClassVar[tuple[str, ...]] = (
        "diffalign train refl --config configs/refl/shapes.yaml --max_train_steps 50",
        "diffalign train refl --model stable-diffusion-v1-5/stable-diffusion-v1-5 --train_prompts prompts.txt "
        "--rewards image_reward --recipe draft_1 --dry_run",
    )
    essential: ClassVar[tuple[str, ...]] = (
        "model", "train_prompts", "rewards", "recipe.preset", "output_dir", "max_train_steps", "learning_rate",
        "lora.rank", "num_groups", "train_batch_size",
    )  # fmt: skip

    train_rollouts: Path | None = option(
        None,
        "rollout buffer on disk (save_rollouts): continue sampling from its states, with its prompts",
        section="data",
    )
    train_images: tuple[str, ...] = option(
        (),
        "real images with captions, for recipes that use them: files, folders, addresses (s3://...) or hub ids",
        section="data",
    )
    data: PreferenceDataConfig = option(
        PreferenceDataConfig(), "how train_images are read; of pairs the preferred image is used", section="data"
    )
    aspect_buckets: int = option(
        0,
        "read each of train_images at the size of its aspect ratio: sizes of the resolution's area, with sides that "
        "are multiples of this many pixels, 64 is usual; 0: all at the resolution",
        section="data",
        ge=0,
        le=4096,
    )
    thresholds: dict[str, float] = option(
        {}, "thresholds of the losses hinge and distance, by reward, in its units", section="loss", infinite=False
    )
    recipe: RecipeConfig = option(
        RecipeConfig(), "steps that carry the gradient, what the reward scores, losses", section="loss"
    )
    num_groups: int = option(
        16, "prompts per optimizer step, over all processes", section="sampling", ge=1, le=1_000_000
    )
    group_size: int = option(1, "images per prompt", section="sampling", ge=1, le=1_000_000)
    rollout_batch_size: int = option(
        16, "images to sample together, on the same random steps", section="sampling", resume="free", ge=1
    )
    train_batch_size: int = option(
        16, "images per pass with gradients; gradients accumulate", section="optimizer", resume="free", ge=1
    )
    step_checkpointing: bool = option(
        False,
        "store only the denoiser's inputs of each step with gradient and recompute the rest; single process only",
        section="performance",
    )
    vae_checkpointing: bool = option(
        False, "gradient checkpointing of the VAE decoder", section="performance", resume="free"
    )
    decode_slice: int = option(
        0,
        "images to decode and score at once, with exact gradients; 0: all of a pass",
        section="performance",
        resume="free",
        ge=0,
    )
    eval_batch_size: int = option(
        64, "images per forward pass of an evaluation", section="evaluation", resume="free", ge=1
    )
    base_share: float = option(
        0.0,
        "share of an evaluation's steps, the first ones, made by the base model (ImageReFL)",
        section="evaluation",
        ge=0,
        lt=1,
    )
    sharpness_step: float = option(
        0.01, "step size of the sharpness alarm, in pixel values; 0 disables it", section="evaluation", ge=0
    )
    alarm_factor: float = option(
        2.0,
        "raise the alarm where sharpness is this many times that of the base's images",
        section="evaluation",
        gt=1,
        infinite=True,
    )
    watch: str | None = option(
        None, "metric for early stopping; default: the first of held_out, else accuracy", section="evaluation"
    )
    early_stopping: int = option(
        0, "evaluations without improvement after which the run ends; 0: never", section="evaluation", ge=0
    )

    @property
    def watched(self) -> str:
        """The metric that early stopping follows."""
        return self.watch or next(iter(self.held_out_judges()), "accuracy")

    def unread(self) -> Mapping[str, str]:
        """Fields that a run of this configuration does not read: see ``TrainerConfig``."""
        names = {} if self.train_images else dict.fromkeys(("data", "aspect_buckets"), "read only with train_images")
        return names if self.sharpness_step else names | {"alarm_factor": "read only with a sharpness_step above 0"}

    def validate(self) -> None:
        """Check field combinations. Raises ValueError with a suggested fix; does no I/O."""
        self.check()
        self._validate_recipe()  # says that train_images is missing, before what is read only with it is refused
        super().validate()
        if self.early_stopping and not self.eval_steps:
            raise ValueError("early_stopping needs evaluations on the way: give eval_steps")
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
                f"group_size must be at least 2, got {self.group_size}: the loss 'group' compares images of a prompt"
            )
        sizes = {"rollout_batch_size": self.rollout_batch_size, "train_batch_size": self.train_batch_size}
        sizes |= {"decode_slice": self.decode_slice, "the images of a process": images // processes}
        if split := [name for name, size in sizes.items() if size % self.group_size]:
            raise ValueError(f"the loss 'group' needs whole groups: make {split[0]} a multiple of {self.group_size}")
