import pytest
import torch

from diffalign.diffusion.schedule import flow_levels
from diffalign.diffusion.steps import log_prob, transition
from diffalign.losses.grpo_guard import grpo_guard, guarded_log_ratio
from tests.diffusion.grids import uniform_sigmas

LEVELS = flow_levels(uniform_sigmas(5))
SHAPE = (3, 2, 4, 4)


def draw(seed):
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def case(rows, shift=0.01):
    """A policy that moved from old_mean to mean, and a sample old_mean + std eps."""
    level, after = LEVELS[rows], LEVELS[rows + 1]
    std = transition("flow_sde", level, after, 0.7).std
    old_mean, eps = draw(0), draw(1)
    mean = (old_mean + shift * draw(2)).requires_grad_()
    x_next = old_mean + (std if std.ndim == 0 else std.reshape(3, 1, 1, 1)) * eps
    log_probs = log_prob(x_next, mean, std), log_prob(x_next, old_mean, std)
    return (*log_probs, mean, old_mean, std), eps, level, after


@pytest.mark.parametrize("rows", [2, torch.tensor([1, 2, 3])])
def test_the_log_ratio_is_the_mean_of_noise_times_shift(rows):
    arguments, eps, _, _ = case(rows)
    expected = (eps * (arguments[2] - arguments[3])).mean((1, 2, 3))
    torch.testing.assert_close(guarded_log_ratio(*arguments), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rows", [2, torch.tensor([1, 2, 3])])
def test_the_loss_is_the_formula_per_sample(rows):
    arguments, _, level, after = case(rows)
    new, old, mean, old_mean, std = (tensor.detach() for tensor in arguments)
    advantage, clip = torch.tensor([1.5, -0.5, 0.8], dtype=torch.float64), 1e-4
    ratio = (std * ((new - old) + (mean - old_mean).square().mean((1, 2, 3)) / (2 * std**2))).exp()
    expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    loss, metrics = grpo_guard(*arguments, advantage, clip, level, after)
    torch.testing.assert_close(loss, expected / (level.sigma - after.sigma), rtol=1e-12, atol=0)
    assert loss.shape == (3,)
    torch.testing.assert_close(metrics["ratio_mean"], ratio.mean())


def test_samples_do_not_mix():
    arguments, *_ = case(2)
    changed = list(arguments)
    changed[2] = arguments[2] + torch.tensor([0.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    before, moved = guarded_log_ratio(*arguments), guarded_log_ratio(*changed)
    assert torch.equal(before[:2], moved[:2])
    assert before[2] != moved[2]


def test_on_policy_gradient():
    arguments, _, level, after = case(2, shift=0.0)
    new, _, mean, _, std = arguments
    advantage = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    factor = -advantage * std / (level.sigma - after.sigma)
    (expected,) = torch.autograd.grad((factor * new).sum(), mean, retain_graph=True)
    loss, _ = grpo_guard(*arguments, advantage, 2e-6, level, after)
    (gradient,) = torch.autograd.grad(loss.sum(), mean)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert gradient[:2].abs().min() > 0
    assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))


def test_the_ratio_keeps_its_digits_at_1024_pixels():
    """At a clip of 2e-6, which is 17 times the spacing of float32 at 1: a hundredth of it is resolved."""
    shape, std = (2, 16, 128, 128), torch.tensor(0.392, dtype=torch.float64)
    old_mean, eps, change = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3))
    x_next = old_mean + std * eps
    for size in (1e-5, 1e-3):
        mean = old_mean + size * change
        arguments = log_prob(x_next, mean, std), log_prob(x_next, old_mean, std), mean, old_mean, std
        drawn = (x_next.double() - old_mean.double()) / std
        exact = (drawn * (mean.double() - old_mean.double())).mean((1, 2, 3))
        assert (guarded_log_ratio(*arguments) - exact).abs().max() < 2e-8
        loss, metrics = grpo_guard(*arguments, torch.ones(2), 2e-6, LEVELS[2], LEVELS[3])
        expected = -torch.minimum(exact.exp(), exact.exp().clamp(max=1 + 2e-6)) / 0.2
        assert (loss - expected).abs().max() < 2e-8 / 0.2
        assert metrics["clip_share"] == (exact > 2e-6).double().mean()
