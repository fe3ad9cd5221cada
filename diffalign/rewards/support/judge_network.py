"""The network of a judge of one's own: a CLIP or SigLIP model, and a head per prototype of its raters.

The score of an image x for a prompt c is PickScore's (arXiv 2305.01569), exp(logit_scale) cos(G t(c), V v(x)), with
the pooled outputs t and v of the two towers and linear heads G and V. Several raters differ in G, as in model B of PAL
(arXiv 2406.08469): rater i has the ideal point G_i t(c), G_i = sum_k w_ik G_k, a convex combination of K prototypes,
and the score falls with the distance of the image from it (on the unit sphere, the cosine says the same). The mean
rater has the mean of the weights. A combination of linear heads is one, so that the judge of any rater is a plain model
of its family, which transformers loads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
SPREAD = 0.02  # of the prototypes at the start, relative to the head that they start from


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
    """Score images for prompts, for all raters or for one.

    Attributes:
        backbone: The CLIP or SigLIP model.
        prototypes: Text heads that raters combine; empty for one head, that of the backbone.
        rater_logits: (raters, prototypes), whose softmax are the weights of raters.
        tie: 0-dim, the parameter of a model of ties.
    """

    def __init__(self, backbone: PreTrainedModel, raters: int = 0, prototypes: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.backbone, self.layout = backbone, layout_of(backbone.config, "the backbone")
        self.tie = nn.Parameter(torch.zeros(()))
        self.prototypes = nn.ModuleList()
        if prototypes > 1:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(prototypes):
                head = copy.deepcopy(self.text_head)
                noise = torch.randn(head.weight.shape, generator=generator).to(head.weight)
                with torch.no_grad():
                    head.weight += SPREAD * head.weight.std() * noise
                self.prototypes.append(head)
            # Equal weights would be a saddle point: no gradient tells prototypes apart that all raters use alike.
            self.rater_logits = nn.Parameter(F.one_hot(torch.arange(raters) % prototypes, prototypes).float())

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

    # Raters ---------------------------------------------------------------------------------------------------------

    def weights(self, rater: Tensor) -> Tensor:
        """Return the weights (N, K) of raters (N,); -1 is the mean rater."""
        every = self.rater_logits.softmax(-1)
        every = torch.cat([every, every.mean(0, keepdim=True)])
        return every[rater]

    def head_for(self, rater: int = -1) -> dict[str, Tensor]:
        """Return weight and bias of the text head of a rater; -1 is the mean rater."""
        if not self.prototypes:
            return dict(self.text_head.named_parameters())
        weights = self.weights(torch.tensor([rater], device=self.rater_logits.device))[0]
        heads = [dict(head.named_parameters()) for head in self.prototypes]
        return {
            name: torch.einsum("k,k...->...", weights, torch.stack([head[name] for head in heads])) for name in heads[0]
        }

    def embed_texts(self, pooled: Tensor, rater: Tensor | None = None) -> Tensor:
        """Map pooled texts (N, W) to ideal points (N, D) of unit length. rater: (N,); None for the mean rater."""
        if not self.prototypes:
            return F.normalize(at_least_float32(self.text_head(pooled)), dim=-1)
        rater = torch.full((len(pooled),), -1, device=pooled.device) if rater is None else rater
        points = torch.stack([head(pooled) for head in self.prototypes], 1)
        return F.normalize((self.weights(rater)[..., None] * at_least_float32(points)).sum(1), dim=-1)

    def embed_images(self, pooled: Tensor) -> Tensor:
        """Map pooled images (N, W) to (N, D), of unit length."""
        return F.normalize(at_least_float32(self.image_head(pooled)), dim=-1)

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
        return self.logit_scale * (image * text[:, None]).sum(-1)


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
