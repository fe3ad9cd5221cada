"""Take one step of a sampler, deterministic or stochastic, with the log-density of the drawn sample.

With the denoiser's x0 and noise, x = alpha x0 + sigma noise holds identically. So the mean of every step from a level
(alpha, sigma) to the next (alpha', sigma') is a mixture of the same two, and a kind of step is three numbers:

    x' = m_x0 x0 + m_noise noise + std eps,   eps ~ N(0, 1).

All kinds have m_x0 = alpha'. They differ in how much of the noise is kept and how much is redrawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.device import mean_float64
from diffalign.diffusion.parameterization import combine, expand, inverse, to_x0, widen
from diffalign.structures import Level, StepResult


@dataclass(frozen=True)
class Transition:
    """x' = m_x0 x0 + m_noise noise + std eps; float64 on the CPU, each () or (B,)."""

    m_x0: Tensor
    m_noise: Tensor
    std: Tensor


def _ode(level: Level, next_level: Level, noise_level: float) -> Transition:
    """DDIM without noise (arXiv 2010.02502), which on flow levels is the Euler step x + (sigma' - sigma) v."""
    return Transition(next_level.alpha, next_level.sigma, torch.zeros_like(next_level.sigma))


def _euler_sde(level: Level, next_level: Level, s: Tensor) -> Transition:
    """Euler-Maruyama with diffusion s and score -noise / sigma; dt = sigma' - sigma < 0.

    mean = x + (noise - x0) dt + s^2 / (2 sigma) noise dt,   std = s sqrt(-dt).
    """
    step_size = level.sigma - next_level.sigma
    kept = next_level.sigma - s.square() * step_size / (2 * level.sigma)
    return Transition(next_level.alpha, kept, s * step_size.sqrt())


# Schedules start at 1 or, as SANA's, at .9997: from here on 1 / (1 - sigma) is too large to step with.
PURE_NOISE = 1 - 1e-3


def _flow_sde(level: Level, next_level: Level, noise_level: float) -> Transition:
    """Flow-GRPO (arXiv 2505.05470): s = a sqrt(sigma / (1 - sigma)), with sigma' under the root near sigma = 1.

    So a schedule that starts at 1 starts with std = a, because s^2 (-dt) = a^2 / (1 - sigma') * (1 - sigma').

    Departures from the released code:
    1. sigma' replaces sigma from ``PURE_NOISE`` on; that code does so at sigma = 1 only, so a start at .9997 would draw
       ten times the noise. The released code's schedules start at 1 and step below ``PURE_NOISE`` at once, and their
       steps are the same to the last bit.
    """
    guarded = torch.where(level.sigma >= PURE_NOISE, next_level.sigma, level.sigma)
    return _euler_sde(level, next_level, noise_level * (level.sigma / (1 - guarded)).sqrt())


def _dance_sde(level: Level, next_level: Level, noise_level: float) -> Transition:
    """DanceGRPO (arXiv 2505.07818): s = eta at every level."""
    return _euler_sde(level, next_level, torch.full_like(level.sigma, noise_level))


def _kept_variance(next_level: Level, std: Tensor) -> Transition:
    """Split the noise of the next level: sigma'^2 = m_noise^2 + std^2. Rounding must not make the rest negative."""
    return Transition(next_level.alpha, (next_level.sigma.square() - std.square()).clamp_min(0).sqrt(), std)


def _cps(level: Level, next_level: Level, noise_level: float) -> Transition:
    """Flow-CPS, coefficients-preserving sampling (arXiv 2509.05952): std = sigma' sin(a pi / 2).

    Departures from the paper:
    1. Its log-probability is the true Gaussian one, where the paper drops the constants and 1 / (2 std^2): a clip range
       means the same under every kind of step, and a weight per step is a choice of the loss.
    """
    return _kept_variance(next_level, next_level.sigma * math.sin(noise_level * math.pi / 2))


def _ddim(level: Level, next_level: Level, noise_level: float) -> Transition:
    """DDIM (arXiv 2010.02502, eq. 16): std = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2), any schedule.

    eta = 1 is the posterior of the forward process, the ancestral step of DDPM.
    """
    ratio = level.alpha * next_level.sigma / (next_level.alpha * level.sigma)
    return _kept_variance(next_level, noise_level * next_level.sigma * (1 - ratio.square()).sqrt())


TRANSITIONS: dict[str, Callable[[Level, Level, float], Transition]] = {
    "ode": _ode,
    "flow_sde": _flow_sde,
    "dance_sde": _dance_sde,
    "cps": _cps,
    "ddim": _ddim,
}

# The largest noise level at which the formula means something: an angle of 90 degrees, or no more than the posterior.
MAX_NOISE_LEVEL: dict[str, float] = {"ode": 0.0, "flow_sde": math.inf, "dance_sde": math.inf, "cps": 1.0, "ddim": 1.0}

# Their drift is written for x = (1 - sigma) x0 + sigma noise.
FLOW_ONLY = frozenset({"flow_sde", "dance_sde"})


def transition(kind: str, level: Level, next_level: Level, noise_level: float = 0.0) -> Transition:
    """Compute the coefficients of a step.

    Args:
        kind: A key of ``TRANSITIONS``.
        level: Start of the step, fields () or (B,).
        next_level: End of the step.
        noise_level: The kind's a or eta, from 0, which is the ODE step, to ``MAX_NOISE_LEVEL[kind]``.

    Raises:
        ValueError: Unknown kind, noise level out of range, or a flow-only kind on other levels.
    """
    if kind not in TRANSITIONS:
        raise ValueError(f"unknown step {kind!r}; known: {', '.join(TRANSITIONS)}")
    if not 0 <= noise_level <= MAX_NOISE_LEVEL[kind]:
        raise ValueError(f"the noise level of {kind!r} lies in [0, {MAX_NOISE_LEVEL[kind]}], got {noise_level}")
    if kind in FLOW_ONLY and not (level.is_flow and next_level.is_flow):
        raise ValueError(f"{kind!r} is defined on flow levels (alpha = 1 - sigma) only: use 'ddim' on these")
    return TRANSITIONS[kind](level, next_level, noise_level)


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log N(x_next; mean, std^2) as the mean over a sample's dimensions: (B,), float64, in nats per dimension.

    -(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2, with ``x_next`` a constant: the gradient is the policy's.
    x_next, mean: (B, ...). std: () or (B,), positive.

    Training uses differences of log-probs, which at 1024 pixels are clipped at 4e-6 while a log-prob is about 1:
    float32 would keep one digit of them. Squares, float32 or wider, are therefore summed in float64, and only their
    mean is divided by std^2: values of a sample lie on the grid of its dtype, and dividing each of them would round
    all to the same side. A device without float64 returns a CPU tensor: see ``mean_float64``.
    """
    mean = widen(mean)
    squared_error = mean_float64((x_next.detach() - mean).square().reshape(len(mean), -1))
    return -0.5 * squared_error * expand(std**-2, squared_error) - expand(
        std.log() + 0.5 * math.log(2 * math.pi), squared_error
    )


def _mean(move: Transition, x: Tensor, output: Tensor, level: Level, parameterization: str) -> Tensor:
    """Compute the mean as A x + B output; coefficients are multiplied in float64 before they are applied to tensors."""
    solved = inverse(parameterization, level)
    a = move.m_x0 * solved.x0_x + move.m_noise * solved.noise_x
    b = move.m_x0 * solved.x0_output + move.m_noise * solved.noise_output
    return combine(a, x, b, output)


def _draw(mean: Tensor, std: Tensor, dtype: torch.dtype, noise: Tensor | None, x_next: Tensor | None) -> StepResult:
    if noise is not None and x_next is not None:
        raise ValueError("a step takes fresh noise (rollout) or the stored x_next (replay), not both")
    if not std.any():
        return StepResult(mean.to(dtype) if x_next is None else x_next, mean, std, None)
    if not std.all():
        raise ValueError("std is 0 for some samples of the batch only: step those separately, they have no density")
    if x_next is None:
        if noise is None:
            raise ValueError("a stochastic step takes fresh noise (rollout) or the stored x_next (replay)")
        x_next = (mean + expand(std, mean) * noise.to(mean.dtype)).to(dtype)
    return StepResult(x_next, mean, std, log_prob(x_next, mean, std))


def step(
    kind: str,
    x: Tensor,
    output: Tensor,
    level: Level,
    next_level: Level,
    *,
    parameterization: str,
    noise_level: float = 0.0,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
) -> StepResult:
    """Take one step from ``level`` to ``next_level``.

    Pass ``noise`` to draw the next sample (rollout) or ``x_next`` to evaluate a stored one (replay). Both give the same
    log_prob bit for bit if the other inputs are equal. A step with std 0 needs neither and has no log_prob.

    Args:
        kind: See ``transition``.
        x: (B, ...), any float dtype.
        output: (B, ...), the denoiser's output.
        level: Start of the step, fields () or (B,).
        next_level: End of the step.
        parameterization: Meaning of ``output``, a key of ``PARAMETERIZATIONS``.
        noise_level: See ``transition``.
        noise: (B, ...), standard normal. The sample is rounded to the dtype of ``x``, and log_prob is that of the
            rounded sample.
        x_next: (B, ...), the stored sample.

    Raises:
        ValueError: Both are given, or neither although std is not 0; std is 0 for a part of the batch; or as
            ``transition``.
    """
    move = transition(kind, level, next_level, noise_level)
    mean = _mean(move, x, output, level, parameterization)
    return _draw(mean, move.std, x.dtype, noise, x_next)


def _log_snr(level: Level) -> Tensor:
    return (level.alpha / level.sigma).log()


def _correction(level: Level, next_level: Level, previous_level: Level) -> Tensor:
    """(alpha' - alpha sigma' / sigma) h / (2 h_previous), and 0 next to a level of pure noise or no noise."""
    h, h_previous = _log_snr(next_level) - _log_snr(level), _log_snr(level) - _log_snr(previous_level)
    weight = (next_level.alpha - level.alpha * next_level.sigma / level.sigma) * h / (2 * h_previous)
    return torch.where(torch.isfinite(h) & torch.isfinite(h_previous), weight, 0.0)


def dpmpp_2m(
    x: Tensor,
    output: Tensor,
    level: Level,
    next_level: Level,
    *,
    parameterization: str,
    previous_x0: Tensor | None = None,
    previous_level: Level | None = None,
) -> StepResult:
    """Take a step of DPM-Solver++(2M), a second-order multistep ODE solver (arXiv 2211.01095, algorithm 2); std is 0.

    With lambda = log(alpha / sigma), h = lambda' - lambda and r = h_previous / h,

        x' = sigma' / sigma x - alpha' (e^-h - 1) D,   D = x0 + (x0 - previous_x0) / (2 r).

    The step is of first order, the "ode" step alpha' x0 + sigma' noise, if there is no previous step (for example
    after a stochastic one), if sigma' = 0, or if a level is pure noise.

    x, output: (B, ...). previous_x0: (B, ...), ``to_x0`` of the previous step, and previous_level its level; the caller
    keeps both. ValueError: one is given without the other.

    Departures from the paper:
    1. The last step to sigma' = 0, where h is infinite, is of first order.
    """
    first = step("ode", x, output, level, next_level, parameterization=parameterization)
    if previous_x0 is None and previous_level is None:
        return first
    if previous_x0 is None or previous_level is None:
        raise ValueError("previous_x0 and previous_level come together")
    change = to_x0(parameterization, x, output, level) - widen(previous_x0)
    mean = first.mean + expand(_correction(level, next_level, previous_level), change) * change
    return StepResult(mean.to(x.dtype), mean, first.std, None)
