import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.diffusion.schedule import flow_level_at, flow_levels, shift_sigmas, vp_level_at, vp_levels
from tests.diffusion.grids import flow_match_euler_sigmas, uniform_sigmas


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 28])
def test_the_grid_is_that_of_diffusers(shift, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    levels = flow_levels(flow_match_euler_sigmas(num_steps, shift))
    torch.testing.assert_close(levels.sigma, scheduler.sigmas.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(levels.time[:-1], scheduler.timesteps.double(), rtol=1e-6, atol=1e-4)


def test_given_sigmas_with_a_dynamic_shift_are_those_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=uniform_sigmas(6)[:-1].tolist(), mu=1.15)
    ours = shift_sigmas(uniform_sigmas(6), float(torch.tensor(1.15).double().exp()))
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=1e-6, atol=1e-7)


def test_shift_keeps_the_ends_and_inverts():
    sigmas = uniform_sigmas(7)
    shifted = shift_sigmas(sigmas, 3.0)
    assert shifted[0] == 1
    assert shifted[-1] == 0
    assert torch.all(shifted[1:-1] > sigmas[1:-1])
    torch.testing.assert_close(shift_sigmas(shifted, 1 / 3), sigmas, rtol=1e-14, atol=0)


def test_flow_levels_keep_their_definition():
    levels = flow_levels([1.0, 0.4, 0.0], time_scale=10.0)
    assert levels.is_flow
    assert levels.time.tolist() == [10.0, 4.0, 0.0]
    assert len(uniform_sigmas(5)) == 6
    assert all(member.dtype == torch.float64 for member in (levels.alpha, levels.sigma, levels.time))


@pytest.mark.parametrize("sigmas", [[1.0, 0.5], [0.5, 0.5, 0.0], [1.2, 0.5, 0.0], [0.0], [0.2, 0.8, 0.0]])
def test_a_sequence_that_is_no_schedule_is_refused(sigmas):
    with pytest.raises(ValueError, match="decrease strictly"):
        flow_levels(sigmas)


def test_a_shift_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="positive"):
        shift_sigmas([1.0, 0.0], 0.0)


def ddim(set_alpha_to_one):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=set_alpha_to_one,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    return scheduler


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_vp_levels_are_those_of_ddim(set_alpha_to_one):
    scheduler = ddim(set_alpha_to_one)
    levels = vp_levels(scheduler.alphas_cumprod, scheduler.timesteps, float(scheduler.final_alpha_cumprod))
    assert not levels.is_flow
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(21, dtype=torch.float64))
    for i, t in enumerate(scheduler.timesteps.tolist()):
        variance = scheduler._get_variance(t, t - 50)
        ratio = levels.alpha[i] * levels.sigma[i + 1] / (levels.alpha[i + 1] * levels.sigma[i])
        expected = levels.sigma[i + 1] ** 2 * (1 - ratio**2)
        torch.testing.assert_close(expected, variance.double(), rtol=2e-5, atol=1e-7)
        assert levels.time[i] == t
    assert (levels.sigma[-1] == 0) == set_alpha_to_one


@pytest.mark.parametrize("timesteps", [[1, 5], [1000, 1], [5, -1]])
def test_timesteps_off_the_grid_are_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps must decrease"):
        vp_levels(torch.linspace(0.999, 0.01, 1000), timesteps)


def test_levels_of_flow_training_are_times_over_their_scale():
    level = flow_level_at(torch.tensor([0.0, 12.5, 999.9, 1000.0]))
    assert level.is_flow
    torch.testing.assert_close(
        level.sigma, torch.tensor([0, 0.0125, 0.9999, 1], dtype=torch.float64), rtol=1e-7, atol=0
    )
    assert flow_level_at(torch.tensor([3]), time_scale=4.0).sigma.tolist() == [0.75]


def test_levels_of_vp_training_are_whole_timesteps_rounded_down():
    abar = torch.linspace(0.99, 0.01, 10)
    level = vp_level_at(abar, torch.tensor([0.0, 0.99, 3.0, 9.2, 10.0]))
    assert level.time.tolist() == [0, 0, 3, 9, 9]
    torch.testing.assert_close(level.alpha.square(), abar[[0, 0, 3, 9, 9]].double())
    torch.testing.assert_close(level.alpha.square() + level.sigma.square(), torch.ones(5, dtype=torch.float64))


def test_uniform_draws_are_uniform_over_timesteps():
    draws = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) * 10
    times = vp_level_at(torch.linspace(0.99, 0.01, 10), draws).time
    shares = times.long().bincount(minlength=10) / len(times)
    assert (shares - 0.1).abs().max() < 0.006  # four standard deviations


@pytest.mark.parametrize("time", [-0.1, 10.5, float("nan")])
def test_times_outside_the_schedule_are_named(time):
    for at in (lambda t: flow_level_at(t, 10.0), lambda t: vp_level_at(torch.linspace(0.99, 0.01, 10), t)):
        with pytest.raises(ValueError, match=rf"times must lie within 0\.\.10, got \[{time:.1f}\]"):
            at(torch.tensor([1.0, time], dtype=torch.float64))
