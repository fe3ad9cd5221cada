"""Trust regions of a ratio, Flow-DPPO and FDFO against closed forms, float64."""

import math

import pytest
import torch

from diffalign.diffusion.schedule import flow_levels
from diffalign.diffusion.steps import transition
from diffalign.losses.dppo import divergence_mask, divergence_penalty, dppo
from diffalign.losses.fdfo import fdfo, quadratic_surrogate
from diffalign.losses.flow_grpo import clipped_surrogate, flow_grpo
from diffalign.losses.grpo_guard import grpo_guard, guarded_surrogate
from diffalign.losses.policy import TRUST_REGIONS, PolicyStep
from diffalign.losses.registry import FORWARD_OBJECTIVES, POLICY_OBJECTIVES
from diffalign.losses.tree_rpo import best_path_error, reward_clip_range
from tests.losses.forward_steps import gradient, make_step

LEVELS = flow_levels(torch.linspace(1, 0, 5, dtype=torch.float64))
BOUND = 0.1


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def step_of(seed=0, moved=0.1, **changes):
    """Steps of three samples of 2 x 3 x 3 latents, whose policy has moved."""
    draw = torch.Generator().manual_seed(seed)
    old, noise, shift = (torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=draw) for _ in range(3))
    std = torch.tensor(0.4, dtype=torch.float64)
    x_next, mean = old + std * noise, (old + moved * shift).requires_grad_()

    def density(m):
        return -((x_next - m) ** 2).flatten(1).mean(1) / (2 * std**2)

    step = PolicyStep(density(mean), density(old), float64(1.3, -0.7, 0.0), mean, std, LEVELS[1], LEVELS[2], old)
    return PolicyStep(**(vars(step) | changes))


def test_a_clip_is_what_it_was():
    step = step_of()
    loss, metrics = flow_grpo(step, clip_range=BOUND)
    expected, figures = clipped_surrogate(step.log_prob, step.old_log_prob, step.advantage, BOUND)
    assert torch.equal(loss, expected)
    assert metrics == figures
    guarded, _ = guarded_surrogate(step, clip_range=BOUND)
    arguments = (step.log_prob, step.old_log_prob, step.mean, step.old_mean, step.std, step.advantage)
    assert torch.equal(guarded, grpo_guard(*arguments, BOUND, step.level, step.next_level)[0])


@pytest.mark.parametrize("region", sorted(TRUST_REGIONS))
@pytest.mark.parametrize("name", [name for name, entry in POLICY_OBJECTIVES.items() if entry.regions])
def test_on_policy_every_region_has_the_gradient_of_the_advantage(name, region):
    step = step_of(moved=0.0, trust_region=region)
    loss, metrics = POLICY_OBJECTIVES[name].function(step, clip_range=BOUND)
    plain, _ = POLICY_OBJECTIVES[name].function(step_of(moved=0.0), clip_range=BOUND)
    torch.testing.assert_close(loss, plain)
    (gradient,) = torch.autograd.grad(loss.sum(), step.mean)
    other = step_of(moved=0.0)
    (expected,) = torch.autograd.grad(POLICY_OBJECTIVES[name].function(other, clip_range=BOUND)[0].sum(), other.mean)
    torch.testing.assert_close(gradient, expected)
    assert expected[:2].any()
    assert metrics["clip_share"] == 0


@pytest.mark.parametrize("advantage", [1.3, -0.7])
def test_a_quadratic_penalty_is_least_where_the_clip_would_begin(advantage):
    end = math.log(1 + math.copysign(BOUND, advantage))
    log_ratio = float64(end, 0.0, 0.05).requires_grad_()
    loss, _ = quadratic_surrogate(log_ratio, float64(*[advantage] * 3), BOUND, None)
    ratio = log_ratio.detach().exp()
    torch.testing.assert_close(loss, -advantage * ratio + abs(advantage) / (2 * BOUND) * (ratio - 1) ** 2)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert gradient[0].abs() < 1e-12
    assert gradient[1].item() == pytest.approx(-advantage)


def test_steps_of_large_divergence_are_dropped_if_they_move_away():
    """Eq. 18: r > 1 and A > 0, or r < 1 and A < 0, at a divergence of at least tau."""
    log_ratio = float64(0.2, 0.2, -0.2, -0.2, 0.2, -0.2).requires_grad_()
    advantage = float64(1.0, -1.0, -1.0, 1.0, 1.0, -1.0)
    divergence = float64(0.1, 0.1, 0.1, 0.1, 0.09, 0.09)
    loss, metrics = divergence_mask(log_ratio, advantage, BOUND, divergence)
    dropped = torch.tensor([True, False, True, False, False, False])
    expected = torch.where(dropped, 0.0, -advantage * log_ratio.detach().exp())
    torch.testing.assert_close(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    torch.testing.assert_close(gradient, expected)
    assert metrics["clip_share"] == pytest.approx(2 / 6)
    assert metrics["divergence_max"] == pytest.approx(0.1)


def test_the_divergence_of_dppo_is_the_kl_of_the_steps():
    step = step_of()
    kl = ((step.mean - step.old_mean) ** 2).flatten(1).mean(1) / (2 * step.std**2)
    for bound in (kl.min().item() * 0.99, kl.max().item() * 1.01):
        ratio = (step.log_prob - step.old_log_prob).exp()
        away = (ratio - 1) * step.advantage > 0
        expected = torch.where(away & (kl >= bound), 0.0, -step.advantage * ratio)
        torch.testing.assert_close(dppo(step, clip_range=bound)[0], expected)
        region, _ = flow_grpo(step_of(trust_region="dppo"), clip_range=bound)
        torch.testing.assert_close(region, expected)


@pytest.mark.parametrize("advantage", [1.3, -0.7])
def test_a_kl_penalty_is_least_at_the_bound_in_one_dimension(advantage):
    """One dimension, moved by d std along its noise 1: log r = d - d^2 / 2, KL = d^2 / 2."""
    moves = torch.linspace(-0.5, 0.5, 2001, dtype=torch.float64)
    loss, _ = divergence_penalty(moves - moves**2 / 2, torch.full_like(moves, advantage), BOUND, moves**2 / 2)
    expected = -advantage * (moves - moves**2 / 2).exp() + abs(advantage) * moves**2 / (2 * BOUND)
    torch.testing.assert_close(loss, expected)
    assert moves[loss.argmin()].item() == pytest.approx(math.copysign(BOUND, advantage), rel=0.1)


def test_regions_that_need_means_say_so_and_unknown_ones_are_refused():
    for region in ("dppo", "kl"):
        with pytest.raises(ValueError, match=f"trust_region '{region}' compares means"):
            flow_grpo(step_of(trust_region=region, old_mean=None), clip_range=BOUND)
    with pytest.raises(ValueError, match="unknown trust region 'box'; known: "):
        flow_grpo(step_of(trust_region="box"), clip_range=BOUND)


# FDFO ---------------------------------------------------------------------------------------------------------------


def pair_step(velocity, old_velocity, direction, advantage):
    """A step of the churn of one image of a pair, with means that follow from velocities at x = 0."""
    level, end = LEVELS[1], LEVELS[2]
    move = transition("cps", level, end, 0.045)
    scale = (1 - level.sigma) * move.m_noise - level.sigma * move.m_x0
    zero = torch.zeros(len(velocity), dtype=torch.float64)
    return PolicyStep(zero, zero, advantage, scale * velocity, move.std, level, end, scale * old_velocity,
                      direction=direction, output_scale=scale)  # fmt: skip


@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_fdfo_is_its_paper_s_loss_and_gradient(moved):
    draw = torch.Generator().manual_seed(0)
    old, shift, delta = (torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=draw) for _ in range(3))
    velocity = (old + moved * shift).requires_grad_()
    advantage, c = float64(0.4, -0.4), 0.03
    loss, _ = fdfo(pair_step(velocity, old, delta, advantage), clip_range=c)

    def size(x):
        return (x**2).flatten(1).mean(1)

    g = delta / (size(delta) + 1e-6).view(-1, 1, 1, 1)
    reference = velocity.detach().clone().requires_grad_()
    rho = (-size(reference - (old - g)) + size(g)).exp()
    expected = -advantage * rho + advantage.abs() / (2 * c) * (rho - 1) ** 2
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(v.sum(), x)[0] for v, x in ((loss, velocity), (expected, reference))]
    torch.testing.assert_close(*gradients)
    if not moved:
        torch.testing.assert_close(gradients[0], 2 * advantage.view(-1, 1, 1, 1) * g / 4)
        # x0 = x - t v: descent moves the clean image towards the better one of the pair.
        towards = (LEVELS[1].sigma * gradients[0] * delta * advantage.view(-1, 1, 1, 1)).flatten(1).sum(1)
        assert (towards > 0).all()


def test_the_churn_of_fdfo_is_a_step_of_cps():
    """With r = s / (1 + gamma - gamma s), x' = (x + (r - t) v + eps r sqrt((1 + gamma)^2 - 1)) / (1 + gamma r)."""
    gamma = 0.0025
    for index in range(3):
        level, end = LEVELS[index], LEVELS[index + 1]
        move = transition("cps", level, end, 2 / math.pi * math.acos(1 / (1 + gamma)))
        s = end.sigma
        r = s / (1 + gamma - gamma * s)
        torch.testing.assert_close(move.m_x0, (1 - r) / (1 + gamma * r))
        torch.testing.assert_close(move.m_noise, r / (1 + gamma * r))
        torch.testing.assert_close(move.std, r * math.sqrt((1 + gamma) ** 2 - 1) / (1 + gamma * r))


def test_fdfo_wants_means_and_a_partner():
    step = pair_step(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), float64(1.0))
    for name in ("old_mean", "direction", "output_scale"):
        with pytest.raises(ValueError, match="fdfo compares means and two images"):
            fdfo(PolicyStep(**(vars(step) | {name: None})), clip_range=0.03)


# Dynamic-TreeRPO ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", sorted(TRUST_REGIONS))
def test_a_bound_per_sample_is_the_bound_of_each(region):
    step = step_of(trust_region=region)
    bounds = reward_clip_range(step.advantage, BOUND, 0.5)
    torch.testing.assert_close(bounds, BOUND * (1 + 0.5 * step.advantage.abs()))
    together, _ = flow_grpo(step, clip_range=bounds)
    alone = torch.stack([flow_grpo(step, clip_range=bound.item())[0][i] for i, bound in enumerate(bounds)])
    torch.testing.assert_close(together, alone)


def test_the_error_of_the_best_path_is_that_of_velocities():
    draw = torch.Generator().manual_seed(0)
    velocity, best = (torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=draw) for _ in range(2))
    scale = torch.tensor(-0.3, dtype=torch.float64)
    found = best_path_error(1.7 + scale * velocity, 1.7 + scale * best, scale)
    torch.testing.assert_close(found, ((velocity - best) ** 2).flatten(1).mean(1))


@pytest.mark.parametrize("region", sorted(TRUST_REGIONS))
@pytest.mark.parametrize("name", ["awm", "v_grpo"])
def test_clipped_forward_losses_take_every_region(name, region):
    """With |v - v_old|^2 as divergence, also in the gradient."""
    step = make_step(estimator="uniform", moved=0.3, trust_region=region)
    losses, metrics = FORWARD_OBJECTIVES[name].function(step, clip_range=BOUND)
    log_rho = step.log_p - step.old_log_p
    divergence = (step.output - step.old).square().mean((1, 2, 3))
    expected, _ = TRUST_REGIONS[region].function(log_rho, step.advantage, BOUND, divergence)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient(losses, step.output), gradient(expected, step.output))
    assert ("divergence" in metrics) == TRUST_REGIONS[region].means
