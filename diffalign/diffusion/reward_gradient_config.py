"""Configuration of direct reward gradients: a preset and overrides."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from diffalign.config import Checked, option

if TYPE_CHECKING:
    from diffalign.diffusion.reward_gradient_presets import Recipe


@dataclass(frozen=True)
class RecipeConfig(Checked):
    """A preset and overrides; None keeps the preset's own value. See ``Recipe``."""

    bare_field: ClassVar[str] = "preset"

    preset: str = option(
        "refl",
        "refl, refl_script, draft_1, draft_k, draft_lv, alignprop, drtune, imagerefl, direct_align, srpo, leapalign or "
        "reneg",
    )
    num_steps: int = option(10, "sampling steps", ge=2, le=10_000)
    sees: str | None = option(
        None,
        "what the reward scores: sample (the final image), predicted (x0 where sampling stops), recovered (a renoised "
        "image after one step) or straight_through (the final image, with the gradient of leaps)",
    )
    choice: str | None = option(None, "steps that carry the gradient: last, spaced (random offset) or random")
    gradient_steps: int | None = option(None, "number of steps that carry the gradient; 0: all", ge=0)
    truncate: bool | None = option(None, "draw the number of gradient steps from 1 to gradient_steps")
    window: tuple[float, float] | None = option(
        None, "share of the sampling in which random stops, noise levels and leaps are drawn", ge=0, le=1
    )
    through: float | None = option(
        None, "scale of the gradient through the denoiser's input; 0 detaches it", ge=0, le=1
    )
    copies: int | None = option(None, "renoised copies of each finished sample", ge=0, le=1000)
    invert: bool | None = option(None, "let every second step go up in noise, with control words swapped")
    discount: tuple[float, float] | None = option(None, "reward weight at both ends of the window", infinite=False)
    from_images: bool | None = option(None, "start samplings from noised images of train_images")
    image_start: float | None = option(None, "share of the sampling at which noised images enter", ge=0, lt=1)
    eta: float | None = option(None, "DDIM eta of the sampling; 0 is the ODE", ge=0, le=1)
    guidance: str | None = option(None, "guidance of the steps with gradient: off, detached or full")
    compensate: bool | None = option(None, "divide the gradient by the guidance scale")
    reward_loss: str | None = option(None, "loss on the rewards: negative, hinge, distance, group, or file.py:function")
    regulariser: str | None = option(None, "none, pretraining (denoising loss on train_images) or reference")
    regulariser_weight: float | None = option(None, "weight of the regulariser", ge=0)
    grad_scale: float | None = option(None, "factor of the loss, before gradients are clipped", gt=0)
    words: tuple[tuple[str, ...], tuple[str, ...]] | None = option(
        None, "control words that are wanted, and unwanted ones, put before the prompts that the reward reads"
    )
    word_weight: tuple[float, float] | None = option(
        None, "weight of unwanted words at both ends of the window", infinite=False
    )
    word_weight_inverted: tuple[float, float] | None = option(
        None, "the same for steps that go up in noise", infinite=False
    )
    gap_floor: float | None = option(None, "smallest gap to divide by where leaps are weighted", gt=0)
    negative: bool | None = option(None, "train a negative prompt embedding instead of the denoiser")

    def resolve(self) -> Recipe:
        """Return the recipe. ValueError: an unknown preset, or options that do not go together."""
        from diffalign.diffusion.reward_gradient_presets import resolve

        given = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return resolve(self.preset, {name: value for name, value in given.items() if value is not None})
