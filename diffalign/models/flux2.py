"""FLUX.2: a flow model on a batch-normalised VAE, with Mistral 3 (dev) or Qwen3 (klein) as text encoder (2025)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.models.flow import JOINT_ATTENTION, PackedFlowModel
from diffalign.models.offload import TEXT_ENCODERS, VAE, needs
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning, Resolution


@register_family("Flux2Pipeline")
class Flux2Model(PackedFlowModel):
    """Drive a ``Flux2Pipeline``: FLUX.2-dev.

    Latents are those that the pipeline takes: 2 x 2 positions of the VAE in each, standardised by its batch norm.
    The pipeline has no classifier-free guidance, so a ``guidance_scale`` above 1 is refused.

    Args:
        pipeline: The pipeline to drive.
        max_sequence_length: Tokens per prompt, chat template included; default 512, as in the pipeline.
        resolution: Side of the square images, or height and width, in pixels, a multiple of 16; default 1024.
        embedded_guidance: The pipeline's ``guidance_scale``, an input of the model; default 4.0, as the pipeline's.
    """

    guidance_argument: str | None = None

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        max_sequence_length: int = 512,
        resolution: Resolution = None,
        embedded_guidance: float = 4.0,
    ) -> None:
        super().__init__(pipeline, max_sequence_length, resolution)
        self.embedded_guidance: float | None = embedded_guidance
        single = range(len(self.raw_denoiser.single_transformer_blocks))
        # By full name, because "attn.to_out" is a list of layers in the joint blocks.
        outputs = (f"single_transformer_blocks.{index}.attn.to_out" for index in single)
        self.lora_targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj", *outputs)

    def guidance_arguments(self, scale: float | None) -> dict[str, str]:
        """Return the argument of the embedded guidance, as Python source."""
        return {**super().guidance_arguments(scale), "guidance_scale": f"{self.embedded_guidance:g}"}

    @property
    def longest_sequence(self) -> int:
        """Positions of the text encoder; the pipeline sets no maximum."""
        config = self.pipeline.text_encoder.config
        return config.get_text_config().max_position_embeddings

    @property
    def patch_size(self) -> int:
        """Side of a token's square of latents, which the pipeline's latents hold already."""
        return 1

    @property
    def latent_stride(self) -> int:
        """Pixels per side of 2 x 2 positions of the VAE."""
        return 2 * self.pipeline.vae_scale_factor

    def _shift(self, scheduler: SchedulerMixin, resolution: tuple[int, int] | None, num_steps: int) -> dict[str, float]:
        *_, height, width = self.latent_shape(resolution)
        return {"mu": compute_empirical_mu(height * width, num_steps)}

    @staticmethod
    def prompt_tokens(tokenizer: Any, text: str) -> int:
        """Count tokens, including the system message and the chat template."""
        ids = tokenizer.apply_chat_template(format_input([text]), tokenize=True, return_dict=True)["input_ids"]
        return len(ids[0])

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: embeddings of three layers (B, L, 3 D), and text ids (L, 4)."""
        embeds, text_ids = self.pipeline.encode_prompt(
            list(texts), device=self.pipeline.text_encoder.device, max_sequence_length=self.max_sequence_length
        )
        return Conditioning({"embeds": embeds}, {"text_ids": text_ids[0]}).to(self.device)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer once, through accelerate's wrapper."""
        dtype, guidance = self.dtype, self.embedded_guidance
        output = self.denoiser(
            hidden_states=x.to(dtype).flatten(2).mT,
            # Round before dividing, as the pipeline does: the order matters in bfloat16.
            timestep=time.to(dtype) / 1000,
            guidance=None if guidance is None else torch.full_like(time, guidance),
            encoder_hidden_states=conditioning.tensors["embeds"].to(dtype),
            txt_ids=conditioning.shared["text_ids"],
            img_ids=image_ids(*x.shape[-2:], x.device),
            return_dict=False,
        )[0]
        return output.float().mT.unflatten(2, x.shape[-2:])

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's batch norm, (4 C, 1, 1)."""
        norm, eps = self.pipeline.vae.bn, self.pipeline.vae.config.batch_norm_eps
        mean, std = norm.running_mean, (norm.running_var + eps).sqrt()
        return mean.to(like)[:, None, None], std.to(like)[:, None, None]

    @needs(VAE)
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images (B, 3, H, W), float, in [0, 1]; differentiable."""
        vae = self.pipeline.vae
        mean, std = self._statistics(latents := latents.to(vae.dtype))
        image = vae.decode(pixel_shuffle(latents * std + mean, 2), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    @needs(VAE)
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images to latents: see ``DiffusionModel.encode_images``."""
        vae = self.pipeline.vae
        found = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist
        latents = found.mean if noise is None else found.mean + found.std * pixel_shuffle(noise.to(found.std), 2)
        mean, std = self._statistics(latents)
        return (pixel_unshuffle(latents, 2) - mean) / std


@register_family("Flux2KleinPipeline")
class Flux2KleinModel(Flux2Model):
    """Drive a ``Flux2KleinPipeline``: FLUX.2-klein, distilled or base; options as for ``Flux2Model``.

    Base models guide as other families do; of a distilled one the pipeline ignores the scale, so above 1 it is refused.
    """

    guidance_argument: str | None = "guidance_scale"
    negative_call = "image = pipe(prompt={prompt}, **negative, guidance_scale={scale:g}).images[0]"

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int = 512, resolution: Resolution = None):
        super().__init__(pipeline, max_sequence_length, resolution)
        self.embedded_guidance = None
        if pipeline.config.is_distilled:
            self.guidance_argument = None

    def guidance_arguments(self, scale: float | None) -> dict[str, str]:
        """Return the argument of guidance, as Python source."""
        return super(Flux2Model, self).guidance_arguments(scale) or {"guidance_scale": "1.0"}

    @staticmethod
    def prompt_tokens(tokenizer: Any, text: str) -> int:
        """Count tokens, including the chat template."""
        message = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return len(tokenizer(whole, verbose=False).input_ids)


@lru_cache(maxsize=16)
def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Return the position ids of the image tokens, (h w, 4): 0, row, column, 0. Cached to avoid a device sync."""
    zero = torch.arange(1)
    return torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), zero).to(device)
