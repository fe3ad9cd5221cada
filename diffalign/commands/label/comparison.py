"""A pair of images that raters compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffalign.structures import ImageSource, Prompt

Scores = Mapping[str, tuple[float | None, float | None]]  # reward -> scores of both images, None where it failed


@dataclass(frozen=True)
class Comparison:
    """Two images of a prompt, and what is known about them.

    Attributes:
        key: Unique name that stays the same when the command is run again.
        prompt: The prompt.
        images: The first and the second image.
        models: Models that drew them; "" where the data do not say.
        scores: Reward -> scores of both images; None where the reward failed.
        label: The data's own label, the probability that the first image is preferred; None without one.
    """

    key: str
    prompt: Prompt
    images: tuple[ImageSource, ImageSource]
    models: tuple[str, str] = ("", "")
    scores: Scores = field(default_factory=dict)
    label: float | None = None

    @property
    def ranks_models(self) -> bool:
        """Whether an answer tells two models apart."""
        return all(self.models) and self.models[0] != self.models[1]

    def gap(self, reward: str) -> float | None:
        """Return the score of the first image minus that of the second; None if either is missing."""
        first, second = self.scores.get(reward, (None, None))
        return None if first is None or second is None else first - second
