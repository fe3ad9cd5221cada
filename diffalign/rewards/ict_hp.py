"""ICT and HP (arXiv 2507.19002): text containment, image quality, and their product.

Both are fine-tuned CLIP ViT-H-14; HP adds a head on the image embedding.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from diffalign.rewards.aesthetic import Head
from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.clip import VIT_H, image_embeddings, image_features, text_embeddings
from diffalign.rewards.support.preprocess import at_least_float32, on_images, should_quantize
from diffalign.rewards.support.weights import Weights, frozen, load_once, on_device, pinned, split, state_dict

ICT_FILE, HP_FILE, HEAD_FILE = "pytorch_model.bin", "hp_backbone/pytorch_model.bin", "hp_scorer/mlp_pytorch_model.bin"


def _load_clip(weights: Weights, file: str, clip: str) -> CLIPModel:
    model = CLIPModel(CLIPConfig.from_pretrained(**pinned(clip)))
    tensors = state_dict(weights, file)
    model.load_state_dict({name: tensors[name] for name in tensors if not name.endswith("position_ids")})
    return frozen(model, weights)


def _load_ict(weights: Weights, clip: str) -> tuple[CLIPModel, Any]:
    return _load_clip(weights, ICT_FILE, clip), AutoTokenizer.from_pretrained(**pinned(clip), trust_remote_code=False)


def _load_hp(weights: Weights, clip: str) -> tuple[CLIPModel, Head]:
    model = _load_clip(weights, HP_FILE, clip)
    head = Head(model.config.projection_dim)
    head.load_state_dict(state_dict(weights, HEAD_FILE))
    return model, frozen(head, weights)


@dataclass(frozen=True)
class IctHpReward:
    """Score images by ICT, by HP, or by their product if both weights are given.

    Args:
        name: under which scores are stored.
        ict: weights of ICT, the cosine of image and prompt, [-1, 1].
        hp: weights of HP, the sigmoid of the head, [0, 1]; ignores prompts.
        clip: folder, or hub id with or without @revision, of the base model, for configuration and tokenizer.
        quantize: round pixels to 8 bits; None: unless a gradient is required.
        differentiable: True.
    """

    name: str
    ict: Weights | None
    hp: Weights | None
    clip: str = VIT_H
    quantize: bool | None = None
    differentiable: bool = True

    def __post_init__(self) -> None:
        """Check that at least one of the two has weights."""
        if self.ict is None and self.hp is None:
            raise ValueError(f"reward {self.name!r}: give the weights of ict, of hp, or of both")

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value of the product."""
        return (0.0, 1.0) if self.ict is None else (-1.0, 1.0)

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        quantize = should_quantize(self.quantize, images)
        scores = []
        if self.ict is not None:
            scores.append(self._ict_score(self.ict, images, prompts, quantize))
        if self.hp is not None:
            scores.append(self._hp_score(self.hp, images, quantize))
        return functools.reduce(operator.mul, scores)

    def _ict_score(self, weights: Weights, images: Tensor, prompts: Sequence[str], quantize: bool) -> Tensor:
        model, tokenizer = load_once(_load_ict, weights, self.clip)
        with on_device(model, weights, images.device):
            text = text_embeddings(model, tokenizer, prompts)
            return at_least_float32((image_embeddings(model, images, quantize) * text).sum(-1))

    def _hp_score(self, weights: Weights, images: Tensor, quantize: bool) -> Tensor:
        model, head = load_once(_load_hp, weights, self.clip)
        with on_device(model, weights, images.device), on_device(head, weights, images.device):
            return at_least_float32(head(image_features(model, images, quantize)).sigmoid())


PAPER = "arXiv 2507.19002"
ICT = RewardCard("whether the image contains the text", 0.01, PAPER, "8y/ICT", "MIT", 986)
HP = RewardCard("looks", 0.05, PAPER, "8y/HP", "MIT", 987)
BOTH = RewardCard("whether the image contains the text, and looks", 0.01, PAPER, "8y/ICT, 8y/HP", "MIT", 1973)


@register("ict", ICT, hp=None)
@register("hp", HP, ict=None)
@register("ict_hp", BOTH)
def ict_hp(
    name: str,
    ict: str | None = ICT.weights,
    hp: str | None = HP.weights,
    clip: str = VIT_H,
    precision: str = "no",
    offload: bool = False,
    quantize: bool | None = None,
) -> IctHpReward:
    """Build the published models, or those of folders ``ict`` and ``hp``; hub ids may end in @revision."""
    of_ict, of_hp = (Weights(*split(spec), precision, offload) if spec else None for spec in (ict, hp))
    return IctHpReward(name, of_ict, of_hp, clip, quantize)
