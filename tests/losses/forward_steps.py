"""Noised images and outputs of several weight sets for the forward objectives, in float64."""

import torch

from diffalign.diffusion.parameterization import add_noise, mixture, target
from diffalign.losses.forward import ForwardStep
from diffalign.structures import Level
from tests.losses.conftest import draw

SHAPE = (6, 3, 4, 4)
KINDS = ("flow", "epsilon", "v")


def levels(kind: str) -> Level:
    """Six levels; those of epsilon and v models are variance-preserving."""
    sigma = torch.tensor([0.15, 0.3, 0.5, 0.6, 0.8, 0.95], dtype=torch.float64)
    alpha = 1 - sigma if kind == "flow" else (1 - sigma.square()).sqrt()
    return Level(alpha, sigma, sigma * 1000)


def make_step(kind="flow", *, moved=0.1, lag=0.05, seed=0, **fields):
    """A policy that has moved from its lagged copy by ``moved``, which has moved from the reference by ``lag``."""
    level = levels(kind)
    x0, noise, reference = draw(seed, *SHAPE), draw(seed + 1, *SHAPE), draw(seed + 2, *SHAPE)
    u = target(kind, x0, noise, level)
    old = reference + lag * draw(seed + 3, *SHAPE)
    output = (old + moved * draw(seed + 4, *SHAPE)).requires_grad_()
    advantage = torch.tensor([1.5, -0.7, 0.2, -2.0, 0.0, 1.0], dtype=torch.float64)
    settings = {"parameterization": kind, "old": old, "reference": reference} | fields
    return ForwardStep(output, u, level, advantage, **settings)


def predicting(kind, x0_hat, seed=0):
    """Return the output for a prediction of x0, the target and the level, which are variance-preserving."""
    level = levels("epsilon")
    x0, noise = draw(seed, *SHAPE), draw(seed + 1, *SHAPE)
    x, part = add_noise(x0, noise, level), mixture(kind, level)
    det = level.alpha * part.noise - level.sigma * part.x0
    shape = (-1, 1, 1, 1)
    output = (part.noise.view(shape) * x - det.view(shape) * x0_hat) / level.sigma.view(shape)
    return output, target(kind, x0, noise, level), level


def gradient(loss, output):
    """The gradient of the sum of losses (B,) by the output."""
    (found,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
    return found


def same_as_finite_differences(loss, frozen, output):
    """Whether the gradient of ``loss`` (B,) is that of ``frozen(output)``, in which constants do not move."""
    found, size = gradient(loss, output), 1e-5
    for seed in range(3):
        way = draw(100 + seed, *output.shape)
        with torch.no_grad():
            slope = (frozen(output + size * way) - frozen(output - size * way)).sum() / (2 * size)
        torch.testing.assert_close((found * way).sum(), slope, rtol=1e-6, atol=1e-9)
    return True


def error(v, step):
    """Return |v - u|^2 per sample, and |x0_hat - x0|^2 and the mean of |x0_hat - x0|, for flow models."""
    e, t = v - step.target, step.level.sigma.view(-1, 1, 1, 1)
    return e.square().mean((1, 2, 3)), (t * e).square().mean((1, 2, 3)), (t * e).abs().mean((1, 2, 3))
