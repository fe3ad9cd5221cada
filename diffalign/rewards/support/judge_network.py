"""The network of a judge of one's own: a CLIP or SigLIP model whose heads, and towers if wanted, learn from labels.

The score of an image x for a prompt c is PickScore's (arXiv 2305.01569), exp(logit_scale) cos(G t(c), V v(x)), with
the pooled outputs t and v of the two towers and linear heads G and V. Networks of several raters are in
``judge_raters.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipModel,
)

from diffalign.rewards.support.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, at_least_float32, short_side, stretch

MAX_LOGIT_SCALE = math.log(100)  # of CLIP


@dataclass(frozen=True)
class Layout:
    """What differs between families of models.

    Attributes:
        model: Class of transformers.
        processor: Its image processor.
        image_head: Linear map of the image tower's pooled output; empty if there is none.
        text_head: Linear map of the text tower's pooled output.
        square: Whether images are stretched to a square instead of cropped.
        padded: Whether texts are padded to the longest that the model reads, and read without a mask.
        mean: Of the channels of images.
        std: Of the channels of images.
    """

    model: type[PreTrainedModel]
    processor: type[Any]
    image_head: str
    text_head: str
    square: bool = False
    padded: bool = False
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


HALF = (0.5, 0.5, 0.5)
LAYOUTS: Mapping[str, Layout] = {
    "clip": Layout(CLIPModel, CLIPImageProcessor, "visual_projection", "text_projection"),
    "siglip": Layout(SiglipModel, SiglipImageProcessor, "", "text_model.head", True, True, HALF, HALF),
}


def layout_of(config: Any, path: str) -> Layout:
    """Return the layout of a model's configuration. ValueError: another kind of model."""
    kind = str(getattr(config, "model_type", ""))
    if kind not in LAYOUTS:
        raise ValueError(f"{path} is a model of type {kind!r}: give one of {', '.join(LAYOUTS)}, such as PickScore")
    return LAYOUTS[kind]


class JudgeNetwork(nn.Module):
    """Score images for prompts, as one judge of all raters.

    Attributes:
        backbone: The CLIP or SigLIP model.
        raters: Number of raters that it tells apart; 0 for none.
        tie: 0-dim, the parameter of a model of ties.
        name: Name of the model of raters; empty for one judge of all.
        format: Format of the files of such a judge.
        bounds: Lowest and highest score.
    """

    name: ClassVar[str] = ""
    format: ClassVar[int] = 1
    bounds: ClassVar[tuple[float, float]] = (-100.0, 100.0)

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone, self.layout = backbone, layout_of(backbone.config, "the backbone")
        self.tie = nn.Parameter(torch.zeros(()))
        self.raters = 0

    @classmethod
    def single(cls, backbone: PreTrainedModel) -> JudgeNetwork:
        """Build the untrained judge of one rater."""
        return cls(backbone)

    @property
    def text_head(self) -> nn.Linear:
        """The linear map of pooled text."""
        head = self.backbone.get_submodule(self.layout.text_head)
        assert isinstance(head, nn.Linear)
        return head

    @property
    def image_head(self) -> nn.Module:
        """The linear map of pooled images."""
        return self.backbone.get_submodule(self.layout.image_head) if self.layout.image_head else nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return self.text_head.weight.dtype

    @property
    def logit_scale(self) -> Tensor:
        """The factor of the cosine."""
        scale: Any = self.backbone.logit_scale
        return at_least_float32(scale).clamp(max=MAX_LOGIT_SCALE).exp().squeeze()

    # Towers ---------------------------------------------------------------------------------------------------------

    def pool_images(self, pixels: Tensor) -> Tensor:
        """Encode preprocessed images (N, 3, S, S): (N, W), before the head."""
        vision: Any = self.backbone.vision_model
        found: Tensor = vision(pixel_values=pixels).pooler_output
        return found

    def pool_texts(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode token ids (N, L): (N, W), before the head."""
        text: Any = self.backbone.text_model
        if self.layout.padded:  # its pooled output is that of the last token, after the head
            return torch.as_tensor(text(input_ids=ids).last_hidden_state[:, -1])
        return torch.as_tensor(text(input_ids=ids, attention_mask=mask).pooler_output)

    # Scores ---------------------------------------------------------------------------------------------------------

    def embed_texts(self, pooled: Tensor, rater: Tensor | None = None) -> Tensor:
        """Map pooled texts (N, W) to (N, D), of unit length. rater: (N,), of the texts; None for the mean rater."""
        return F.normalize(at_least_float32(self.text_head(pooled)), dim=-1)

    def embed_images(self, pooled: Tensor) -> Tensor:
        """Map pooled images (N, W) to (N, D), of unit length."""
        return F.normalize(at_least_float32(self.image_head(pooled)), dim=-1)

    def similarity(self, image: Tensor, text: Tensor, rater: Tensor | None = None) -> Tensor:
        """Compare embeddings (B, N, D) of images with those of prompts (B, D) as a rater does: (B, N)."""
        return (image * text[:, None]).sum(-1)

    def forward(
        self,
        images: Tensor,
        texts: Tensor,
        mask: Tensor | None = None,
        rater: Tensor | None = None,
        pooled: bool = False,
    ) -> Tensor:
        """Score the images of B pairs: (B, 2), float32.

        Args:
            images: (B, 2, 3, S, S), preprocessed, or their pooled outputs (B, 2, W).
            texts: Token ids (B, L), or their pooled outputs (B, W).
            mask: (B, L), of token ids.
            rater: (B,), index of the rater of each pair; None for the mean rater.
            pooled: Whether images and texts are pooled outputs.
        """
        flat = images.flatten(0, 1)
        image = self.embed_images(flat if pooled else self.pool_images(flat)).unflatten(0, images.shape[:2])
        text = self.embed_texts(texts if pooled else self.pool_texts(texts, mask), rater)
        return self.logit_scale * self.similarity(image, text, rater)

    # Training and files ---------------------------------------------------------------------------------------------

    def train_head(self) -> None:
        """Let the heads train."""
        for module in (self.image_head, self.text_head):
            module.requires_grad_(True)

    def plain_head(self) -> dict[str, Tensor]:
        """Return weight and bias of the text head of a plain model with the scores of the mean rater."""
        return dict(self.text_head.named_parameters())

    def rater_state(self) -> dict[str, Tensor]:
        """Return the tensors of raters, as files hold them; empty for one judge of all."""
        return {}


# Inputs -------------------------------------------------------------------------------------------------------------


def preprocess_of(config: Any) -> Preprocess:
    """Return the published preprocessing of a family, at the image size of a configuration."""
    layout, size = layout_of(config, "the model"), config.vision_config.image_size
    return Preprocess(size, stretch if layout.square else short_side, mean=layout.mean, std=layout.std)


def tokenize(tokenizer: Any, config: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Return token ids (N, L), cut to what the model reads, and their mask; no mask for families that pad."""
    layout, length = layout_of(config, "the model"), config.text_config.max_position_embeddings
    padding = "max_length" if layout.padded else True
    found = tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt")
    return found.input_ids, None if layout.padded else found.attention_mask
