"""Stable Diffusion 3 and 3.5: a flow model with two CLIP encoders and T5 (arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffalign.models.flow import JOINT_ATTENTION, FlowModel
from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.structures import Conditioning


class SD3Model(FlowModel):
    """Drives a ``StableDiffusion3Pipeline``.

    max_sequence_length: T5 tokens per prompt. The pipeline's default is 256; what is trained here should be what is
    sampled later. resolution: side of the square images, in pixels; default: the pipeline's own.
    """

    uniform_grid = False
    # Positive and negative prompts stand in one batch, and must be as long as each other.
    negative_call = (
        "image = pipe({prompt}, **negative, guidance_scale={scale:g}, max_sequence_length={length}).images[0]"
    )
    lora_targets = JOINT_ATTENTION

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int = 256, resolution: int | None = None):
        super().__init__(pipeline, max_sequence_length, resolution)

    @property
    def patch_size(self) -> int:
        """Side of the square of latents that is one token."""
        return self.raw_denoiser.config.patch_size

    @property
    def token_limit(self) -> int:
        """T5's ``max_sequence_length``; without T5, CLIP's positions."""
        clip = self.pipeline.tokenizer
        return clip.model_max_length if self.pipeline.text_encoder_3 is None else self.max_sequence_length

    def count_tokens(self, text: str) -> int:
        """Count T5's tokens; without T5, CLIP's."""
        pipeline = self.pipeline
        reader = pipeline.tokenizer if pipeline.text_encoder_3 is None else pipeline.tokenizer_3
        return len(reader(text).input_ids)

    def check_resolution(self, resolution: tuple[int, int]) -> None:
        """Refuse (height, width) in pixels that are no whole tokens, or more than there are positions for."""
        super().check_resolution(resolution)
        most = self.raw_denoiser.config.pos_embed_max_size * self.resolution_unit
        if max(resolution) > most:
            height, width = resolution
            raise ValueError(f"resolution {height} x {width}: this model knows positions up to {most} pixels a side")

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """The pipeline's own encoding: embeddings (B, L, D) and pooled (B, P)."""
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
        """One call of the transformer, through the wrapper that accelerate prepared."""
        dtype, tensors = self.dtype, conditioning.tensors
        output = self.denoiser(
            hidden_states=x.to(dtype),
            timestep=time,
            encoder_hidden_states=tensors["embeds"].to(dtype),
            pooled_projections=tensors["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return output.float()
