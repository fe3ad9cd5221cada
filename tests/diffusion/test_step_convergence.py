"""Where steps lead: Gaussian data with the exact denoiser, solved on paper, and the multistep solver."""

import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffalign.diffusion.parameterization import to_x0
from diffalign.diffusion.schedule import flow_levels, shift_sigmas
from diffalign.diffusion.steps import dpmpp_2m, step
from diffalign.structures import Level
from tests.diffusion.grids import uniform_sigmas

LEVELS = flow_levels(shift_sigmas(uniform_sigmas(8), 2.0))


def draw(seed, dtype=torch.float64, shape=(3, 2, 4, 4)):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Gaussian data N(0, D^2): the exact denoiser is linear, so the variance of the rollout follows a recursion.
D = 0.5


def exact_output(x, level):
    """The posterior mean of noise - x0."""
    marginal = level.alpha**2 * D**2 + level.sigma**2
    return x * (level.sigma - level.alpha * D**2) / marginal


def final_variance(kind, noise_level, num_steps, first=1.0):
    levels = flow_levels(uniform_sigmas(num_steps) * first)
    variance = float(levels.alpha[0] ** 2 * D**2 + levels.sigma[0] ** 2)
    x = torch.ones(1, 1, dtype=torch.float64)
    for index in range(num_steps):
        level, after = levels[index], levels[index + 1]
        result = step(
            kind, x, exact_output(x, level), level, after, parameterization="flow", noise_level=noise_level, noise=x
        )
        variance = float(result.mean) ** 2 * variance + float(result.std) ** 2
    return variance


@pytest.mark.parametrize(
    ("kind", "noise_level"),
    [("ode", 0.0), ("flow_sde", 0.7), ("flow_sde", 1.0), ("dance_sde", 0.3), ("ddim", 0.5), ("ddim", 1.0)],
)
def test_gaussian_data_is_reached_at_first_order(kind, noise_level):
    # From sigma 0.9: at 1 the flow_sde diffusion is singular, which has a test of its own.
    errors = [final_variance(kind, noise_level, n, first=0.9) / D**2 - 1 for n in (80, 160, 320)]
    assert abs(errors[-1]) < 0.03
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.25)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.15)


def test_flow_sde_from_pure_noise_reaches_gaussian_data():
    # The first step adds a^4 / 4 of variance for any number of steps; it decays as N^(-a^2), slower than first order.
    assert final_variance("flow_sde", 0.7, 160) == pytest.approx(D**2, rel=0.005)
    assert final_variance("flow_sde", 1.0, 320) == pytest.approx(D**2, rel=0.001)


def test_cps_follows_its_own_recursion():
    variance, sigmas = 1.0, uniform_sigmas(320).tolist()
    for s, t in itertools.pairwise(sigmas):
        marginal = (1 - s) ** 2 * D**2 + s**2
        x0, noise = (1 - s) * D**2 / marginal, s / marginal
        std = t * math.sin(0.4 * math.pi)
        variance = ((1 - t) * x0 + math.sqrt(t**2 - std**2) * noise) ** 2 * variance + std**2
    assert final_variance("cps", 0.8, 320) == pytest.approx(variance, rel=1e-12)
    assert variance < 0.7 * D**2


def solve(solver, sigmas):
    """The ODE of Gaussian data along ``sigmas``; its solution keeps x / sqrt(alpha^2 D^2 + sigma^2)."""
    levels = Level(1 - sigmas, sigmas, sigmas)
    x, previous = torch.ones(1, 1, dtype=torch.float64), {}
    for index in range(len(sigmas) - 1):
        arguments = x, exact_output(x, levels[index]), levels[index], levels[index + 1]
        if solver == "ode":
            x = step("ode", *arguments, parameterization="flow").x_next
            continue
        result = dpmpp_2m(*arguments, parameterization="flow", **previous)
        previous = {"previous_x0": to_x0("flow", *arguments[:3]), "previous_level": levels[index]}
        assert result.log_prob is None
        x = result.x_next
    return float(x)


@pytest.mark.parametrize(("solver", "order"), [("ode", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(solver, order):
    scale = [math.sqrt((1 - s) ** 2 * D**2 + s**2) for s in (0.95, 0.05)]
    grids = [torch.linspace(0.95, 0.05, n + 1, dtype=torch.float64) for n in (80, 160, 320)]
    errors = [abs(solve(solver, grid) - scale[1] / scale[0]) for grid in grids]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_dpmpp_2m_is_that_of_diffusers():
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    scheduler.set_timesteps(8)
    levels = flow_levels(scheduler.sigmas)
    ours = theirs = draw(0, torch.float32)
    previous = {}
    for index, t in enumerate(scheduler.timesteps):
        output = draw(index + 1, torch.float32)
        theirs = scheduler.step(output, t, theirs).prev_sample
        x = ours
        ours = dpmpp_2m(x, output, levels[index], levels[index + 1], parameterization="flow", **previous).x_next
        previous = {"previous_x0": to_x0("flow", x, output, levels[index]), "previous_level": levels[index]}
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("previous", "index"), [(0, 1), (6, 7)])
def test_dpmpp_2m_is_first_order_next_to_the_ends(previous, index):
    arguments = draw(0), draw(1), LEVELS[index], LEVELS[index + 1]
    ode = step("ode", *arguments, parameterization="flow")
    result = dpmpp_2m(*arguments, parameterization="flow", previous_x0=draw(2), previous_level=LEVELS[previous])
    assert torch.equal(result.mean, ode.mean)


def test_dpmpp_2m_takes_a_level_per_sample():
    rows, x, v, before = torch.tensor([1, 4, 7]), draw(0), draw(1), draw(2)
    together = dpmpp_2m(
        x, v, LEVELS[rows], LEVELS[rows + 1],
        parameterization="flow", previous_x0=before, previous_level=LEVELS[rows - 1],
    )  # fmt: skip
    for i, row in enumerate(rows.tolist()):
        one = slice(i, i + 1)
        alone = dpmpp_2m(
            x[one], v[one], LEVELS[row], LEVELS[row + 1],
            parameterization="flow", previous_x0=before[one], previous_level=LEVELS[row - 1],
        )  # fmt: skip
        assert torch.equal(together.x_next[one], alone.x_next)


def test_dpmpp_2m_refuses_half_a_history():
    with pytest.raises(ValueError, match="together"):
        dpmpp_2m(draw(0), draw(1), LEVELS[2], LEVELS[3], parameterization="flow", previous_x0=draw(2))
