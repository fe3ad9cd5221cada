"""Aesthetic predictor v2.5: a linear head on SigLIP's image embedding; ignores prompts.

Code and weights of discus0434/aesthetic-predictor-v2-5 are under the AGPL-3.0: this file holds neither, and the user
names a file of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionModel

from diffalign.rewards.base import Metadata, RewardCard, RewardUnavailable, register
from diffalign.rewards.support.preprocess import Preprocess, at_least_float32, on_images, should_quantize, stretch
from diffalign.rewards.support.weights import (
    Weights,
    check_report,
    frozen,
    load_once,
    on_device,
    pinned,
    state_dict,
)

FILE = "aesthetic_predictor_v2_5.pth"
ENCODER = "google/siglip-so400m-patch14-384"
WIDTHS = (1024, 128, 64, 16, 1)
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of SigLIP's pixels


class Head(nn.Module):
    """Five linear layers without activations; dropout, which does nothing here, keeps the published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(zip((width, *WIDTHS), WIDTHS, strict=False)):
            layers += [nn.Dropout()] if i else []
            layers.append(nn.Linear(inner, outer))
        self.scoring_head = nn.Sequential(*layers)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map embeddings (B, width) to scores (B,)."""
        return self.scoring_head(embedding).squeeze(-1)


def _load(weights: Weights, encoder: str) -> tuple[SiglipVisionModel, Head]:
    model, report = SiglipVisionModel.from_pretrained(**pinned(encoder), output_loading_info=True)
    # The published repository holds the text encoder too.
    vision = {
        key: [n for n in map(str, names) if not n.startswith(("text_model.", "logit_"))]
        for key, names in report.items()
    }
    check_report(vision, encoder, "SigLIP's vision model")
    head = Head(model.config.hidden_size)
    head.load_state_dict(state_dict(weights, FILE))
    return frozen(model, weights), frozen(head, weights)


@dataclass(frozen=True)
class AestheticV25Reward:
    """Predict the aesthetic rating of an image, 1 to 10; 5.5 and more is good.

    Args:
        name: under which scores are stored.
        weights: of the head, a file of the user's.
        encoder: folder, or hub id with or without @revision, of SigLIP.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    encoder: str = ENCODER
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (-math.inf, math.inf)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        if not self.weights.path:
            raise RewardUnavailable(
                f"its head is under the AGPL-3.0 and not downloaded for you: get {FILE} of "
                "discus0434/aesthetic-predictor-v2-5, if its licence suits you, and set options: {path: FILE}"
            )
        model, head = load_once(_load, self.weights, self.encoder)
        step = Preprocess(goal=model.config.image_size, fit=stretch, mean=HALF, std=HALF)
        pixels = step(images, quantize=should_quantize(self.quantize, images)).to(self.weights.dtype)
        with on_device(model, self.weights, images.device), on_device(head, self.weights, images.device):
            return at_least_float32(head(F.normalize(model(pixel_values=pixels).pooler_output, dim=-1)))


FACTS = RewardCard("looks", 0.1, "aesthetic-predictor-v2-5", FILE, "AGPL-3.0", 430)


@register("aesthetic_v2.5", FACTS)
def aesthetic_v25(
    name: str,
    path: str = "",
    encoder: str = ENCODER,
    precision: str = "no",
    offload: bool = False,
    quantize: bool | None = None,
) -> AestheticV25Reward:
    """Build the predictor from a downloaded file of its head."""
    return AestheticV25Reward(name, Weights(path, None, precision, offload), encoder, quantize)
