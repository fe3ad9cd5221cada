"""LAION's improved aesthetic predictor: a linear map of the image embedding of CLIP ViT-L/14; ignores prompts.

Layout and weights follow ``sac+logos+ava1-l14-linearMSE.pth`` of the repository improved-aesthetic-predictor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import CLIPModel

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.clip import image_embeddings, load_clip
from diffalign.rewards.support.preprocess import at_least_float32, centre_round, on_images, should_quantize
from diffalign.rewards.support.weights import Weights, frozen, load_once, on_device, split, state_dict

WIDTHS = (1024, 128, 64, 16, 1)
DROPOUTS = (0.2, 0.2, 0.1)  # after the first three layers; they shift the indices of later layers in the state dict


class Head(nn.Module):
    """Five linear layers with dropout and no activations; parameter names match the published file."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, out in enumerate(WIDTHS):
            layers.append(nn.Linear(width, out))
            layers += [nn.Dropout(DROPOUTS[i])] if i < len(DROPOUTS) else []
            width = out
        self.layers = nn.Sequential(*layers)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map embeddings (B, width) to scores (B,)."""
        return self.layers(embedding).squeeze(-1)


def _load(weights: Weights, file: str, clip: str) -> tuple[CLIPModel, Head]:
    model = load_clip(*split(clip))
    head = Head(model.config.projection_dim)
    head.load_state_dict(state_dict(weights, file))
    return frozen(model, weights), frozen(head, weights)


@dataclass(frozen=True)
class AestheticReward:
    """Predict the aesthetic rating of an image, about 1 to 10, mostly 5 to 6.5. The easiest reward to hack.

    Args:
        name: under which scores are stored.
        weights: of the head.
        file: the head's file in the folder or repository of ``weights``.
        clip: folder, or hub id with or without @revision, of the CLIP model.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
        range: lowest and highest score.
    """

    name: str
    weights: Weights
    file: str
    clip: str
    quantize: bool | None = None
    differentiable: bool = True
    range: tuple[float, float] = (-math.inf, math.inf)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        model, head = load_once(_load, self.weights, self.file, self.clip)
        quantize = should_quantize(self.quantize, images)
        with on_device(model, self.weights, images.device), on_device(head, self.weights, images.device):
            return at_least_float32(head(image_embeddings(model, images, quantize, centre_round)))


PREDICTOR = RewardCard(
    "looks", 0.1, "improved-aesthetic-predictor", "trl-lib/ddpo-aesthetic-predictor", "Apache-2.0", 429
)


@register("aesthetic", PREDICTOR, path=PREDICTOR.weights, file="aesthetic-model.pth")
def aesthetic(
    name: str,
    path: str,
    file: str,
    clip: str = "openai/clip-vit-large-patch14",
    revision: str | None = None,
    precision: str = "no",
    offload: bool = False,
    quantize: bool | None = None,
) -> AestheticReward:
    """Build the published predictor, or one of the same layout at ``path`` with another ``clip``."""
    return AestheticReward(name, Weights(path, revision, precision, offload), file, clip, quantize)
