"""Each kind of step against its published form in float64 and against diffusers, and what it refuses."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.diffusion.parameterization import target, to_x0
from diffalign.diffusion.schedule import flow_levels, shift_sigmas, vp_levels
from diffalign.diffusion.steps import TRANSITIONS, step, transition
from tests.diffusion.grids import flow_match_euler_sigmas, uniform_sigmas

LEVELS = flow_levels(shift_sigmas(uniform_sigmas(8), 2.0))
SDE = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "ddim": 0.6}


def draw(seed, dtype=torch.float64, shape=(3, 2, 4, 4)):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_vp_levels():
    return vp_levels(torch.cos(torch.linspace(0.02, 1.55, 1000, dtype=torch.float64)) ** 2, list(range(999, 0, -111)))


def published_euler_sde(x, v, sigma, dt, s):
    """The mean in terms of the velocity, as Flow-GRPO writes it, and the std."""
    drift = v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return x * (1 + s**2 / (2 * sigma) * dt) + drift, s * math.sqrt(-dt)


def published_flow_sde(x, v, sigma, sigma_next, a):
    s = a * math.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))
    return published_euler_sde(x, v, sigma, sigma_next - sigma, s)


def published_dance_sde(x, v, sigma, sigma_next, eta):
    score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
    dt = sigma_next - sigma
    return x + v * dt - 0.5 * eta**2 * score * dt, eta * math.sqrt(-dt)


def published_cps(x, v, sigma, sigma_next, a):
    std = sigma_next * math.sin(a * math.pi / 2)
    return (1 - sigma_next) * (x - sigma * v) + math.sqrt(sigma_next**2 - std**2) * (x + (1 - sigma) * v), std


def published_ddim(x, v, s, t, eta):
    rho = 0.0 if t == 0 else t * eta * math.sqrt(1 - t**2 * (1 - s) ** 2 / (s**2 * (1 - t) ** 2))
    return (1 - t) * (x - s * v) + math.sqrt(t**2 - rho**2) * (x + (1 - s) * v), rho


PUBLISHED = {
    "flow_sde": published_flow_sde,
    "dance_sde": published_dance_sde,
    "cps": published_cps,
    "ddim": published_ddim,
}


@pytest.mark.parametrize("kind", SDE)
@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_mean_and_std_are_the_published_ones(kind, index, dtype, tolerance):
    x, v = draw(0, dtype), draw(1, dtype)
    level, after = LEVELS[index], LEVELS[index + 1]
    mean, std = PUBLISHED[kind](x.double(), v.double(), float(level.sigma), float(after.sigma), SDE[kind])
    result = step(kind, x, v, level, after, parameterization="flow", noise_level=SDE[kind], noise=draw(2, dtype))
    assert result.mean.dtype == dtype
    assert float(result.std) == pytest.approx(std, rel=1e-12, abs=1e-15)
    assert (result.mean.double() - mean).norm() / mean.norm() < tolerance
    expected = mean + std * draw(2, dtype).double()
    assert (result.x_next.double() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_that_of_diffusers(eta):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(10)
    levels = vp_levels(scheduler.alphas_cumprod, scheduler.timesteps)
    x, output, noise = draw(0, torch.float32), draw(1, torch.float32), draw(2, torch.float32)
    for index, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
        ours = step(
            "ddim",
            x,
            output,
            levels[index],
            levels[index + 1],
            parameterization="epsilon",
            noise_level=eta,
            noise=noise,
        )
        torch.testing.assert_close(ours.x_next, theirs, rtol=1e-5, atol=2e-5)


def test_ancestral_sampling_is_that_of_diffusers():
    """ "ddim" with eta 1, which ReFL's authors' script samples by: DDPMScheduler, whose variance is the posterior's."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
                              timestep_spacing="leading")  # fmt: skip
    scheduler.set_timesteps(40)
    levels = vp_levels(scheduler.alphas_cumprod, scheduler.timesteps)
    x, output = draw(0, torch.float32), draw(1, torch.float32)
    for index, t in enumerate(scheduler.timesteps[:-1]):
        generator = torch.Generator().manual_seed(index)
        theirs = scheduler.step(output, t, x, generator=generator).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
        ours = step("ddim", x, output, levels[index], levels[index + 1],
                    parameterization="epsilon", noise_level=1.0, noise=noise)  # fmt: skip
        torch.testing.assert_close(ours.x_next, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_ode_is_that_of_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    levels = flow_levels(flow_match_euler_sigmas(8, shift))
    ours = theirs = draw(0, torch.float32)
    for index, t in enumerate(scheduler.timesteps):
        output = draw(index + 1, torch.float32)
        theirs = scheduler.step(output, t, theirs).prev_sample
        ours = step("ode", ours, output, levels[index], levels[index + 1], parameterization="flow").x_next
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_flow_ode_is_euler():
    x, v = draw(0), draw(1)
    for index in range(8):
        result = step("ode", x, v, LEVELS[index], LEVELS[index + 1], parameterization="flow")
        expected = x + (LEVELS.sigma[index + 1] - LEVELS.sigma[index]) * v
        torch.testing.assert_close(result.mean, expected, rtol=0, atol=1e-15)
        assert result.log_prob is None
        assert result.std == 0


@pytest.mark.parametrize("kind", SDE)
@pytest.mark.parametrize("make", [lambda: LEVELS, make_vp_levels])
def test_noise_level_zero_is_the_ode(kind, make):
    levels = make()
    if kind in ("flow_sde", "dance_sde") and not levels.is_flow:
        with pytest.raises(ValueError, match="use 'ddim'"):
            transition(kind, levels[0], levels[1], 0.5)
        return
    for index in range(len(levels) - 1):
        arguments = draw(0), draw(1), levels[index], levels[index + 1]
        ode, still = (step(name, *arguments, parameterization="v") for name in ("ode", kind))
        torch.testing.assert_close(still.mean, ode.mean, rtol=0, atol=1e-14)
        assert still.log_prob is None


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("a", [0.3, 0.7, 1.2])
def test_the_first_flow_sde_std_is_the_noise_level(num_steps, shift, a):
    levels = flow_levels(shift_sigmas(uniform_sigmas(num_steps), shift))
    assert float(transition("flow_sde", levels[0], levels[1], a).std) == pytest.approx(a, rel=1e-12)


def test_published_noise_of_sd3_in_ten_steps():
    levels = flow_levels(flow_match_euler_sigmas(10, 3.0))
    stds = transition("flow_sde", levels[:-1], levels[1:], 0.7).std
    expected = torch.tensor([0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.006])
    torch.testing.assert_close(stds.float(), expected, rtol=0, atol=6e-4)


@pytest.mark.parametrize("kind", SDE)
@pytest.mark.parametrize("parameterization", ["v", "flow"])
def test_every_parameterization_gives_the_same_step(kind, parameterization):
    x0, noise, level, after = draw(0), draw(1), LEVELS[3], LEVELS[4]
    x = level.alpha * x0 + level.sigma * noise
    results = [
        step(kind, x, target(name, x0, noise, level), level, after,
             parameterization=name, noise_level=SDE[kind], noise=draw(2))
        for name in ("epsilon", parameterization)
    ]  # fmt: skip
    torch.testing.assert_close(results[0].x_next, results[1].x_next, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_the_ends_of_the_schedule_are_finite(kind):
    x, v = draw(0), draw(1)
    for index in (0, 7):
        options = {"parameterization": "flow", "noise_level": SDE.get(kind, 0.0), "noise": draw(2)}
        result = step(kind, x, v, LEVELS[index], LEVELS[index + 1], **options)
        assert result.x_next.isfinite().all()
        assert result.log_prob is None or result.log_prob.isfinite().all()
    if kind in ("ode", "cps", "ddim"):
        assert result.log_prob is None
        torch.testing.assert_close(result.x_next, to_x0("flow", x, v, LEVELS[7]), rtol=0, atol=1e-15)


def test_a_step_without_noise_needs_none_and_keeps_a_stored_sample():
    arguments = draw(0), draw(1), LEVELS[7], LEVELS[8]
    fresh = step("cps", *arguments, parameterization="flow", noise_level=0.8)
    stored = step("cps", *arguments, parameterization="flow", noise_level=0.8, x_next=draw(3))
    assert torch.equal(fresh.x_next, fresh.mean)
    assert torch.equal(stored.x_next, draw(3))
    assert stored.log_prob is None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("flow_sde", {"noise_level": 0.7}, "fresh noise"),
        ("flow_sde", {"noise_level": 0.7, "noise": draw(2), "x_next": draw(3)}, "not both"),
        ("flow_sde", {"noise_level": -0.1, "noise": draw(2)}, "lies in"),
        ("cps", {"noise_level": 1.1, "noise": draw(2)}, "lies in"),
        ("ode", {"noise_level": 0.7}, "lies in"),
        ("euler", {}, "known: ode, flow_sde"),
    ],
)
def test_refusals(kind, options, message):
    with pytest.raises(ValueError, match=message):
        step(kind, draw(0), draw(1), LEVELS[2], LEVELS[3], parameterization="flow", **options)


def test_a_batch_with_and_without_density_is_refused():
    rows = torch.tensor([0, 3, 7])
    with pytest.raises(ValueError, match="some samples"):
        step("cps", draw(0), draw(1), LEVELS[rows], LEVELS[rows + 1],
             parameterization="flow", noise_level=0.8, noise=draw(2))  # fmt: skip
