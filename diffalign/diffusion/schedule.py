"""Noise schedules: from a number of steps to the levels that a rollout visits, noisiest first.

N steps visit N + 1 levels. Everything is float64 on the CPU: a schedule is a few numbers that every step's mean and
standard deviation derive from, and rounding them would change the density of the policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.structures import Level


def _float64(values: Sequence[float] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def flow_levels(sigmas: Sequence[float] | Tensor, time_scale: float = 1000.0) -> Level:
    """Build the levels of a flow model: alpha = 1 - sigma, time = sigma * time_scale.

    sigmas: (N + 1,), strictly decreasing within [0, 1], the last one 0. ValueError otherwise.
    """
    sigma = _float64(sigmas)
    if sigma.ndim != 1 or len(sigma) < 2 or sigma[0] > 1 or sigma[-1] != 0 or not torch.all(sigma.diff() < 0):
        raise ValueError(f"sigmas must decrease strictly from at most 1 to 0, got {sigma.tolist()}")
    return Level(1 - sigma, sigma, sigma * time_scale)


def flow_level_at(time: Tensor, time_scale: float = 1000.0) -> Level:
    """Build the levels of a flow model at any times: sigma = time / time_scale, alpha = 1 - sigma.

    time: (B,), in [0, time_scale], any dtype. ValueError for times outside.
    """
    time = _times(time, time_scale)
    return Level(1 - time / time_scale, time / time_scale, time)


def _times(time: Tensor, end: float) -> Tensor:
    time = _float64(time)
    inside = (time >= 0) & (time <= end)
    if not torch.all(inside):
        raise ValueError(f"times must lie within 0..{end:g}, got {time[~inside].tolist()}")
    return time


def shift_sigmas(sigmas: Sequence[float] | Tensor, shift: float) -> Tensor:
    """Shift sigmas to s sigma / (1 + (s - 1) sigma): more steps at high noise for s > 1 (arXiv 2403.03206, eq. 23).

    Keeps 0 and 1. A resolution-dependent shift given as mu is s = exp(mu). ValueError unless shift > 0.
    """
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    sigma = _float64(sigmas)
    return shift * sigma / (1 + (shift - 1) * sigma)


def vp_levels(alphas_cumprod: Tensor, timesteps: Sequence[int] | Tensor, final_alpha_cumprod: float = 1.0) -> Level:
    """Build the levels of a variance-preserving model: alpha^2 = abar, sigma^2 = 1 - abar, time = timestep.

    alphas_cumprod: (T,), abar of the training grid. timesteps: (N,), strictly decreasing indices into it.
    final_alpha_cumprod: abar of the appended last level, whose time is 0. With 1 the rollout ends without noise;
        a scheduler with ``set_alpha_to_one=False`` (SD 1.5) ends at ``alphas_cumprod[0]`` instead.
    ValueError: the timesteps do not decrease, or leave the grid.
    """
    time = torch.as_tensor(timesteps, dtype=torch.int64, device="cpu")
    if time.ndim != 1 or not torch.all(time.diff() < 0) or time[-1] < 0 or time[0] >= len(alphas_cumprod):
        raise ValueError(f"timesteps must decrease strictly within 0..{len(alphas_cumprod) - 1}, got {time.tolist()}")
    abar = torch.cat([_float64(alphas_cumprod)[time], _float64([final_alpha_cumprod])])
    return Level(abar.sqrt(), (1 - abar).sqrt(), torch.cat([time.double(), _float64([0.0])]))


def vp_level_at(alphas_cumprod: Tensor, time: Tensor) -> Level:
    """Build the levels of a variance-preserving model at whole timesteps 0 to T - 1 of its training grid.

    alphas_cumprod: (T,). time: (B,), in [0, T], any dtype, rounded down; T itself, which a product T u with u < 1 may
    be rounded to, counts as T - 1. ValueError for times outside.
    """
    index = _times(time, len(alphas_cumprod)).long().clamp_max(len(alphas_cumprod) - 1)
    abar = _float64(alphas_cumprod)[index]
    return Level(abar.sqrt(), (1 - abar).sqrt(), index.double())


def ddim_spacing(config: Mapping[str, Any], schedule: str) -> dict[str, str]:
    """Return the timestep spacing of DDIM where it is not that of a scheduler's configuration.

    DDIM steps over "linspace" timesteps by a constant number of them, which does not lead from one to the next.
    """
    if schedule == "uniform":
        return {"timestep_spacing": "trailing"}
    return {"timestep_spacing": "leading"} if config.get("timestep_spacing") == "linspace" else {}
