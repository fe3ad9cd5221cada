"""FLUX.1: a flow model with joint and single-stream blocks, one CLIP encoder and T5 (Black Forest Labs, 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffalign.models.flow import JOINT_ATTENTION, PackedFlowModel, image_ids, pack, unpack
from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning, Resolution


@register_family("FluxPipeline")
class FluxModel(PackedFlowModel):
    """Drive a ``FluxPipeline``: FLUX.1-dev, FLUX.1-schnell and models of their shape.

    The trainers' ``guidance_scale`` is the pipeline's ``true_cfg_scale``, which these models do not need (1.0).

    Args:
        pipeline: The pipeline to drive.
        max_sequence_length: T5 tokens per prompt. The pipeline's default is 512; FLUX.1-schnell was trained with 256.
        resolution: As for ``FlowModel``, multiples of 16 pixels.
        embedded_guidance: The pipeline's ``guidance_scale``, an input of FLUX.1-dev, which is distilled from guided
            samples; default 3.5, as the pipeline's. It adds no cost, and is the same in training and sampling.

    Raises:
        ValueError: ``embedded_guidance`` is given for a model without a guidance embedding, such as FLUX.1-schnell.
    """

    guidance_argument = "true_cfg_scale"
    negative_text = ""
    negative_call = "image = pipe({prompt}, **negative, true_cfg_scale={scale:g}).images[0]"
    lora_targets = JOINT_ATTENTION

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        max_sequence_length: int = 512,
        resolution: Resolution = None,
        embedded_guidance: float | None = None,
    ) -> None:
        super().__init__(pipeline, max_sequence_length, resolution)
        has_guidance_embedding = self.raw_denoiser.config.guidance_embeds
        if embedded_guidance is not None and not has_guidance_embedding:
            raise ValueError(
                f"embedded_guidance {embedded_guidance}: this model has no guidance embedding (FLUX.1-dev has); "
                "leave it out"
            )
        default = 3.5 if embedded_guidance is None else embedded_guidance
        self.embedded_guidance = default if has_guidance_embedding else None

    def count_tokens(self, text: str) -> int:
        """Count T5 tokens."""
        return self.prompt_tokens(self.pipeline.tokenizer_2, text)

    def guidance_arguments(self, scale: float | None) -> dict[str, str]:
        """Return the arguments of guidance and of the embedded guidance, as Python source."""
        embedded = {} if self.embedded_guidance is None else {"guidance_scale": f"{self.embedded_guidance:g}"}
        return {**embedded, **super().guidance_arguments(scale)}

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: T5 embeddings (B, L, D), pooled CLIP embeddings (B, P) and text ids (L, 3)."""
        embeds, pooled, text_ids = self.pipeline.encode_prompt(
            list(texts), device=self.pipeline.text_encoder.device, max_sequence_length=self.max_sequence_length
        )
        return Conditioning({"embeds": embeds, "pooled": pooled}, {"text_ids": text_ids}).to(self.device)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer once, through accelerate's wrapper."""
        dtype, tensors = self.dtype, conditioning.tensors
        height, width = x.shape[-2:]
        guidance = self.embedded_guidance
        tokens, ids = self._image_tokens(x.to(dtype), conditioning)
        output = self.denoiser(
            hidden_states=tokens,
            # Round before dividing, as the pipeline does: the order matters in bfloat16.
            timestep=time.to(dtype) / self.num_train_timesteps,
            guidance=None if guidance is None else torch.full_like(time, guidance),
            pooled_projections=tensors["pooled"].to(dtype),
            encoder_hidden_states=tensors["embeds"].to(dtype),
            txt_ids=conditioning.shared["text_ids"].to(dtype),
            img_ids=ids,
            return_dict=False,
        )[0]
        return unpack(output[:, : height * width // 4].float(), height, width)

    def _image_tokens(self, x: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Return the image tokens, (B, N, 4 C), those of ``x`` first, and their position ids, (N, 3)."""
        return pack(x), image_ids(x.shape[-2] // 2, x.shape[-1] // 2, x.device, x.dtype)
