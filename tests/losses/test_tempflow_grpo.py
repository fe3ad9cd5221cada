import pytest
import torch

from diffalign.diffusion.schedule import flow_levels
from diffalign.diffusion.steps import transition
from diffalign.losses.tempflow_grpo import noise_aware_weights
from tests.diffusion.grids import flow_match_euler_sigmas

LEVELS = flow_levels(flow_match_euler_sigmas(10, 3.0))


@pytest.mark.parametrize(("kind", "noise_level"), [("flow_sde", 0.7), ("flow_sde", 1.2), ("cps", 0.8)])
def test_the_mean_weight_is_one_and_weights_follow_the_noise(kind, noise_level):
    stds = transition(kind, LEVELS[:-2], LEVELS[1:-1], noise_level).std
    weights = noise_aware_weights(stds)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-14)
    torch.testing.assert_close(weights[1:] / weights[:-1], stds[1:] / stds[:-1])


def test_the_published_factor_is_that_of_sd3_in_ten_steps():
    stds = transition("flow_sde", LEVELS[:-2], LEVELS[1:-1], 0.7).std
    torch.testing.assert_close(noise_aware_weights(stds), 2.25 * stds, rtol=2e-3, atol=0)


@pytest.mark.parametrize("stds", [torch.tensor([0.5, 0.0]), torch.tensor([]), torch.tensor(0.5)])
def test_steps_without_noise_are_refused(stds):
    with pytest.raises(ValueError, match="positive"):
        noise_aware_weights(stds)
