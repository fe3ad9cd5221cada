"""Losses of rewards that carry a gradient: values and slopes."""

import math

import pytest
import torch

from diffalign.losses.leapalign import gap_weights
from diffalign.losses.registry import REWARD_LOSSES, get_reward_loss
from diffalign.losses.srpo import relative_reward

REWARD = [0.5, 2.5, -1.0, 1.0, 2.0, 3.0]
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def value_and_slope(name, **options):
    reward = torch.tensor(REWARD, dtype=torch.float64, requires_grad=True)
    loss = REWARD_LOSSES[name].function(reward, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), reward)[0]


@pytest.mark.parametrize(
    ("name", "options", "value", "slope"),
    [
        ("hinge", {"threshold": 2.0}, [1.5, 0.0, 3.0, 1.0, 0.0, 0.0], [-1.0, 0.0, -1.0, -1.0, 0.0, 0.0]),
        ("negative", {}, [-r for r in REWARD], [-1.0] * 6),
        ("distance", {"threshold": 2.0}, [1.5, 0.5, 3.0, 1.0, 0.0, 1.0], [-1.0, 1.0, -1.0, -1.0, 0.0, 1.0]),
    ],
)
def test_losses_are_their_formulas(name, options, value, slope):
    found = value_and_slope(name, **options)
    torch.testing.assert_close(found[0], torch.tensor(value, dtype=torch.float64))
    torch.testing.assert_close(found[1], torch.tensor(slope, dtype=torch.float64))


def test_a_group_is_standardised_by_constants():
    loss, slope = value_and_slope("group", groups=GROUPS)
    reward = torch.tensor(REWARD, dtype=torch.float64).reshape(2, 3)
    std = reward.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(loss, (-(reward - reward.mean(1, keepdim=True)) / std).flatten())
    torch.testing.assert_close(slope, (-1 / std).expand(2, 3).flatten())


def test_a_reward_that_is_no_number_leaves_its_group_as_if_it_were_not_there():
    reward, groups = torch.tensor([1.0, math.nan, 3.0, 4.0, math.inf]), torch.tensor([0, 0, 0, 1, 1])
    loss, kept = REWARD_LOSSES["group"].function(reward, groups=groups), torch.tensor([0, 2, 3])
    assert torch.equal(loss[kept], REWARD_LOSSES["group"].function(reward[kept], groups=groups[kept]))
    assert loss[[1, 4]].isfinite().tolist() == [False, False]


def test_a_group_of_equal_rewards_is_divided_by_1():
    reward = torch.full((3,), 0.7, requires_grad=True)
    loss = REWARD_LOSSES["group"].function(reward, groups=torch.zeros(3, dtype=torch.long))
    (slope,) = torch.autograd.grad(loss.sum(), reward)
    torch.testing.assert_close(slope, torch.full((3,), -1.0))


@pytest.mark.parametrize("value", [22.0, 0.273, -1e-3, 1e6, 0.1])
@pytest.mark.parametrize("count", [2, 7, 24])
def test_ties_have_no_deviation_whatever_their_size(value, count):
    reward = torch.full((count,), value, requires_grad=True)
    loss = REWARD_LOSSES["group"].function(reward, groups=torch.zeros(count, dtype=torch.long))
    (slope,) = torch.autograd.grad(loss.sum(), reward)
    assert torch.equal(slope, torch.full((count,), -1.0))
    assert loss.abs().max() <= 1e-6 * abs(value)


@pytest.mark.parametrize("mean", [0.0, 22.0, -300.0, 1e4])
@pytest.mark.parametrize("spread", [1.0, 0.02, 2e-3])
def test_close_rewards_are_divided_by_their_deviation(mean, spread):
    """E[r^2] - E[r]^2 in float32 is off by 3.6 % at 22 +- .02."""
    noise = torch.randn(24, generator=torch.Generator().manual_seed(0))
    reward = (mean + spread * noise).requires_grad_()
    if spread < 8 * torch.finfo(torch.float32).eps * abs(mean):
        return
    groups = torch.arange(24) % 3
    loss = REWARD_LOSSES["group"].function(reward, groups=groups)
    (slope,) = torch.autograd.grad(loss.sum(), reward)
    for group in range(3):
        exact = reward.detach()[groups == group].double()
        torch.testing.assert_close(slope[groups == group].double(), (-1 / exact.std(correction=0)).expand(8), rtol=1e-6,
                                   atol=0)  # fmt: skip


def test_half_precision_rewards_are_widened():
    for name, options in (("hinge", {"threshold": 2.0}), ("negative", {}), ("group", {"groups": GROUPS})):
        assert REWARD_LOSSES[name].function(torch.tensor(REWARD).bfloat16(), **options).dtype == torch.float32


def test_an_unknown_loss_names_the_known():
    with pytest.raises(ValueError, match="unknown reward loss 'hing'; use one of hinge, negative, distance, group"):
        get_reward_loss("hing")


def test_relative_rewards_are_the_papers_for_a_cosine():
    g = torch.Generator().manual_seed(0)
    image, wanted, unwanted = (torch.randn(4, 8, generator=g, dtype=torch.float64) for _ in range(3))
    k = 0.3
    paper = (image * ((1 + k) * wanted - unwanted)).sum(1)
    torch.testing.assert_close(relative_reward((image * wanted).sum(1), (image * unwanted).sum(1), k), paper)


def test_samples_whose_leaps_miss_weigh_less():
    gaps = (torch.tensor([0.02, 0.5]), torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(gap_weights(gaps, 0.1), torch.tensor([1 / (0.1 + 0.3), 1 / (0.5 + 0.4)]))
