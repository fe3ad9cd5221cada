"""Rewards of the embedded world: the verdict of its verifier on images of coloured shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.files import shorten
from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.geneval_spec import read_spec
from diffalign.rewards.support.preprocess import on_images
from diffalign.rewards.support.verdict import VerdictReward
from diffalign.shapes import judge_batch
from diffalign.shapes.scene import COLORS, SHAPES


@register("shapes", RewardCard("share of what is asked for, embedded world", 0.1), verdict="score")
@register("shapes_strict", RewardCard("exactly what is asked for, embedded world", 1.0), verdict="strict")
@register("shapes_correct", RewardCard("what is asked for, by GenEval's rule, embedded world", 1.0), verdict="correct")
@dataclass(frozen=True)
class ShapesReward(VerdictReward):
    """Score images by one field of the verifier's ``Verdict`` on the specification in each prompt's metadata.

    Verdicts: "score", graded in [0, 1]; "strict", 1 for exactly the specified objects, else 0; or "correct", 1 by
    GenEval's rule, which allows other objects except when counting, else 0.
    """

    verdicts: ClassVar[tuple[str, ...]] = ("score", "strict", "correct")

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU. ValueError: no specification."""
        specs = [self._spec(prompt, data) for prompt, data in zip(prompts, metadata, strict=True)]
        verdicts = judge_batch(images, specs)
        return torch.tensor([getattr(verdict, self.verdict) for verdict in verdicts], dtype=torch.float32)

    def _spec(self, prompt: str, data: Mapping[str, Any]) -> dict[str, Any]:
        if not data.get("include"):
            raise ValueError(
                f"reward {self.name!r} needs the objects of {shorten(prompt, 80)!r}: add metadata such as "
                '"include": [{"class": "circle", "count": 1, "color": "red"}], as diffalign.shapes.prompt_set does'
            )
        try:
            return read_spec(data, SHAPES, COLORS, "the verifier")
        except ValueError as error:
            where = f"reward {self.name!r} cannot read the metadata of {shorten(prompt, 80)!r}"
            raise ValueError(f"{where}: {error}") from error
