"""Stable Diffusion XL: a UNet conditioned on two CLIP encoders, pooled text and image sizes (arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.registry import register_family
from diffalign.models.sd import SDModel
from diffalign.structures import Conditioning


@register_family("StableDiffusionXLPipeline")
class SDXLModel(SDModel):
    """Drive a ``StableDiffusionXLPipeline``; schedule, resolution and errors as for ``SDModel``.

    Its conditioning has ``time_ids``, (B, 6) float32: height and width of the original image, top and left of the
    crop, height and width of the result, in pixels. ``encode`` uses the pipeline's defaults: an uncropped image of the
    model's resolution.
    """

    sizes_name = "time_ids"
    load_options: Mapping[str, Any] = {}

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: embeddings (B, L, D) of both encoders, pooled (B, P) of the second."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), device=self.pipeline.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return self._conditioning(embeds, pooled)

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """Encode the empty prompt; zeros if the pipeline sets ``force_zeros_for_empty_prompt``, as SDXL trained."""
        _, embeds, _, pooled = self.pipeline.encode_prompt("", device=self.pipeline.text_encoder_2.device)
        return self._conditioning(embeds, pooled)

    def _conditioning(self, embeds: Tensor, pooled: Tensor) -> Conditioning:
        size = torch.tensor([self.default_resolution], dtype=torch.float32).expand(len(embeds), 2)
        bare = Conditioning({"embeds": embeds, "pooled": pooled}).to(self.device)
        return self.with_sizes(bare, size, torch.zeros_like(size), size)

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor]:
        tensors = conditioning.tensors
        return {"text_embeds": tensors["pooled"].to(self.dtype), "time_ids": tensors["time_ids"]}
