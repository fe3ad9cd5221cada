"""Configuration of a recipe of reward gradients: a preset and what differs from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from diffalign.diffusion.reward_gradient_presets import Recipe


@dataclass(frozen=True)
class RecipeConfig:
    """A preset and what is to differ from it: None stands for the preset's own. See ``Recipe``."""

    bare_field: ClassVar[str] = "preset"

    preset: str = "refl"
    num_steps: int = 10
    sees: str | None = None
    choice: str | None = None
    gradient_steps: int | None = None
    truncate: bool | None = None
    window: tuple[float, float] | None = None
    through: float | None = None
    copies: int | None = None
    invert: bool | None = None
    discount: tuple[float, float] | None = None
    from_images: bool | None = None
    image_start: float | None = None
    eta: float | None = None
    guidance: str | None = None
    compensate: bool | None = None
    reward_loss: str | None = None
    regulariser: str | None = None
    regulariser_weight: float | None = None
    grad_scale: float | None = None
    words: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    word_weight: tuple[float, float] | None = None
    word_weight_inverted: tuple[float, float] | None = None
    gap_floor: float | None = None
    negative: bool | None = None

    def resolve(self) -> Recipe:
        """Return the recipe. ValueError: an unknown preset, or options that do not go together."""
        from diffalign.diffusion.reward_gradient_presets import resolve

        return resolve(self)
