"""Stable Diffusion 1.x and 2.x: a UNet that predicts epsilon or v, one CLIP text encoder (arXiv 2112.10752)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from diffalign.diffusion.schedule import vp_level_at, vp_levels
from diffalign.models.base import DiffusionModel, check_schedule
from diffalign.models.offload import TEXT_ENCODERS, needs
from diffalign.structures import Conditioning, Guidance, Level

# What the scheduler's configuration calls an output -> what this package calls it.
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


class SDModel(DiffusionModel):
    """Drives a ``StableDiffusionPipeline``, with the noise schedule of its scheduler and the steps of DDIM.

    Whatever the pipeline's scheduler is (PNDM, Euler, DPM-Solver ...), the levels are those of
    ``DDIMScheduler.from_config(pipe.scheduler.config)``, without its clipping of samples. Options of other solvers, as
    Karras sigmas, are not DDIM's and change nothing. resolution: side of the square images, in pixels; default: the
    pipeline's own. ValueError: a scheduler without betas, or a UNet that predicts neither epsilon nor v.

    A UNet with ``time_cond_proj_dim`` (distilled from guided samples, as LCM) has the guidance scale as an input, 1
    where there is none, and is not guided otherwise.
    """

    denoiser_name = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    # It would black out training images, and weighs as much as the UNet in half precision.
    load_options: Mapping[str, Any] = {"safety_checker": None, "requires_safety_checker": False}

    def __init__(self, pipeline: DiffusionPipeline, resolution: int | None = None) -> None:
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
        """As the pipeline checks it, whatever its autoencoder."""
        return math.lcm(8, self.pipeline.vae_scale_factor)

    def guides(self, scale: float | None) -> bool:
        """Tell whether the pipeline guides at ``scale``; None is no guidance."""
        return super().guides(scale) and self._scale_input is None

    @property
    def _scale_input(self) -> int | None:
        """Width of the UNet's embedding of the guidance scale; None: it has none."""
        return self.raw_denoiser.config.get("time_cond_proj_dim")

    def predict(self, x: Tensor, level: Level, conditioning: Conditioning, guidance: Guidance | None = None) -> Tensor:
        """The UNet's output, guided: (B, C, h, w), float32 or wider; arguments as for every family."""
        if self._scale_input is not None:
            scale = torch.full((len(x),), (1.0 if guidance is None else guidance.scale) - 1)
            embedded = self.pipeline.get_guidance_scale_embedding(scale, self._scale_input).to(x.device)
            conditioning = Conditioning({**conditioning.tensors, "scale": embedded}, conditioning.shared)
        return super().predict(x, level, conditioning, guidance)

    @property
    def token_limit(self) -> int:
        """Positions of CLIP, 77, begin and end of the text included."""
        return self.pipeline.tokenizer.model_max_length

    def count_tokens(self, text: str) -> int:
        """Count CLIP's tokens."""
        return len(self.pipeline.tokenizer(text).input_ids)

    @needs(TEXT_ENCODERS)
    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """The pipeline's own encoding: embeddings (B, L, D)."""
        embeds, _ = self.pipeline.encode_prompt(list(texts), self.pipeline.text_encoder.device, 1, False)
        return Conditioning({"embeds": embeds}).to(self.device)

    def _scheduler(self, **changes: str) -> DDIMScheduler:
        return DDIMScheduler.from_config(self.pipeline.scheduler.config, **changes)

    def levels(self, num_steps: int, schedule: str = "pipeline", resolution: tuple[int, int] | None = None) -> Level:
        """The timesteps of DDIM: "pipeline" spaces them as the scheduler's configuration says, "uniform" from the
        noisiest down ("trailing"). They end at its ``final_alpha_cumprod``, whatever the resolution.
        """
        check_schedule(schedule)
        scheduler = self._scheduler(**{"timestep_spacing": "trailing"} if schedule == "uniform" else {})
        scheduler.set_timesteps(num_steps)
        return vp_levels(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))

    def level_at(self, time: Tensor) -> Level:
        """The levels of whole timesteps 0 to T - 1: times are rounded down, and T counts as T - 1."""
        return vp_level_at(self._scheduler().alphas_cumprod, time)

    def evaluate(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """One call of the UNet, through the wrapper that accelerate prepared."""
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
        """What the UNet sees besides text and time."""
        return None
