"""Chroma: FLUX.1-schnell without CLIP and with a network for its modulations, guided by negative prompts (2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models.flow import JOINT_ATTENTION, PackedFlowModel, image_ids, pack, unpack
from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning


@register_family("ChromaPipeline")
class ChromaModel(PackedFlowModel):
    """Drive a ``ChromaPipeline``: Chroma1-HD, Chroma1-Base and models of their shape.

    The transformer gets the pipeline's attention weights: 1 for text, one token of padding and the image.

    ``max_sequence_length`` is the number of T5 tokens per prompt; the pipeline's default is 512. ``resolution`` is as
    for ``FlowModel``, a multiple of 16 pixels.
    """

    negative_names: Mapping[str, str] = {
        "embeds": "negative_prompt_embeds",
        "attention": "negative_prompt_attention_mask",
    }
    lora_targets = JOINT_ATTENTION

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: embeddings (B, L, D), attention weights (B, L) and text ids (L, 3)."""
        embeds, text_ids, attention, *_ = self.pipeline.encode_prompt(
            list(texts),
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning({"embeds": embeds, "attention": attention}, {"text_ids": text_ids}).to(self.device)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer once, through accelerate's wrapper."""
        dtype, tensors = self.dtype, conditioning.tensors
        height, width = x.shape[-2:]
        tokens = pack(x.to(dtype))
        attention = torch.cat([tensors["attention"].to(dtype), tokens.new_ones(tokens.shape[:2])], dim=1)
        with self._checkpointed(attention):
            output = self.denoiser(
                hidden_states=tokens,
                # Round before dividing, as the pipeline does: the order matters in bfloat16.
                timestep=time.to(dtype) / 1000,
                encoder_hidden_states=tensors["embeds"].to(dtype),
                txt_ids=conditioning.shared["text_ids"].to(dtype),
                img_ids=image_ids(height // 2, width // 2, x.device, dtype),
                attention_mask=attention,
                return_dict=False,
            )[0]
        return unpack(output.float(), height, width)

    @contextmanager
    def _checkpointed(self, attention: Tensor) -> Iterator[None]:
        """Pass the attention weights to checkpointed single blocks too, whose call in diffusers leaves them out."""
        transformer = self.raw_denoiser
        if not transformer.gradient_checkpointing:
            yield
            return
        plain, single = transformer._gradient_checkpointing_func, set(transformer.single_transformer_blocks)

        def function(block: nn.Module, *args: Any) -> Any:
            return plain(block, *args, attention) if block in single and len(args) == 3 else plain(block, *args)

        transformer._gradient_checkpointing_func = function
        try:
            yield
        finally:
            transformer._gradient_checkpointing_func = plain
