"""The log-probability of a step: its value, its replay, and a level per sample."""

import math

import pytest
import torch

from diffalign.diffusion.schedule import flow_levels, shift_sigmas
from diffalign.diffusion.steps import log_prob, step
from tests.diffusion.grids import flow_match_euler_sigmas, uniform_sigmas

LEVELS = flow_levels(shift_sigmas(uniform_sigmas(8), 2.0))
SDE = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "ddim": 0.6}
INTERIOR = range(7)  # every step but the last, where cps and ddim draw nothing


def draw(seed, dtype=torch.float64, shape=(3, 2, 4, 4)):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", SDE)
def test_log_prob_is_the_gaussian_one_of_the_stored_sample(kind, dtype):
    for index in INTERIOR:
        x, v, noise = draw(0, dtype), draw(1, dtype), draw(2)
        result = step(
            kind, x, v, LEVELS[index], LEVELS[index + 1], parameterization="flow", noise_level=SDE[kind], noise=noise
        )
        assert result.x_next.dtype == dtype
        assert result.log_prob.dtype == torch.float64
        normal = torch.distributions.Normal(result.mean.double(), result.std)
        expected = normal.log_prob(result.x_next.double()).mean((1, 2, 3))
        tolerance = 1e-13 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(result.log_prob.double(), expected, rtol=tolerance, atol=tolerance)


def test_rounding_changes_the_log_prob_that_is_reported():
    x, v, noise = draw(0, torch.bfloat16), draw(1, torch.bfloat16), draw(2, torch.float32)
    result = step("dance_sde", x, v, LEVELS[6], LEVELS[7], parameterization="flow", noise_level=0.3, noise=noise)
    unrounded = log_prob(result.mean + result.std * noise, result.mean, result.std)
    assert (result.log_prob - unrounded).abs().max() > 1e-5


def test_log_prob_at_the_mode():
    mean, std = draw(0), torch.tensor(0.37, dtype=torch.float64)
    expected = -math.log(0.37) - math.log(2 * math.pi) / 2
    torch.testing.assert_close(log_prob(mean, mean, std), torch.full((3,), expected, dtype=torch.float64))


def test_log_prob_widens_and_differentiates_the_mean_only():
    mean = draw(0, torch.float32).requires_grad_()
    x_next, std = draw(1, torch.float32).requires_grad_(), torch.tensor(0.5, dtype=torch.float64)
    log_prob(x_next, mean, std).sum().backward()
    assert x_next.grad is None
    torch.testing.assert_close(mean.grad, ((x_next - mean) / 0.25 / 32).detach())
    assert log_prob(x_next.bfloat16(), mean.bfloat16(), std).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SDE)
def test_replay_is_bit_equal(kind, dtype):
    for index in INTERIOR:
        arguments = draw(0, dtype), draw(1, dtype), LEVELS[index], LEVELS[index + 1]
        options = {"parameterization": "flow", "noise_level": SDE[kind]}
        rollout = step(kind, *arguments, noise=draw(2, torch.float32), **options)
        replay = step(kind, *arguments, x_next=rollout.x_next.clone(), **options)
        assert torch.equal(rollout.log_prob, replay.log_prob)
        assert torch.equal(rollout.x_next, replay.x_next)


@pytest.mark.parametrize("kind", [*SDE, "ode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_levels_equals_single_steps_bit_for_bit(kind, dtype):
    rows = torch.tensor([0, 3, 6])
    x, v, noise = draw(0, dtype), draw(1, dtype), draw(2, torch.float32)
    options = {"parameterization": "flow", "noise_level": SDE.get(kind, 0.0)}
    together = step(kind, x, v, LEVELS[rows], LEVELS[rows + 1], noise=noise, **options)
    for i, row in enumerate(rows.tolist()):
        one = slice(i, i + 1)
        alone = step(kind, x[one], v[one], LEVELS[row], LEVELS[row + 1], noise=noise[one], **options)
        assert torch.equal(together.x_next[one], alone.x_next)
        assert together.std[i] == alone.std
        if kind != "ode":
            assert together.log_prob.dtype == torch.float64
            assert torch.equal(together.log_prob[one], alone.log_prob)


@pytest.mark.parametrize(
    ("index", "kind"), [(0, "flow_sde"), (8, "flow_sde"), (4, "cps"), (4, "dance_sde"), (4, "ddim")]
)
def test_differences_of_log_probs_keep_their_digits_at_1024_pixels(index, kind):
    """The on-policy check allows a tenth of the clip range, 1 nat over the latent's 262,144 dimensions: 3.8e-7."""
    levels, shape = flow_levels(flow_match_euler_sigmas(10, 3.0)), (2, 16, 128, 128)
    x, v, noise, change = (draw(seed, torch.float32, shape) for seed in range(4))
    options = {"parameterization": "flow", "noise_level": SDE[kind]}
    old = step(kind, x, v, levels[index], levels[index + 1], noise=noise, **options)
    for size in (1e-4, 1e-2):
        new = step(kind, x, v + size * change, levels[index], levels[index + 1], x_next=old.x_next, **options)
        normals = (torch.distributions.Normal(r.mean.double(), r.std) for r in (new, old))
        exact = torch.sub(*(normal.log_prob(old.x_next.double()).mean((1, 2, 3)) for normal in normals))
        rounding = (new.log_prob - old.log_prob - exact).abs().max().item()
        assert exact.abs().max() > 100 * rounding or size == 1e-4
        assert 100 * rounding < 0.1 / old.x_next[0].numel()
