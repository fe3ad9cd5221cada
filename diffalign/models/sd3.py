"""Stable Diffusion 3 and 3.5: a flow model with two CLIP encoders and T5 (arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffalign.models.flow import JOINT_ATTENTION, FlowModel
from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning, Resolution


@register_family("StableDiffusion3Pipeline")
class SD3Model(FlowModel):
    """Drive a ``StableDiffusion3Pipeline``.

    Args:
        pipeline: The pipeline to drive.
        max_sequence_length: T5 tokens per prompt; use the same value for training and later sampling. Default 256, as
            in the pipeline.
        resolution: Height and width of the images, in pixels; one number means a square. Default: the pipeline's own.
    """

    uniform_grid = False
    # Positive and negative prompts share a batch and must have equal lengths.
    negative_call = (
        "image = pipe({prompt}, **negative, guidance_scale={scale:g}, max_sequence_length={length}).images[0]"
    )
    lora_targets = JOINT_ATTENTION
    optional_parts = ("text_encoder_3", "tokenizer_3")  # T5, most of the memory of the text encoders

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int = 256, resolution: Resolution = None):
        super().__init__(pipeline, max_sequence_length, resolution)

    @property
    def patch_size(self) -> int:
        """Side of a token's square of latents."""
        return self.raw_denoiser.config.patch_size

    @property
    def token_limit(self) -> int:
        """``max_sequence_length`` of T5, or CLIP's positions if the pipeline has no T5."""
        clip = self.pipeline.tokenizer
        return clip.model_max_length if self.pipeline.text_encoder_3 is None else self.max_sequence_length

    def count_tokens(self, text: str) -> int:
        """Count T5 tokens, or CLIP tokens if the pipeline has no T5."""
        pipeline = self.pipeline
        reader = pipeline.tokenizer if pipeline.text_encoder_3 is None else pipeline.tokenizer_3
        return self.prompt_tokens(reader, text)

    def check_resolution(self, resolution: tuple[int, int]) -> None:
        """Raise ValueError for a (height, width) in pixels of partial tokens or beyond the position embedding."""
        super().check_resolution(resolution)
        most = self.raw_denoiser.config.pos_embed_max_size * self.resolution_unit
        if max(resolution) > most:
            height, width = resolution
            raise ValueError(f"resolution {height} x {width}: this model knows positions up to {most} pixels a side")

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: embeddings (B, L, D) and pooled embeddings (B, P)."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts),
            None,
            None,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning({"embeds": embeds, "pooled": pooled}).to(self.device)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer once, through accelerate's wrapper."""
        dtype, tensors = self.dtype, conditioning.tensors
        output = self.denoiser(
            hidden_states=x.to(dtype),
            timestep=time,
            encoder_hidden_states=tensors["embeds"].to(dtype),
            pooled_projections=tensors["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return output.float()
