"""Lumina-Image 2.0: a single-stream flow model on FLUX.1's VAE, with Gemma 2 as text encoder (arXiv 2503.21758)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline, Lumina2Pipeline, SchedulerMixin
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift
from torch import Tensor

from diffalign.models.flow import SHIFT, FlowModel
from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning, Resolution


@register_family("Lumina2Pipeline")
class Lumina2Model(FlowModel):
    """Drive a ``Lumina2Pipeline``.

    Guidance is that of the pipeline's defaults: at all steps (``cfg_trunc_ratio=1``), and rescaled to the norm of the
    positive output along each row of latents (``cfg_normalization=True``).

    Args:
        pipeline: The pipeline to drive.
        max_sequence_length: Tokens per prompt, the pipeline's system prompt included; default 256, as in the pipeline.
        resolution: Side of the square images, or height and width, in pixels, a multiple of 16.
    """

    negative_names: Mapping[str, str] = {"embeds": "negative_prompt_embeds", "mask": "negative_prompt_attention_mask"}
    # The pipeline does not accept text together with embeddings, so the prompt is encoded first.
    negative_call = """
embeds, mask, _, _ = pipe.encode_prompt({prompt}, False, max_sequence_length={length})
image = pipe(
    prompt_embeds=embeds,
    prompt_attention_mask=mask,
    **negative,
    guidance_scale={scale:g},
).images[0]"""
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int = 256, resolution: Resolution = None):
        super().__init__(pipeline, max_sequence_length, resolution)

    @property
    def longest_sequence(self) -> int:
        """Positions of the transformer, of which the image takes one; the pipeline takes 512 tokens at most."""
        return min(512, self.raw_denoiser.config.axes_lens[0] - 1)

    def _shift(self, scheduler: SchedulerMixin, resolution: tuple[int, int] | None, num_steps: int) -> dict[str, float]:
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        # The pipeline takes the number of channels for that of tokens; published schedulers have a fixed shift.
        return {"mu": calculate_shift(self.latent_channels, *(scheduler.config.get(*pair) for pair in SHIFT.items()))}

    @staticmethod
    def prompt_tokens(tokenizer: Any, text: str) -> int:
        """Count tokens, including the pipeline's system prompt."""
        return len(tokenizer(f"{_system_prompt()} <Prompt Start> {text}", verbose=False).input_ids)

    def _conditioning(self, embeds: Tensor, mask: Tensor) -> Conditioning:
        return Conditioning({"embeds": embeds, "mask": mask}).to(self.device)

    def _encode(self, texts: Sequence[str], guided: bool) -> Any:
        return self.pipeline.encode_prompt(
            list(texts),
            guided,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
        )

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: embeddings (B, L, D) and mask (B, L), 1 for text tokens."""
        return self._conditioning(*self._encode(texts, False)[:2])

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """Encode the empty prompt without the system prompt."""
        return self._conditioning(*self._encode([""], True)[2:])

    def guide(self, against: Tensor, towards: Tensor, scale: float) -> Tensor:
        """Apply guidance, then rescale each row to the norm of the positive output."""
        guided = super().guide(against, towards, scale)
        return guided * (towards.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer once, through accelerate's wrapper.

        Its time runs from 0 at pure noise to 1, and its output is x0 - noise.
        """
        output = self.denoiser(
            hidden_states=x.to(self.dtype),
            timestep=1 - time / self.num_train_timesteps,
            encoder_hidden_states=conditioning.tensors["embeds"].to(self.dtype),
            encoder_attention_mask=conditioning.tensors["mask"],
            return_dict=False,
        )[0]
        return -output.float()


@cache
def _system_prompt() -> str:
    """Return the pipeline's system prompt, which only its constructor names."""
    return str(Lumina2Pipeline(*[None] * 5).system_prompt)
