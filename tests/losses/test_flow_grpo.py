import math

import pytest
import torch

from diffalign.diffusion.schedule import flow_levels
from diffalign.diffusion.steps import step, transition
from diffalign.losses.flow_grpo import clip_range_per_dimension, clipped_surrogate, gaussian_kl, published_kl
from tests.diffusion.grids import uniform_sigmas

LEVELS = flow_levels(uniform_sigmas(5))


def draw(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_on_policy_gradient_is_minus_advantage_times_that_of_log_prob():
    output = draw(1, 4, 2, 3, 3).requires_grad_()
    arguments = LEVELS[1], LEVELS[2]
    options = {"parameterization": "flow", "noise_level": 0.7, "noise": draw(2, 4, 2, 3, 3)}
    log_prob = step("flow_sde", draw(0, 4, 2, 3, 3), output, *arguments, **options).log_prob
    advantage = draw(3, 4)
    (expected,) = torch.autograd.grad((-advantage * log_prob).sum(), output, retain_graph=True)
    loss, metrics = clipped_surrogate(log_prob, log_prob, advantage, 1e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=0)
    assert expected.abs().max() > 0
    torch.testing.assert_close(loss.detach(), -advantage)
    assert metrics["ratio_mean"] == 1
    assert metrics["log_ratio_max"] == metrics["clip_share"] == metrics["approx_kl"] == 0


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "clipped"),
    [
        (2.0, 0.5, True),
        (2.0, -0.5, False),
        (-2.0, 0.5, False),
        (-2.0, -0.5, True),
        (2.0, 0.1, False),
        (-2.0, -0.1, False),
    ],
)
def test_the_clip_acts_on_the_right_side(advantage, log_ratio, clipped):
    new = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    loss, metrics = clipped_surrogate(new, torch.zeros_like(new), torch.tensor([advantage]).double(), 0.2)
    loss.sum().backward()
    ratio = math.exp(log_ratio)
    assert float(metrics["clip_share"]) == clipped
    assert float(new.grad) == pytest.approx(0.0 if clipped else -advantage * ratio)
    assert float(loss.detach()) == pytest.approx(-advantage * (1 + math.copysign(0.2, log_ratio) if clipped else ratio))


def test_metrics():
    log_ratio = torch.tensor([0.3, -0.1, 0.02, -0.4])
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0], requires_grad=True)
    loss, metrics = clipped_surrogate(log_ratio.requires_grad_(), torch.zeros(4), advantage, 0.05)
    assert loss.shape == (4,)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert float(metrics["clip_share"]) == 0.5
    assert float(metrics["log_ratio_max"]) == pytest.approx(0.4)
    assert float(metrics["ratio_mean"]) == pytest.approx(sum(map(math.exp, (0.3, -0.1, 0.02, -0.4))) / 4)
    assert float(metrics["approx_kl"]) == pytest.approx((0.09 + 0.01 + 0.0004 + 0.16) / 8)
    loss.sum().backward()
    assert advantage.grad is None


def test_a_flat_group_has_no_gradient():
    new = draw(0, 4).requires_grad_()
    clipped_surrogate(new, draw(1, 4), torch.zeros(4), 1e-4)[0].sum().backward()
    assert torch.equal(new.grad, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("log_ratio", [-1e4, -200.0, 200.0, 1e4])
@pytest.mark.parametrize("advantage", [-5.0, 0.0, 5.0])
def test_a_diverged_sample_gives_no_nan(log_ratio, advantage):
    new = torch.tensor([log_ratio], requires_grad=True)
    loss, metrics = clipped_surrogate(new, torch.zeros(1), torch.tensor([advantage]), 1e-4)
    loss.sum().backward()
    for value in (loss, new.grad, *metrics.values()):
        assert value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_is_the_gaussian_one_per_dimension(dtype):
    mean, reference = draw(0, 3, 2, 4, 4), draw(1, 3, 2, 4, 4)
    std = torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64)
    scale = std.reshape(3, 1, 1, 1).expand_as(mean)
    normals = torch.distributions.Normal(mean, scale), torch.distributions.Normal(reference, scale)
    expected = torch.distributions.kl_divergence(*normals).mean((1, 2, 3))
    kl = gaussian_kl(mean.to(dtype), reference.to(dtype), std)
    assert kl.dtype == dtype
    torch.testing.assert_close(kl.double(), expected, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=0)
    for i in range(3):
        torch.testing.assert_close(gaussian_kl(mean, reference, std[i])[i], expected[i])


def test_kl_pulls_the_policy_and_not_the_reference():
    mean, reference = draw(0, 2, 8).requires_grad_(), draw(1, 2, 8).requires_grad_()
    gaussian_kl(mean, reference, torch.tensor(0.5).double()).sum().backward()
    assert reference.grad is None
    torch.testing.assert_close(mean.grad, (mean - reference).detach() / 0.25 / 8)


def test_published_kl_divides_by_the_diffusion():
    mean, reference = draw(0, 3, 2, 4), draw(1, 3, 2, 4)
    rows = torch.tensor([1, 2, 3])
    level, after = LEVELS[rows], LEVELS[rows + 1]
    s_squared = 0.49 * level.sigma / (1 - level.sigma)
    expected = (mean - reference).square().mean((1, 2)) / (2 * s_squared)
    std = transition("flow_sde", level, after, 0.7).std
    torch.testing.assert_close(published_kl(mean, reference, std, level, after), expected)
    one = published_kl(mean, reference, std[0], level[0], after[0])
    torch.testing.assert_close(one[0], expected[0])


@pytest.mark.parametrize("solver", ["cps", "dance_sde", "ddim"])
def test_published_kl_of_other_solvers_divides_by_the_steps_own_std(solver):
    """The released code's ``std_dev_t`` is sigma' sin(a pi / 2) under "cps", the whole deviation of the step."""
    mean, reference = draw(0, 3, 2, 4), draw(1, 3, 2, 4)
    level, after = LEVELS[torch.tensor([1, 2, 3])], LEVELS[torch.tensor([2, 3, 4])]
    std_dev_t = {
        "cps": after.sigma * math.sin(0.8 * math.pi / 2),
        "dance_sde": 0.8 * (level.sigma - after.sigma).sqrt(),
        "ddim": transition("ddim", level, after, 0.8).std,
    }[solver]
    expected = (mean - reference).square().mean((1, 2)) / (2 * std_dev_t.square())
    std = transition(solver, level, after, 0.8).std
    torch.testing.assert_close(published_kl(mean, reference, std, level, after, solver), expected)


def test_a_clip_range_at_1024_pixels_is_resolved():
    """1 nat over 262,144 dimensions is 3.8e-6, of which float32 has 3 % steps at a ratio of 1."""
    clip = 1 / 262144
    log_ratio = torch.linspace(-2, 2, 41, dtype=torch.float64) * clip
    loss, metrics = clipped_surrogate(
        log_ratio - 1.4, torch.full((41,), -1.4, dtype=torch.float64), torch.ones(41), clip
    )
    expected = -log_ratio.exp().clamp(max=1 + clip)
    assert (loss - expected).abs().max() < 1e-3 * clip
    assert metrics["clip_share"] == pytest.approx((log_ratio.exp() > 1 + clip).double().mean().item())


def test_clip_range_units():
    assert clip_range_per_dimension(1e-4, "per_dim", 65536) == 1e-4
    assert clip_range_per_dimension(6.5536, "joint", 65536) == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="known: per_dim, joint"):
        clip_range_per_dimension(1.0, "nats", 10)
    with pytest.raises(ValueError, match="positive"):
        clip_range_per_dimension(0.0, "joint", 10)
