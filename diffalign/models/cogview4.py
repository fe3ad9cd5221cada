"""CogView4: a flow model of joint attention with GLM-4 as text encoder, conditioned on image sizes (Zhipu AI, 2025)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from diffalign.diffusion.schedule import flow_level_at, shift_sigmas
from diffalign.models.base import check_schedule
from diffalign.models.flow import FlowModel
from diffalign.models.negative_prompt import NegativePrompt
from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.registry import register_family
from diffalign.structures import Conditioning, Level, Resolution

BLOCK = 16  # tokens, of which the pipeline pads prompts to a multiple


class MaskedKeys:
    """Joint attention of text and image in which padding is masked as keys only.

    diffusers' default processor adds a mask of 0 and 1 to attention scores. Its processor for training masks padding as
    queries too, and some kernels give NaN for a query without any key.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        text_attn_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs of image (B, h w, D) and text (B, L, D), given a mask (B, L), 1 for text tokens."""
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        length = encoder_hidden_states.shape[1]
        query, key, value = (
            project(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )

        def placed(states: Tensor, norm: Any) -> Tensor:
            states = states if norm is None else norm(states).to(joint.dtype)
            image = apply_rotary_emb(states[:, :, length:], image_rotary_emb, use_real_unbind_dim=-2)
            return torch.cat([states[:, :, :length], image], dim=2)

        query, key = placed(query, attn.norm_q), placed(key, attn.norm_k)
        keys = pad(text_attn_mask.bool(), (0, hidden_states.shape[1]), value=True)[:, None, None]
        found = scaled_dot_product_attention(query, key, value, attn_mask=keys)
        found = found.transpose(1, 2).flatten(2).to(query.dtype)
        for layer in attn.to_out:
            found = layer(found)
        return found[:, length:], found[:, :length]


@register_family("CogView4Pipeline")
class CogView4Model(FlowModel):
    """Drive a ``CogView4Pipeline``.

    Prompts are encoded as by a call with one prompt: the pipeline pads those of a longer list to a common length, which
    the text encoder reads. Rows are masked up to ``max_sequence_length``, so a lower one saves time.

    The transformer's time is that before the scheduler's shift, so ``level_at`` shifts sigmas, at the model's size.

    Args:
        pipeline: The pipeline to drive.
        max_sequence_length: Tokens per prompt; default 1024, as in the pipeline.
        resolution: Side of the square images, or height and width, in pixels, a multiple of 16.
    """

    uniform_grid = False
    sizes_name = "sizes"
    lora_targets = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int = 1024, resolution: Resolution = None):
        super().__init__(pipeline, max_sequence_length, resolution)
        for block in self.raw_denoiser.transformer_blocks:
            block.attn1.set_processor(MaskedKeys())

    @property
    def longest_sequence(self) -> int:
        """Positions of the text encoder; the pipeline sets no maximum."""
        return self.pipeline.text_encoder.config.max_position_embeddings

    @property
    def resolution_unit(self) -> int:
        """The pipeline checks multiples of 16, whatever the autoencoder."""
        return math.lcm(16, super().resolution_unit)

    @property
    def patch_size(self) -> int:
        """Side of a token's square of latents."""
        return self.raw_denoiser.config.patch_size

    def _mu(self, resolution: tuple[int, int] | None) -> float:
        config = self.pipeline.scheduler.config
        *_, height, width = self.latent_shape(resolution)
        usual = {"base_image_seq_len": 256, "base_shift": 0.25, "max_shift": 0.75}
        shift = (config.get(name, default) for name, default in usual.items())
        return calculate_shift(height * width // self.patch_size**2, *shift)

    def levels(self, num_steps: int, schedule: str = "pipeline", resolution: tuple[int, int] | None = None) -> Level:
        """Return the levels of the scheduler's shifted sigmas, with the times before the shift."""
        check_schedule(schedule)
        scheduler, end = copy.deepcopy(self.pipeline.scheduler), self.num_train_timesteps
        times = np.linspace(end, 1, num_steps).astype(np.int64).astype(np.float32)
        sigmas = np.linspace(1, 1 / num_steps, num_steps) if schedule == "uniform" else times / end
        scheduler.set_timesteps(timesteps=times, sigmas=sigmas, mu=self._mu(resolution))
        sigma = scheduler.sigmas.double()
        return Level(1 - sigma, sigma, torch.cat([scheduler.timesteps.double(), sigma.new_zeros(1)]))

    def level_at(self, time: Tensor) -> Level:
        """Return the level of each training time, its sigma shifted as at the model's own size."""
        scheduler, level = self.pipeline.scheduler, flow_level_at(time, self.num_train_timesteps)
        if scheduler.config.use_dynamic_shifting:
            sigma = scheduler.time_shift(self._mu(None), 1.0, level.sigma)
        else:
            sigma = shift_sigmas(level.sigma, scheduler.config.shift)
        return Level(1 - sigma, sigma, level.time)

    def train_negative(self) -> NegativePrompt:
        """Refuse: the pipeline takes negative embeddings of the prompt's own length only."""
        raise ValueError("a CogView4Pipeline takes negative embeddings as long as each prompt's only; train a LoRA")

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode one by one with the pipeline and pad: embeddings (B, L, D), mask (B, L) and sizes (B, 6)."""
        device, length = self.pipeline.text_encoder.device, -(-self.max_sequence_length // BLOCK) * BLOCK
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.max_sequence_length}
        found = [self.pipeline.encode_prompt(text, device=device, **options)[0][0] for text in texts]
        mask = torch.stack([torch.arange(length) < len(e) for e in found]).int()
        embeds = torch.stack([pad(e, (0, 0, 0, length - len(e))) for e in found])
        size = torch.tensor([self.default_resolution], dtype=torch.float32).expand(len(embeds), 2)
        bare = Conditioning({"embeds": embeds, "mask": mask}).to(self.device)
        return self.with_sizes(bare, size, torch.zeros_like(size), size)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the transformer once, through accelerate's wrapper."""
        tensors = conditioning.tensors
        original, crop, target = tensors["sizes"].chunk(3, dim=1)
        output = self.denoiser(
            hidden_states=x.to(self.dtype),
            encoder_hidden_states=tensors["embeds"].to(self.dtype),
            timestep=time,
            original_size=original.to(self.dtype),
            target_size=target.to(self.dtype),
            crop_coords=crop.to(self.dtype),
            attention_kwargs={"text_attn_mask": tensors["mask"]},
            return_dict=False,
        )[0]
        return output.float()
