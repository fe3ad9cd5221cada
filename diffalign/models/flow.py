"""Base classes of flow models: levels from the scheduler's sigmas, and packing of latents into tokens."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from diffalign.diffusion.schedule import flow_level_at, flow_levels
from diffalign.models.base import DiffusionModel, check_schedule
from diffalign.structures import Level, Resolution

# Joint attention layers over image and text: the usual LoRA targets.
JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)

# Scheduler config key -> the pipelines' default, in the order of ``calculate_shift``'s arguments.
SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


class FlowModel(DiffusionModel):
    """A pipeline whose denoiser predicts noise - x0 at x = (1 - sigma) x0 + sigma noise.

    Both arguments default to the pipeline's own.

    Args:
        pipeline: The pipeline to drive.
        max_sequence_length: Tokens per prompt; use the same value for training and later sampling.
        resolution: Height and width of the images, in pixels; one number means a square.

    Raises:
        ValueError: ``max_sequence_length`` is out of range, or the scheduler has no flow sigmas.
    """

    parameterization = "flow"
    # Whether the pipeline passes linspace(1, 1 / N, N) to its scheduler, which makes its schedule "uniform"; SD3's
    # leaves the grid to the scheduler.
    uniform_grid = True

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int = 512, resolution: Resolution = None):
        super().__init__(pipeline, resolution)
        most = self.longest_sequence
        if not 1 <= max_sequence_length <= most:
            raise ValueError(
                f"max_sequence_length {max_sequence_length}: a {type(pipeline).__name__} takes 1 to {most} tokens"
            )
        self.max_sequence_length = max_sequence_length
        scheduler = pipeline.scheduler
        if "shift" not in scheduler.config and not scheduler.config.get("use_flow_sigmas"):
            raise ValueError(
                f"{type(pipeline).__name__} with a {type(scheduler).__name__}: no flow sigmas in its configuration; "
                "give the pipeline a scheduler of flow models, such as FlowMatchEulerDiscreteScheduler"
            )

    def levels(self, num_steps: int, schedule: str = "pipeline", resolution: tuple[int, int] | None = None) -> Level:
        """Return the levels of the scheduler's sigmas, including dynamic shift."""
        check_schedule(schedule)
        if num_steps < 2 and self.pipeline.scheduler.config.get("shift_terminal"):
            raise ValueError(
                f"num_steps {num_steps}: the scheduler of this {type(self.pipeline).__name__} stretches its sigmas "
                "from 1 to shift_terminal, which takes two; give 2 or more"
            )
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        uniform = {"sigmas": np.linspace(1, 1 / num_steps, num_steps).tolist()}
        grid = uniform if schedule == "uniform" or self.uniform_grid else {"num_inference_steps": num_steps}
        scheduler.set_timesteps(**grid, **self._shift(scheduler, resolution, num_steps))
        return flow_levels(scheduler.sigmas, self.num_train_timesteps)

    def level_at(self, time: Tensor) -> Level:
        """Return the level with sigma = time / T."""
        return flow_level_at(time, self.num_train_timesteps)

    @property
    def token_limit(self) -> int:
        """``max_sequence_length``."""
        return self.max_sequence_length

    @property
    def longest_sequence(self) -> int:
        """Maximum ``max_sequence_length`` of the pipeline, or of its text encoder if the pipeline sets none."""
        return 512

    @property
    def patch_size(self) -> int:
        """Side of a token's square of latents."""
        return 2

    @property
    def resolution_unit(self) -> int:
        """Pixels per side of a token."""
        return self.latent_stride * self.patch_size

    def _shift(self, scheduler: SchedulerMixin, resolution: tuple[int, int] | None, num_steps: int) -> dict[str, float]:
        """Return the argument of ``set_timesteps`` that shifts the sigmas by image size; empty for a fixed shift."""
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        *_, height, width = self.latent_shape(resolution)
        tokens = (height // self.patch_size) * (width // self.patch_size)
        return {"mu": calculate_shift(tokens, *(scheduler.config.get(name, usual) for name, usual in SHIFT.items()))}


class PackedFlowModel(FlowModel):
    """A flow model whose transformer takes 2 x 2 latents packed into tokens (B, h/2 w/2, 4 C)."""

    @property
    def default_resolution(self) -> tuple[int, int]:
        """``resolution``, or the pipeline's default; the transformer's config has none."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return self.resolution or (side, side)

    @property
    def latent_channels(self) -> int:
        """Number of latent channels C before packing."""
        return self.raw_denoiser.config.in_channels // self.patch_size**2


def pack(latents: Tensor) -> Tensor:
    """Pack latents (B, C, h, w) into tokens (B, h/2 w/2, 4 C) of 2 x 2 positions, channels first."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens (B, h/2 w/2, 4 C) into latents (B, C, h, w); the inverse of ``pack``."""
    batch, _, channels = tokens.shape
    squares = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


@lru_cache(maxsize=16)
def image_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the position ids of the image tokens, (h w, 3): 0, row, column. Cached to avoid a device sync."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(device, dtype)
