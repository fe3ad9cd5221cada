"""What flow models share: levels from the scheduler's own sigmas, and latents that are packed into tokens."""

from __future__ import annotations

import copy

import numpy as np
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from diffalign.diffusion.schedule import flow_level_at, flow_levels
from diffalign.models.base import DiffusionModel, check_schedule
from diffalign.structures import Level

# Layers of attention over image and text together: the usual targets of a LoRA.
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

# Scheduler's name of a number -> ours in ``calculate_shift``, with the value that pipelines take where it has none.
SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


class FlowModel(DiffusionModel):
    """A pipeline whose denoiser predicts noise - x0 at x = (1 - sigma) x0 + sigma noise.

    max_sequence_length: tokens per prompt. What is trained here should be what is sampled later. resolution: side of
    the square images, in pixels. Both default to the pipeline's own.
    """

    parameterization = "flow"
    # Whether the pipeline hands linspace(1, 1 / N, N) to its scheduler, so that its schedule is "uniform"; SD3's leaves
    # the grid to the scheduler.
    uniform_grid = True

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int = 512, resolution: int | None = None):
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
        """The scheduler's own sigmas, dynamic shift included."""
        check_schedule(schedule)
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        uniform = {"sigmas": np.linspace(1, 1 / num_steps, num_steps).tolist()}
        grid = uniform if schedule == "uniform" or self.uniform_grid else {"num_inference_steps": num_steps}
        scheduler.set_timesteps(**grid, **self._shift(scheduler, resolution))
        return flow_levels(scheduler.sigmas, self.num_train_timesteps)

    def level_at(self, time: Tensor) -> Level:
        """sigma = time / T."""
        return flow_level_at(time, self.num_train_timesteps)

    @property
    def token_limit(self) -> int:
        """``max_sequence_length``."""
        return self.max_sequence_length

    @property
    def longest_sequence(self) -> int:
        """Tokens per prompt that the pipeline takes at most, or its text encoder where the pipeline does not say."""
        return 512

    @property
    def patch_size(self) -> int:
        """Side of the square of latents that is one token."""
        return 2

    @property
    def resolution_unit(self) -> int:
        """Whole tokens."""
        return self.pipeline.vae_scale_factor * self.patch_size

    def _shift(self, scheduler, resolution: tuple[int, int] | None) -> dict[str, float]:
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, height, width = self.latent_shape(resolution)
        tokens = (height // self.patch_size) * (width // self.patch_size)
        return {"mu": calculate_shift(tokens, *(scheduler.config.get(name, usual) for name, usual in SHIFT.items()))}


class PackedFlowModel(FlowModel):
    """A flow model whose transformer takes squares of 2 x 2 latents, packed into tokens (B, h/2 w/2, 4 C)."""

    @property
    def default_resolution(self) -> tuple[int, int]:
        """``resolution``, else the pipeline's own; its transformer does not know one."""
        size = self.resolution or self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return size, size

    @property
    def latent_channels(self) -> int:
        """C of the latents before packing."""
        return self.raw_denoiser.config.in_channels // self.patch_size**2


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 w/2, 4 C): a token holds 2 x 2 positions, channel by channel."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h/2 w/2, 4 C) -> (B, C, h, w); the inverse of ``pack``."""
    batch, _, channels = tokens.shape
    squares = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)
