"""VisionReward for images (arXiv 2412.21059): a linear score of yes-or-no answers of a served model.

Coefficients and masks are those of THUDM/VisionReward @ 511960d, ``weight_select.json`` and ``inference-image.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Extras, Metadata, Reward, RewardCard, get_reward, register
from diffalign.rewards.support.preprocess import on_images
from diffalign.rewards.support.prompts import published_template
from diffalign.rewards.vlm_judge import Endpoint, connect, yes_shares

# Question that tells whether a body, a face, or hands are shown -> questions that count only if so.
MASKS = {0: (22, 23, 24, 28, 29), 1: (25, 26), 2: (27,)}
ALIGNMENT = 2.3542882631150923  # of VQAScore
COEFFICIENTS = (
    0.06884638950983572, 0.10183602465324491, 0.13065931709231515, 0.06950163043882204, 0.055586526962739594,
    0.043667179730282585, 0.21147753430256036, 0.5828223926159606, 0.050970475125495074, 0.06795294324813127,
    0.06490948537019271, 0.3247595671294795, 0.07562963582524587, 0.07747325725869728, 0.04220313071020716,
    0.0514756964680454, 0.010243704179493112, 0.01737524212080004, 0.11455097588617139, 0.0824178853123111,
    0.05534874470299955, 0.03004180339398678, 0.03136553593758656, 0.07665491897864558, 0.07187632290686215,
    0.012129902293749316, 0.015129688742038013,
)  # fmt: skip
BOUND = sum(COEFFICIENTS)


def questions() -> list[str]:
    """List the published questions; the first three are masks and have no coefficient."""
    return published_template("vision_reward").splitlines()


def checklist_score(answers: Tensor) -> Tensor:
    """Compute the linear score of answers (B, 30), 1 for yes and -1 for no: (B,), float64."""
    table = answers.double().clone()
    for mask, rows in MASKS.items():
        table[:, list(rows)] *= (answers[:, mask] > 0).double()[:, None]
    return table[:, len(MASKS) :] @ torch.tensor(COEFFICIENTS, dtype=torch.float64)


@dataclass(frozen=True)
class VisionReward:
    """Score images by the published checklist, plus the weighted ``alignment`` reward if there is one.

    The extra "checklist" is the score without alignment. An image for which a question fails scores NaN.

    Args:
        name: under which scores are stored.
        endpoint: of the model, which answers with yes or no.
        alignment: a VQAScore, in [0, 1].
        differentiable: False.
    """

    name: str
    endpoint: Endpoint
    alignment: Reward | None = None
    differentiable: bool = False

    @property
    def range(self) -> tuple[float, float]:
        """Bounds of the linear score."""
        return (-BOUND, BOUND + (ALIGNMENT if self.alignment else 0.0))

    @on_images("checklist")
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Tensor, Extras]:
        """Score images (B, 3, H, W), float, [0, 1]: (B,) float32 on the CPU."""
        asked = [(i, question) for i in range(len(images)) for question in questions()]
        shares = yes_shares(self.name, self.endpoint, images, asked, hard=True).view(len(images), -1)
        score = checklist_score(2 * shares - 1).where(shares.isfinite().all(1), torch.nan)
        total = score
        if self.alignment is not None:
            found: Any = self.alignment(images, prompts, metadata)
            total = score + ALIGNMENT * found.detach().cpu().double()
        return total.float(), {"checklist": score.float()}


FACTS = RewardCard(
    "human preference, by a checklist", 0.2, "arXiv 2412.21059", "THUDM/VisionReward-Image", "other", 19500, served=True
)


@register("vision_reward", FACTS)
def vision_reward(
    name: str,
    url: str,
    model: str = FACTS.weights,
    alignment: str | None = "vqascore",
    token_env: str | None = None,
    timeout: float = 60.0,
    retries: int = 4,
    concurrency: int = 8,
) -> VisionReward:
    """Build the judge. alignment: reward of the published term for prompt fidelity, loaded here; null without it."""
    endpoint = connect(url, model, token_env, timeout, retries, concurrency, max_tokens=4)
    return VisionReward(name, endpoint, None if alignment is None else get_reward(alignment))
