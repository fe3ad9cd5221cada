"""Parameterizations of the denoiser's output (epsilon, v, flow), and conversion to the clean sample and the noise.

A sample at a level is x = alpha x0 + sigma noise, and every kind of output is another such mixture,

    output = a x0 + b noise,

so the pair (a, b) defines a kind. Solving the two equations gives x0 and noise from (x, output):

    det = alpha b - sigma a,   x0 = (b x - sigma output) / det,   noise = (alpha output - a x) / det.

Coefficients are float64 CPU tensors. A scalar level stays a 0-dim CPU tensor, which multiplies a tensor of any device
without a synchronisation; a level per sample is moved once, without blocking. Results are float32 or wider: half
precision inputs are widened first, so that the coefficients are not rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.structures import Level


@dataclass(frozen=True)
class Mixture:
    """Coefficients (a, b) of a mixture a x0 + b noise; float64 on the CPU, each () or (B,)."""

    x0: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Inverse:
    """x0 = x0_x * x + x0_output * output and noise = noise_x * x + noise_output * output; float64, each () or (B,)."""

    x0_x: Tensor
    x0_output: Tensor
    noise_x: Tensor
    noise_output: Tensor


def _epsilon(level: Level) -> Mixture:
    """Output = noise: DDPM, arXiv 2006.11239."""
    return Mixture(torch.zeros_like(level.alpha), torch.ones_like(level.alpha))


def _v(level: Level) -> Mixture:
    """Output = alpha noise - sigma x0: progressive distillation, arXiv 2202.00512, appendix D."""
    return Mixture(-level.sigma, level.alpha)


def _flow(level: Level) -> Mixture:
    """Output = noise - x0, the velocity dx/dsigma of the straight path: rectified flow, arXiv 2209.03003."""
    return Mixture(-torch.ones_like(level.alpha), torch.ones_like(level.alpha))


PARAMETERIZATIONS: dict[str, Callable[[Level], Mixture]] = {"epsilon": _epsilon, "v": _v, "flow": _flow}


def mixture(kind: str, level: Level) -> Mixture:
    """Return the pair (a, b) of output = a x0 + b noise. Raises ValueError for an unknown kind."""
    if kind not in PARAMETERIZATIONS:
        raise ValueError(f"unknown parameterization {kind!r}; known: {', '.join(PARAMETERIZATIONS)}")
    return PARAMETERIZATIONS[kind](level)


def inverse(kind: str, level: Level) -> Inverse:
    """Compute the 2x2 coefficients that give x0 and noise from x and the output.

    Raises ValueError if the output does not determine x0: "epsilon" at alpha = 0, where x is pure noise.
    """
    part = mixture(kind, level)
    det = level.alpha * part.noise - level.sigma * part.x0
    if not torch.all(det):
        raise ValueError(f"at alpha = 0 a {kind!r} output does not determine x0: start below pure noise, or use 'v'")
    return Inverse(part.noise / det, -level.sigma / det, -part.x0 / det, level.alpha / det)


def widen(x: Tensor) -> Tensor:
    """Cast half precision to float32; wider dtypes stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Broadcast ``coefficient`` against ``x`` (B, ...): () as it is, (B,) cast, moved and shaped (B, 1, ...).

    Without the cast a float64 (B,) coefficient would promote a float32 ``x``, and differ in bits from the () form.
    """
    if coefficient.ndim == 0:
        return coefficient
    cast = coefficient.to(x.dtype)  # first: the device may have no float64
    return cast.to(x.device, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Compute ``a x + b y`` for coefficients () or (B,) and tensors (B, ...); float32 or wider."""
    x, y = widen(x), widen(y)
    return expand(a, x) * x + expand(b, y) * y


def to_x0(kind: str, x: Tensor, output: Tensor, level: Level) -> Tensor:
    """Predict the clean sample from ``output``: (B, ...), float32 or wider. Errors: see ``inverse``."""
    solved = inverse(kind, level)
    return combine(solved.x0_x, x, solved.x0_output, output)


def to_noise(kind: str, x: Tensor, output: Tensor, level: Level) -> Tensor:
    """Predict the noise from ``output``: (B, ...), float32 or wider. Errors: see ``inverse``."""
    solved = inverse(kind, level)
    return combine(solved.noise_x, x, solved.noise_output, output)


def add_noise(x0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Compute the noisy sample x = alpha x0 + sigma noise: (B, ...), float32 or wider."""
    return combine(level.alpha, x0, level.sigma, noise)


def target(kind: str, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Compute the training target, the output of a perfect denoiser of this kind: (B, ...), float32 or wider."""
    part = mixture(kind, level)
    return combine(part.x0, x0, part.noise, noise)
