"""SANA: a linear-attention flow model on a deep-compression autoencoder, with Gemma as encoder (arXiv 2410.10629)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffalign.diffusion.schedule import flow_levels, shift_sigmas
from diffalign.models.base import check_schedule
from diffalign.models.flow import FlowModel
from diffalign.models.offload import TEXT_ENCODERS, VAE, needs
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning, Level, Resolution


@register_family("SanaPipeline")
class SanaModel(FlowModel):
    """Drive a ``SanaPipeline``.

    Published pipelines sample with DPM-Solver++; ``levels`` returns its levels, so that "dpmpp_2m" reproduces
    their images. With a ``FlowMatchEulerDiscreteScheduler``, "ode" does. The autoencoder is deterministic.

    Args:
        pipeline: The pipeline to drive.
        max_sequence_length: Tokens per prompt, 300 by default as in the pipeline; prompts follow its instruction to
            enhance them, whose first token is kept.
        resolution: As for ``FlowModel``, multiples of 32 pixels. The pipeline gives the same images with
            ``use_resolution_binning=False``, and at sizes that are among its bins.
    """

    uniform_grid = False
    negative_names: Mapping[str, str] = {"embeds": "negative_prompt_embeds", "mask": "negative_prompt_attention_mask"}
    # The pipeline does not accept text together with embeddings, so the prompt is encoded first.
    negative_call = """
import inspect

instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
embeds, mask, _, _ = pipe.encode_prompt(
    {prompt}, False, max_sequence_length={length}, complex_human_instruction=instruction
)
image = pipe(
    prompt_embeds=embeds,
    prompt_attention_mask=mask,
    negative_prompt=None,
    **negative,
    guidance_scale={scale:g},
).images[0]"""
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int = 300, resolution: Resolution = None):
        super().__init__(pipeline, max_sequence_length, resolution)
        call = inspect.signature(type(pipeline).__call__)
        self.instruction = call.parameters["complex_human_instruction"].default

    @property
    def size_arguments(self) -> Mapping[str, str]:
        """Keep the pipeline from rounding sizes to its resolution bins."""
        return {"use_resolution_binning": "False"}

    @property
    def longest_sequence(self) -> int:
        """Positions of the text encoder; the pipeline sets no maximum."""
        return self.pipeline.text_encoder.config.max_position_embeddings

    @property
    def resolution_unit(self) -> int:
        """The pipeline checks multiples of 32, whatever the autoencoder."""
        return math.lcm(32, self.pipeline.vae_scale_factor * self.raw_denoiser.config.patch_size)

    def levels(self, num_steps: int, schedule: str = "pipeline", resolution: tuple[int, int] | None = None) -> Level:
        """Return the scheduler's levels; DPM-Solver passes the denoiser integer timesteps, rounded down."""
        scheduler = self.pipeline.scheduler
        if not scheduler.config.get("use_flow_sigmas"):
            return super().levels(num_steps, schedule, resolution)
        check_schedule(schedule)
        if schedule == "uniform":
            sigmas = shift_sigmas(torch.linspace(1, 1 / num_steps, num_steps).double(), scheduler.config.flow_shift)
            return flow_levels([*sigmas.tolist(), 0.0], self.num_train_timesteps)
        scheduler = type(scheduler).from_config(scheduler.config)
        scheduler.set_timesteps(num_steps)
        level = flow_levels(scheduler.sigmas, self.num_train_timesteps)
        return Level(level.alpha, level.sigma, torch.cat([scheduler.timesteps.double(), level.time[-1:]]))

    def count_tokens(self, text: str) -> int:
        """Count tokens after the instruction, plus the two that the pipeline counts for its ends."""
        instruction, read = "\n".join(self.instruction), self.pipeline.tokenizer.encode
        return len(read(instruction + text.lower().strip())) - len(read(instruction)) + 2

    @staticmethod
    def prompt_tokens(tokenizer: Any, text: str) -> int:
        """Count tokens in lower case, plus the one of the instruction that shares the window."""
        return len(tokenizer(text.lower().strip(), verbose=False).input_ids) + 1

    def _encode(self, texts: Sequence[str], instruction: Sequence[str] | None) -> Conditioning:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(texts),
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return Conditioning({"embeds": embeds, "mask": mask}).to(self.device)

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: embeddings (B, L, D) and mask (B, L), 1 for text tokens."""
        return self._encode(texts, self.instruction)

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """Encode the empty prompt without the instruction."""
        return self._encode([""], None)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer once, through accelerate's wrapper."""
        tensors = conditioning.tensors
        output = self.denoiser(
            x.to(self.dtype),
            encoder_hidden_states=tensors["embeds"].to(self.dtype),
            encoder_attention_mask=tensors["mask"],
            timestep=time * self.raw_denoiser.config.timestep_scale,
            return_dict=False,
        )[0]
        return output.float()

    @needs(VAE)
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images to latents; the autoencoder is deterministic, so ``noise`` is ignored."""
        vae = self.pipeline.vae
        return vae.encode((images * 2 - 1).to(vae.dtype)).latent * vae.config.scaling_factor
