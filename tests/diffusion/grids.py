"""Grids of sigmas that diffusers' schedulers make, as oracles."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.diffusion.schedule import shift_sigmas


def uniform_sigmas(num_steps: int) -> Tensor:
    """Return N + 1 equally spaced sigmas from 1 to 0."""
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def flow_match_euler_sigmas(num_steps: int, shift: float, num_train_timesteps: int = 1000) -> Tensor:
    """Return the grid of diffusers' FlowMatchEulerDiscreteScheduler with a fixed shift: (N + 1,), from 1 to 0.

    That scheduler shifts the end of its training grid, 1 / num_train_timesteps, when it is built, and shifts the whole
    grid (the end a second time) when steps are set; the appended 0 is never shifted. Pretrained models are sampled
    on this grid, so it is kept. Agrees to float32 rounding, in which diffusers computes it.
    """
    last = float(shift_sigmas([1 / num_train_timesteps], shift))
    grid = torch.linspace(1, last, num_steps, dtype=torch.float64)
    return torch.cat([shift_sigmas(grid, shift), torch.zeros(1, dtype=torch.float64)])
