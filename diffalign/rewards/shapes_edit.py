"""Rewards of the embedded editing task: whether an edit was made, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.files import shorten
from diffalign.rewards.base import Extras, Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import on_images
from diffalign.rewards.support.sources import source_images
from diffalign.rewards.support.verdict import VerdictReward
from diffalign.shapes.edits import judge_edits
from diffalign.shapes.scene import COLORS, SHAPES

FIELDS = {"recolor": ("class", "color", "to"), "add": ("class", "color")}
VALUES = {"class": SHAPES, "color": tuple(COLORS), "to": tuple(COLORS)}
DIFFERENCE = "unedited_difference"


@register("shapes_edit", RewardCard("share of an edit's objects, embedded world", 0.1), verdict="score")
@register("shapes_edit_strict", RewardCard("exactly the edit asked for, embedded world", 1.0), verdict="correct")
@register("shapes_edit_kept", RewardCard("pixels outside the edit as before, embedded world", 0.01), verdict="kept")
@dataclass(frozen=True)
class ShapesEditReward(VerdictReward):
    """Score images by one field of the verifier's ``EditVerdict``, of "edit" and "image" in each prompt's metadata.

    Verdicts: "score", graded in [0, 1]; "correct", 1 for exactly the edited source, else 0; or "kept", 1 minus the
    mean absolute difference of the pixels that the edit must not change. This difference is also the extra
    "unedited_difference".
    """

    verdicts: ClassVar[tuple[str, ...]] = ("score", "correct", "kept")

    @on_images(DIFFERENCE)
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Tensor, Extras]:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU. ValueError: no edit or no source."""
        edits = [self._edit(prompt, data) for prompt, data in zip(prompts, metadata, strict=True)]
        sources = source_images(metadata, (images.shape[-2], images.shape[-1]))
        verdicts = judge_edits(sources, images, edits)
        scores = torch.tensor([float(getattr(verdict, self.verdict)) for verdict in verdicts])
        return scores, {DIFFERENCE: torch.tensor([verdict.difference for verdict in verdicts])}

    def _edit(self, prompt: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
        found = data.get("edit")
        edit: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        kind = edit.get("kind")
        if kind not in FIELDS or any(edit.get(name) not in VALUES[name] for name in FIELDS[kind]):
            raise ValueError(
                f"reward {self.name!r} cannot read the edit of {shorten(prompt, 80)!r}: add metadata such as "
                '"edit": {"kind": "recolor", "class": "circle", "color": "red", "to": "blue"}, or '
                '{"kind": "add", "class": "square", "color": "green"}'
            )
        return edit
