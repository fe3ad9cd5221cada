"""PixArt-Sigma: a diffusion transformer that predicts epsilon and its variance, with T5 (arXiv 2403.04692)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.registry import register_family
from diffalign.models.sd import SDModel
from diffalign.structures import Conditioning, Resolution

LONGEST = 512  # tokens that T5 was trained on; the pipeline sets no maximum


@register_family("PixArtSigmaPipeline")
class PixArtSigmaModel(SDModel):
    """Drive a ``PixArtSigmaPipeline``; schedule and errors as for ``SDModel``.

    diffusers loads no LoRA into this pipeline, so its weights train in full (``lora.rank: 0``). The half of its output
    that is the learned variance is dropped, as in the pipeline. Prompts are cleaned as by the pipeline's call, which
    depends on whether the packages bs4 and ftfy are installed.

    Args:
        pipeline: The pipeline to drive.
        max_sequence_length: T5 tokens per prompt; default 300, as in the pipeline.
        resolution: Side of the square images, or height and width, in pixels, a multiple of 16. The pipeline gives the
            same images with ``use_resolution_binning=False``, and at sides that are among its bins.
    """

    denoiser_name = "transformer"
    load_options: Mapping[str, Any] = {}
    negative_names: Mapping[str, str] = {"embeds": "negative_prompt_embeds", "mask": "negative_prompt_attention_mask"}
    # The pipeline does not accept text together with embeddings, so the prompt is encoded first.
    negative_call = """
embeds, mask, _, _ = pipe.encode_prompt({prompt}, False, clean_caption=True, max_sequence_length={length})
image = pipe(
    prompt_embeds=embeds,
    prompt_attention_mask=mask,
    negative_prompt=None,
    **negative,
    guidance_scale={scale:g},
).images[0]"""

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int = 300, resolution: Resolution = None):
        super().__init__(pipeline, resolution)
        if not 1 <= max_sequence_length <= LONGEST:
            raise ValueError(
                f"max_sequence_length {max_sequence_length}: a {type(pipeline).__name__} takes 1 to {LONGEST} tokens"
            )
        self.max_sequence_length = max_sequence_length

    @property
    def size_arguments(self) -> Mapping[str, str]:
        """Keep the pipeline from rounding sizes to its resolution bins."""
        return {"use_resolution_binning": "False"}

    @property
    def longest_sequence(self) -> int:
        """Maximum ``max_sequence_length``."""
        return LONGEST

    @property
    def resolution_unit(self) -> int:
        """The pipeline checks multiples of 8, and the transformer takes whole tokens."""
        return math.lcm(8, self.pipeline.vae_scale_factor * self.raw_denoiser.config.patch_size)

    @property
    def token_limit(self) -> int:
        """``max_sequence_length``."""
        return self.max_sequence_length

    @staticmethod
    def prompt_tokens(tokenizer: Any, text: str) -> int:
        """Count T5 tokens of the prompt in lower case."""
        return len(tokenizer(text.lower().strip(), verbose=False).input_ids)

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: embeddings (B, L, D) and mask (B, L), 1 for text tokens."""
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(texts),
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            clean_caption=True,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning({"embeds": embeds, "mask": mask}).to(self.device)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer once, through accelerate's wrapper, and drop the learned variance."""
        output = self.denoiser(
            x.to(self.dtype),
            encoder_hidden_states=conditioning.tensors["embeds"].to(self.dtype),
            encoder_attention_mask=conditioning.tensors["mask"],
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]].float()
