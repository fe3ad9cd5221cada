"""PickScore (arXiv 2305.01569) and CLIPScore (arXiv 2104.08718): cosine similarity of CLIP embeddings.

Both load transformers' ``CLIPModel``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from diffalign.rewards.base import Metadata, RewardCard, register
from diffalign.rewards.support.preprocess import (
    Preprocess,
    at_least_float32,
    centre_floor,
    centre_round,
    on_images,
    should_quantize,
)
from diffalign.rewards.support.prompts import unique_prompts
from diffalign.rewards.support.weights import Weights, check_report, frozen, load_once, on_device, pinned

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FORMS = ("logit", "cosine", "clipscore")
CAPTION = "A photo depicts "  # prefix of every text in the CLIPScore paper


def load_clip(path: str, revision: str | None = None, **options: Any) -> CLIPModel:
    """Load a CLIP model. Raises ValueError if weights are missing or unexpected."""
    model, report = CLIPModel.from_pretrained(path, revision=revision, output_loading_info=True, **options)
    check_report(report, path, "CLIP")
    return model


def _load(weights: Weights, tokenizer: str) -> tuple[CLIPModel, Any]:
    model = load_clip(weights.path, weights.revision)
    return frozen(model, weights), AutoTokenizer.from_pretrained(**pinned(tokenizer), trust_remote_code=False)


@dataclass(frozen=True)
class ClipReward:
    """Cosine similarity of the embeddings of an image and its prompt, in one of three forms.

    Prompts are truncated to 77 tokens, or to the position embeddings of a smaller model.

    Args:
        name: under which scores are stored.
        weights: of the CLIP model.
        form: "logit" multiplies by exp(logit_scale), as PickScore (about 18 to 24); "cosine"; or "clipscore",
            2.5 max(cosine, 0) of "A photo depicts " and the prompt, as the CLIPScore paper.
        tokenizer: folder, or hub id with or without @revision; None for that of the weights.
        quantize: round pixels to 8 bits as PIL does; None: unless a gradient is required.
        differentiable: True.
    """

    name: str
    weights: Weights
    form: str
    tokenizer: str | None = None
    quantize: bool | None = None
    differentiable: bool = True

    def __post_init__(self) -> None:
        """Check the form."""
        if self.form not in FORMS:
            raise ValueError(f"reward {self.name!r}: form must be one of {', '.join(FORMS)}, got {self.form!r}")

    @property
    def range(self) -> tuple[float, float]:
        """Bounds of the form; CLIP clips its logit scale at 100."""
        return {"logit": (-100.0, 100.0), "cosine": (-1.0, 1.0), "clipscore": (0.0, 2.5)}[self.form]

    @on_images()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Score images (B, 3, H, W), float, [0, 1]: (B,), float32 or wider, on their device."""
        model, tokenizer = load_once(_load, self.weights, self.tokenizer or self.weights.spec)
        quantize = should_quantize(self.quantize, images)
        with on_device(model, self.weights, images.device):
            paper = self.form == "clipscore"  # published with torchvision's crop, the others with transformers'
            image = image_embeddings(model, images, quantize, centre_round if paper else centre_floor)
            text = text_embeddings(model, tokenizer, [CAPTION + prompt for prompt in prompts] if paper else prompts)
            cosine = (image * text).sum(-1)
            return at_least_float32(self._form(cosine, model.logit_scale))

    def _form(self, cosine: Tensor, logit_scale: Tensor) -> Tensor:
        if self.form == "logit":
            return logit_scale.exp() * cosine
        return 2.5 * cosine.clamp(min=0) if self.form == "clipscore" else cosine


def image_features(
    model: CLIPModel, images: Tensor, quantize: bool, crop: Callable[[int], int] = centre_floor
) -> Tensor:
    """Preprocess images (B, 3, H, W) as CLIP was published, and embed them: (B, D).

    crop: ``centre_floor`` for models published with transformers' processor, ``centre_round`` for torchvision's.
    """
    step = Preprocess(goal=model.config.vision_config.image_size, crop=crop)
    pixels = step(images, quantize=quantize).to(model.dtype)
    return model.get_image_features(pixel_values=pixels).pooler_output


def image_embeddings(
    model: CLIPModel, images: Tensor, quantize: bool, crop: Callable[[int], int] = centre_floor
) -> Tensor:
    """Normalize ``image_features`` to unit length."""
    return F.normalize(image_features(model, images, quantize, crop), dim=-1)


@torch.no_grad()
def text_embeddings(model: CLIPModel, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Embed prompts as unit vectors (B, D); repeated prompts are encoded once."""
    once, rows = unique_prompts(prompts)
    length = min(77, model.config.text_config.max_position_embeddings)
    tokens = tokenizer(once, padding=True, truncation=True, max_length=length, return_tensors="pt").to(model.device)
    features = model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return F.normalize(features, dim=-1)[rows]


PICKSCORE = RewardCard("human preference", 1.0, "arXiv 2305.01569", "yuvalkirstain/PickScore_v1", "MIT (its code)", 986)
CLIPSCORE = RewardCard("fit of image and text", 0.01, "arXiv 2104.08718", "openai/clip-vit-large-patch14", "MIT", 428)


@register("pickscore", PICKSCORE, path=PICKSCORE.weights, tokenizer=VIT_H, form="logit")
@register("clipscore", CLIPSCORE, path=CLIPSCORE.weights, form="cosine")
def clip_reward(
    name: str,
    path: str,
    form: str,
    tokenizer: str | None = None,
    revision: str | None = None,
    precision: str = "no",
    offload: bool = False,
    quantize: bool | None = None,
) -> ClipReward:
    """Build PickScore, CLIPScore, or a reward of any transformers CLIP folder at ``path``."""
    return ClipReward(name, Weights(path, revision, precision, offload), form, tokenizer, quantize)
