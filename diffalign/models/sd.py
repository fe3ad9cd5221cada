"""Stable Diffusion 1.x and 2.x: a UNet that predicts epsilon or v, one CLIP text encoder (arXiv 2112.10752)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from diffalign.diffusion.schedule import ddim_spacing, vp_level_at, vp_levels
from diffalign.models.base import DiffusionModel, check_schedule
from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.models.registry import register_family
from diffalign.models.text_training import hidden, trains_text
from diffalign.structures import Conditioning, Guidance, Level, Resolution

# ``prediction_type`` of the scheduler -> parameterization of this package.
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


@register_family("StableDiffusionPipeline")
class SDModel(DiffusionModel):
    """Drive a ``StableDiffusionPipeline`` with its scheduler's noise schedule and DDIM's timesteps.

    For any scheduler (PNDM, Euler, DPM-Solver, ...), the levels are those of
    ``DDIMScheduler.from_config(pipe.scheduler.config)``, without its clipping of samples. Options that DDIM lacks, such
    as Karras sigmas, have no effect.

    A UNet with ``time_cond_proj_dim`` (distilled from guided samples, such as LCM) takes the guidance scale as an
    input, 1 without guidance, and gets no classifier-free guidance.

    Args:
        pipeline: The pipeline to drive.
        resolution: Height and width of the images, in pixels; one number means a square. Default: the pipeline's own.

    Raises:
        ValueError: The scheduler has no betas, or the UNet predicts neither epsilon nor v.
    """

    denoiser_name = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    # The checker would black out training images, and is as large as the UNet in half precision.
    text_encoders: Mapping[str, int] = {"text_encoder": 0}
    load_options: Mapping[str, Any] = {"safety_checker": None, "requires_safety_checker": False}

    def __init__(self, pipeline: DiffusionPipeline, resolution: Resolution = None) -> None:
        super().__init__(pipeline, resolution)
        config = pipeline.scheduler.config
        if "beta_start" not in config:
            raise ValueError(
                f"{type(pipeline).__name__} with a {type(pipeline.scheduler).__name__}: no betas in its configuration; "
                "give the pipeline a variance-preserving scheduler, such as DDIMScheduler"
            )
        if config.get("prediction_type", "epsilon") not in PREDICTIONS:
            raise ValueError(
                f"scheduler: prediction_type {config.prediction_type!r} is not supported; use {', '.join(PREDICTIONS)}"
            )
        self.parameterization = PREDICTIONS[config.get("prediction_type", "epsilon")]

    @property
    def resolution_unit(self) -> int:
        """The pipeline checks multiples of 8, whatever the autoencoder."""
        return math.lcm(8, self.pipeline.vae_scale_factor)

    def guides(self, scale: float | None) -> bool:
        """Tell whether the pipeline applies guidance at ``scale``; None is no guidance."""
        return super().guides(scale) and self._scale_input is None

    @property
    def _scale_input(self) -> int | None:
        """Width of the UNet's guidance-scale embedding; None if it has none."""
        return self.raw_denoiser.config.get("time_cond_proj_dim")

    def predict(self, x: Tensor, level: Level, conditioning: Conditioning, guidance: Guidance | None = None) -> Tensor:
        """Predict with the UNet, guided: see ``DiffusionModel.predict``."""
        if self._scale_input is not None:
            scale = torch.full((len(x),), (1.0 if guidance is None else guidance.scale) - 1)
            embedded = self.pipeline.get_guidance_scale_embedding(scale, self._scale_input).to(x.device)
            conditioning = Conditioning({**conditioning.tensors, "scale": embedded}, conditioning.shared)
        return super().predict(x, level, conditioning, guidance)

    @property
    def token_limit(self) -> int:
        """CLIP's positions, 77, including the start and end tokens."""
        return self.pipeline.tokenizer.model_max_length

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Encode with the pipeline: embeddings (B, L, D); token ids (B, L) where the text encoder trains."""
        if trains_text(self.raw_denoiser):
            return Conditioning({"ids": self._ids(self.pipeline.tokenizer, texts)}).to(self.device)
        embeds, _ = self.pipeline.encode_prompt(list(texts), self.pipeline.text_encoder.device, 1, False)
        return Conditioning({"embeds": embeds}).to(self.device)

    @staticmethod
    def _ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
        """Tokenize as the pipeline does."""
        length = tokenizer.model_max_length
        return tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def _embedded(self, conditioning: Conditioning) -> Conditioning:
        """Replace token ids by embeddings, with gradients to the text encoders that train."""
        if "ids" not in conditioning.tensors:
            return conditioning
        embeds, _ = hidden(self.pipeline.text_encoder, conditioning.tensors["ids"])
        return Conditioning({**conditioning.tensors, "embeds": embeds}, conditioning.shared)

    def _scheduler(self, schedule: str = "pipeline") -> DDIMScheduler:
        config = self.pipeline.scheduler.config
        return DDIMScheduler.from_config(config, **ddim_spacing(config, schedule))

    def levels(self, num_steps: int, schedule: str = "pipeline", resolution: tuple[int, int] | None = None) -> Level:
        """Return the levels of DDIM's timesteps, ending at ``final_alpha_cumprod``, whatever the resolution.

        "pipeline" uses the ``timestep_spacing`` of the scheduler's config, "uniform" uses "trailing".
        """
        check_schedule(schedule)
        scheduler = self._scheduler(schedule)
        scheduler.set_timesteps(num_steps)
        return vp_levels(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))

    def level_at(self, time: Tensor) -> Level:
        """Return the levels of integer timesteps 0 to T - 1: times are rounded down, and T counts as T - 1."""
        return vp_level_at(self._scheduler().alphas_cumprod, time)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the UNet once, through accelerate's wrapper."""
        conditioning = self._embedded(conditioning)
        embedded = conditioning.tensors.get("scale")
        output = self.denoiser(
            x.to(self.dtype),
            time,
            encoder_hidden_states=conditioning.tensors["embeds"].to(self.dtype),
            timestep_cond=embedded.to(self.dtype) if embedded is not None else None,
            added_cond_kwargs=self._added(conditioning),
            return_dict=False,
        )[0]
        return output.float()

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """Return conditioning of the UNet besides text and time."""
        return None
