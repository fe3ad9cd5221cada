"""SANA: a flow model of linear attention on a deep-compression autoencoder, prompted by Gemma (arXiv 2410.10629)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffalign.diffusion.schedule import flow_levels, shift_sigmas
from diffalign.models.base import check_schedule
from diffalign.models.flow import FlowModel
from diffalign.models.offload import TEXT_ENCODERS, VAE, needs
from diffalign.structures import Conditioning, Level


class SanaModel(FlowModel):
    """Drives a ``SanaPipeline``.

    max_sequence_length: tokens per prompt, 300 by default as the pipeline's; prompts stand behind its instruction to
    enhance them, of which the first token is kept. resolution: side of the square images, in pixels, a multiple of 32;
    the pipeline gives the same with ``use_resolution_binning=False``, and at sides that are bins of its own.

    Published pipelines sample with DPM-Solver++; their levels are those, so that "dpmpp_2m" draws what they draw. With
    a ``FlowMatchEulerDiscreteScheduler`` "ode" does. Images have one encoding, without noise.
    """

    uniform_grid = False
    negative_names: Mapping[str, str] = {"embeds": "negative_prompt_embeds", "mask": "negative_prompt_attention_mask"}
    # This pipeline takes no text beside embeddings, so that its prompt is encoded first.
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

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int = 300, resolution: int | None = None):
        super().__init__(pipeline, max_sequence_length, resolution)
        call = inspect.signature(type(pipeline).__call__)
        self.instruction = call.parameters["complex_human_instruction"].default

    @property
    def longest_sequence(self) -> int:
        """Tokens per prompt that the text encoder has positions for; the pipeline does not say."""
        return self.pipeline.text_encoder.config.max_position_embeddings

    @property
    def resolution_unit(self) -> int:
        """As the pipeline checks it, whatever its autoencoder."""
        return math.lcm(32, self.pipeline.vae_scale_factor * self.raw_denoiser.config.patch_size)

    def levels(self, num_steps: int, schedule: str = "pipeline", resolution: tuple[int, int] | None = None) -> Level:
        """The scheduler's own sigmas; DPM-Solver tells the denoiser whole timesteps, rounded down."""
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
        """Count tokens behind the instruction, with the two that the pipeline counts for its ends."""
        instruction, read = "\n".join(self.instruction), self.pipeline.tokenizer.encode
        return len(read(instruction + text.lower().strip())) - len(read(instruction)) + 2

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
        """The pipeline's own encoding: embeddings (B, L, D), and mask (B, L), 1 where there is text."""
        return self._encode(texts, self.instruction)

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """The empty prompt, without the instruction."""
        return self._encode([""], None)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """One call of the transformer, through the wrapper that accelerate prepared."""
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
        """Latents of images; this autoencoder has no distribution, so that ``noise`` finds a deviation of 0."""
        vae = self.pipeline.vae
        return vae.encode((images * 2 - 1).to(vae.dtype)).latent * vae.config.scaling_factor
