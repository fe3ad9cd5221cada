"""Stable Diffusion XL: a UNet conditioned on two CLIP encoders, pooled text and image sizes (arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.registry import register_family
from diffalign.models.sd import SDModel
from diffalign.models.text_training import ZERO, hidden, trains_text, without_zeros
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
    # The first encoder's last layer is not read: the UNet takes the output of the one before.
    text_encoders: Mapping[str, int] = {"text_encoder": 1, "text_encoder_2": 0}

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: embeddings (B, L, D) of both encoders, pooled (B, P) of the second.

        Where the text encoders train: token ids (B, L) of both.
        """
        if trains_text(self.raw_denoiser):
            return self._tokens(texts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), device=self.pipeline.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return self._conditioning(embeds, pooled)

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """Encode the empty prompt; zeros if the pipeline sets ``force_zeros_for_empty_prompt``, as SDXL trained."""
        if trains_text(self.raw_denoiser):
            row = self._tokens([""])
            if not self.pipeline.config.force_zeros_for_empty_prompt:
                return row
            zeros = {name: torch.full_like(row.tensors[name], ZERO) for name in ("ids", "ids_2")}
            return Conditioning({**row.tensors, **zeros})
        _, embeds, _, pooled = self.pipeline.encode_prompt("", device=self.pipeline.text_encoder_2.device)
        return self._conditioning(embeds, pooled)

    def _tokens(self, texts: Sequence[str]) -> Conditioning:
        first, second = (self._ids(t, texts) for t in (self.pipeline.tokenizer, self.pipeline.tokenizer_2))
        return self._sized({"ids": first, "ids_2": second})

    def _embedded(self, conditioning: Conditioning) -> Conditioning:
        """Replace token ids by embeddings, with gradients to the text encoders that train."""
        if "ids" not in conditioning.tensors:
            return conditioning
        first, second = conditioning.tensors["ids"], conditioning.tensors["ids_2"]
        _, ours = hidden(self.pipeline.text_encoder, first)
        pooled, theirs = hidden(self.pipeline.text_encoder_2, second)
        embeds = without_zeros(first, torch.cat([ours[-2], theirs[-2]], dim=-1))
        found = {"embeds": embeds, "pooled": without_zeros(second, pooled)}
        return Conditioning({**conditioning.tensors, **found}, conditioning.shared)

    def _conditioning(self, embeds: Tensor, pooled: Tensor) -> Conditioning:
        return self._sized({"embeds": embeds, "pooled": pooled})

    def _sized(self, tensors: Mapping[str, Tensor]) -> Conditioning:
        size = torch.tensor([self.default_resolution], dtype=torch.float32).expand(len(next(iter(tensors.values()))), 2)
        bare = Conditioning(tensors).to(self.device)
        return self.with_sizes(bare, size, torch.zeros_like(size), size)

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor]:
        tensors = conditioning.tensors
        return {"text_embeds": tensors["pooled"].to(self.dtype), "time_ids": tensors["time_ids"]}
