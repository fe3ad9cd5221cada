"""Input of forward-process objectives: final images of a rollout, noised and denoised with several weight sets.

Notation of the objectives: v is the denoiser's output, whatever it predicts, u its target, e = v - u, and

    x0_hat - x0 = c e,   c = d x0_hat / d v   (flow: -t; v-prediction: -sigma; epsilon: -sigma / alpha),

so errors in x0 are the same number for epsilon, v and flow models that predict the same x0, and errors of the output
are those of the model's own training loss. |.|^2 is the mean over a sample's elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.diffusion.parameterization import expand, inverse, mixture, widen
from diffalign.losses.registry import ForwardObjective, Options
from diffalign.structures import Level

# Smallest mean absolute error to divide by, as in the released code of NFT and of those who follow it.
MIN_WEIGHT = 1e-5


@dataclass(frozen=True)
class ForwardStep:
    """B noised images, denoised by the policy and the weights that it is compared with.

    Attributes:
        output: v, (B, C, *spatial), with the policy's gradient.
        target: u, the same shape.
        level: (B,), noise level of each.
        advantage: A, (B,).
        parameterization: "epsilon", "v" or "flow".
        estimator: A key of ``ESTIMATORS``, the stand-in for log-likelihoods.
        old: v_old, output of the lagged weights; None for objectives that need none.
        reference: v_ref, output of the base model; None for objectives that need none.
        group_mean: (B, S), mean of the objective's ``statistic`` over all rows of the sample's group at the same
            time, on all processes, or over the image's times; None for objectives without one.
        trust_region: A key of ``policy.TRUST_REGIONS``, for objectives of a clipped ratio.
    """

    output: Tensor
    target: Tensor
    level: Level
    advantage: Tensor
    parameterization: str = "flow"
    estimator: str = "uniform"
    old: Tensor | None = None
    reference: Tensor | None = None
    group_mean: Tensor | None = None
    trust_region: str = "clip"

    @property
    def x0_scale(self) -> Tensor:
        """|c|, the change of the predicted x0 with the output: (B,), float64; t for flow models."""
        return inverse(self.parameterization, self.level).x0_output.abs()

    def error(self, output: Tensor) -> Tensor:
        """Return e = v - u, (B, C, *spatial), float32 or wider."""
        return widen(output) - widen(self.target.detach())

    def x0_error(self, output: Tensor) -> Tensor:
        """Return x0_hat - x0 up to its sign, (B, C, *spatial), float32 or wider."""
        error = self.error(output)
        return expand(self.x0_scale, error) * error

    def log_likelihood(self, output: Tensor) -> Tensor:
        """Return E, the estimator's stand-in for log p(x0) up to a constant: (B,)."""
        return ESTIMATORS[self.estimator](self, output)

    @property
    def log_p(self) -> Tensor:
        """E of the policy, with its gradient: (B,)."""
        return self.log_likelihood(self.output)

    @property
    def old_log_p(self) -> Tensor:
        """E of the lagged weights, a constant: (B,). ValueError without them."""
        return self.log_likelihood(required(self.old, "old").detach()).detach()

    @property
    def reference_log_p(self) -> Tensor:
        """E of the base model, a constant: (B,). ValueError without it."""
        return self.log_likelihood(required(self.reference, "reference").detach()).detach()


def required(output: Tensor | None, name: str) -> Tensor:
    """Return an output. ValueError: it is missing."""
    if output is None:
        raise ValueError(f"this objective compares with {name!r}: give ForwardStep that output as well")
    return output


def mean_square(x: Tensor) -> Tensor:
    """|x|^2, the mean over each sample's elements: (B,)."""
    return x.square().flatten(1).mean(1)


def mean_abs(x: Tensor) -> Tensor:
    """Mean of |x| over each sample's elements, a constant of at least ``MIN_WEIGHT``: (B,)."""
    return x.detach().abs().flatten(1).mean(1).clamp(min=MIN_WEIGHT)


def anchor_weight(kind: str, level: Level) -> Tensor:
    """Return the weight of |v - v_anchor|^2 at each level: (B,), float64.

    "uniform": 1. "elbo": AWM's 1 / (2 s^2) with s = 0.7 sqrt(t / (1 - min(t, 0.99))) and t = sigma / (alpha + sigma),
    the KL between steps of Flow-GRPO's SDE up to their length; t is at least 0.001 here.
    """
    alpha, sigma = level.alpha.double(), level.sigma.double()
    t = (sigma / (alpha + sigma)).clamp(min=1e-3)
    return (1 - t.clamp(max=0.99)) / (2 * 0.49 * t) if kind == "elbo" else torch.ones_like(t)


def check_options(objective: ForwardObjective, options: Options) -> None:
    """Call an objective on one sample of zeros, which finds values that it refuses. Raises ValueError."""
    nothing, one = torch.zeros(1, 1, 1, 1), torch.full((1,), 0.5)
    step = ForwardStep(nothing, nothing, Level(one, one, one), one, old=nothing, reference=nothing)
    if objective.wants("statistic", options):
        assert objective.statistic is not None
        step = replace(step, group_mean=objective.statistic(step, **options))
    objective.function(step, **options)


def log_ratio(step: ForwardStep) -> Tensor:
    """Return log rho = E - E_old, in float64, with the gradient: (B,)."""
    return step.log_p.double() - step.old_log_p.double()


def ratio_metrics(log_rho: Tensor) -> dict[str, Tensor]:
    """Return the mean of rho and the largest |log rho|, detached and 0-dim."""
    found = log_rho.detach()
    return {"ratio_mean": found.exp().mean(), "log_ratio_max": found.abs().max()}


# Estimators of log p(x0), each a function (step, output) -> (B,) ----------------------------------------------------

Estimator = Callable[[ForwardStep, Tensor], Tensor]
ESTIMATORS: dict[str, Estimator] = {}


def estimator(name: str) -> Callable[[Estimator], Estimator]:
    """Register an estimator in ``ESTIMATORS``."""

    def add(function: Estimator) -> Estimator:
        ESTIMATORS[name] = function
        return function

    return add


def _scale(step: ForwardStep, like: Tensor) -> Tensor:
    return expand(step.x0_scale, like)


@estimator("uniform")
def uniform(step: ForwardStep, output: Tensor) -> Tensor:
    """-|v - u|^2: the model's own training loss."""
    return -mean_square(step.error(output))


@estimator("t")
def linear(step: ForwardStep, output: Tensor) -> Tensor:
    """-|c| |v - u|^2, for flow models -t |v - u|^2."""
    error = mean_square(step.error(output))
    return -_scale(step, error) * error


@estimator("t2")
def squared(step: ForwardStep, output: Tensor) -> Tensor:
    """-|x0_hat - x0|^2, for flow models -t^2 |v - u|^2."""
    return -mean_square(step.x0_error(output))


@estimator("adaptive")
def adaptive(step: ForwardStep, output: Tensor) -> Tensor:
    """-|x0_hat - x0|^2 / w, w = sg(mean |x0_hat - x0|): NFT's weight, as an estimator."""
    error = step.x0_error(output)
    return -mean_square(error) / mean_abs(error)


@estimator("adaptive_output")
def adaptive_output(step: ForwardStep, output: Tensor) -> Tensor:
    """-|v - u|^2 / sg(mean |v - u|): CRD's weight, in units of the output."""
    error = step.error(output)
    return -mean_square(error) / mean_abs(error)


@estimator("exact")
def exact(step: ForwardStep, output: Tensor) -> Tensor:
    """The ELBO's weight under times uniform in t = sigma / (alpha + sigma): -(1 - t) / t |v - u|^2 for flow models.

    The weight is alpha (alpha + sigma)^2 / (det^2 sigma) with det of ``parameterization``; 1e-3 is added to sigma.
    """
    level, error = step.level, mean_square(step.error(output))
    part = mixture(step.parameterization, level)
    det = level.alpha * part.noise - level.sigma * part.x0
    total = level.alpha + level.sigma
    return -expand(level.alpha * total.square() / (det.square() * (level.sigma + 1e-3 * total)), error) * error


@estimator("huber")
def huber(step: ForwardStep, output: Tensor) -> Tensor:
    """-|c| (sqrt(l + 1e-10) - 1e-5) with l = |v - u|^2: AWM, arXiv 2509.25050."""
    error = mean_square(step.error(output))
    return -_scale(step, error) * ((error + 1e-10).sqrt() - 1e-5)


@estimator("ghuber")
def ghuber(step: ForwardStep, output: Tensor) -> Tensor:
    """-|c| ((l + 1e-10)^p - 1e-10^p) / p with l = |v - u|^2 and p = 1/4: the one of AWM's published settings."""
    error, p = mean_square(step.error(output)), 0.25
    return -_scale(step, error) * ((error + 1e-10).pow(p) - 1e-10**p) / p
