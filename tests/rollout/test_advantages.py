import math

import numpy as np
import pytest
import torch

from diffalign.rollout.advantages import flat_share, group_advantages, weighted_total

OPTIONS = [(std, aggregate) for std in ("group", "global", "unit") for aggregate in ("rewards", "advantages")]
WEIGHTS = {"a": 0.7, "b": -1.3}


def draw(seed=0, count=40, groups=5, share_nan=0.0):
    generator = torch.Generator().manual_seed(seed)
    rewards = {name: torch.randn(count, generator=generator) for name in ("a", "b")}
    for values in rewards.values():
        values[torch.rand(count, generator=generator) < share_nan] = math.nan
    return rewards, torch.randint(groups, (count,), generator=generator) * 7 - 3


def by_loop(rewards, groups, weights, std, aggregate, epsilon=1e-4, clip=5.0):
    """The definition, one sample at a time, in numpy float64."""
    table = {name: values.double().numpy() for name, values in rewards.items()}
    ids = groups.numpy()
    good = [i for i in range(len(ids)) if all(np.isfinite(v[i]) for v in table.values())]

    def normalised(values):
        result = np.zeros(len(ids))
        for i in good:
            own = values[[j for j in good if ids[j] == ids[i]]]
            spread = np.std(own if std == "group" else values[good])
            result[i] = (values[i] - own.mean()) / (1 if std == "unit" else spread + epsilon)
        return result

    if aggregate == "rewards":
        total = normalised(sum(weights[name] * table[name] for name in table))
    else:
        total = sum(weights[name] * normalised(table[name]) for name in table)
    return torch.tensor(np.clip(total, -clip, clip), dtype=torch.float32)


@pytest.mark.parametrize(("std", "aggregate"), OPTIONS)
@pytest.mark.parametrize("share_nan", [0.0, 0.15])
def test_equals_the_plain_loop(std, aggregate, share_nan):
    rewards, groups = draw(share_nan=share_nan)
    got = group_advantages(rewards, groups, weights=WEIGHTS, std=std, aggregate=aggregate)
    assert got.dtype == torch.float32
    assert (got != 0).sum() > 20
    torch.testing.assert_close(got, by_loop(rewards, groups, WEIGHTS, std, aggregate), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("std", "aggregate"), OPTIONS)
def test_permuting_samples_permutes_advantages(std, aggregate):
    rewards, groups = draw(1, share_nan=0.1)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(2))
    options = {"weights": WEIGHTS, "std": std, "aggregate": aggregate}
    straight = group_advantages(rewards, groups, **options)
    permuted = group_advantages({k: v[order] for k, v in rewards.items()}, groups[order], **options)
    torch.testing.assert_close(permuted, straight[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("std", "aggregate"), OPTIONS)
def test_a_failed_sample_gets_zero_and_leaves_the_others_as_without_it(std, aggregate):
    rewards, groups = draw(3)
    rewards["b"][[4, 17]] = torch.tensor([math.nan, math.inf])
    keep = torch.ones(len(groups), dtype=torch.bool)
    keep[[4, 17]] = False
    options = {"weights": WEIGHTS, "std": std, "aggregate": aggregate}
    got = group_advantages(rewards, groups, **options)
    without = group_advantages({k: v[keep] for k, v in rewards.items()}, groups[keep], **options)
    assert torch.all(got[~keep] == 0)
    torch.testing.assert_close(got[keep], without, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("std", "aggregate"), OPTIONS)
def test_shifting_a_group_changes_nothing(std, aggregate):
    rewards, groups = draw(4)
    rewards = {name: values.double() for name, values in rewards.items()}
    offset = 3.0 if std == "global" else 2.0 * groups  # the deviation of all rewards sees offsets between groups
    shifted = {name: values + offset for name, values in rewards.items()}
    options = {"weights": WEIGHTS, "std": std, "aggregate": aggregate}
    expected = group_advantages(rewards, groups, **options)
    torch.testing.assert_close(group_advantages(shifted, groups, **options), expected, rtol=0, atol=1e-6)


def test_closed_form_of_a_pair():
    got = group_advantages({"r": torch.tensor([1.0, 0.0])}, torch.tensor([0, 0]))
    assert got.tolist() == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001], rel=1e-6)


def test_global_std_is_of_raw_rewards():
    rewards, groups = torch.tensor([0.0, 2.0, 10.0, 12.0]), torch.tensor([0, 0, 1, 1])
    got = group_advantages({"r": rewards}, groups, std="global", epsilon=0.0)
    assert got.tolist() == pytest.approx([-1 / 26**0.5, 1 / 26**0.5] * 2, rel=1e-6)


@pytest.mark.parametrize(("std", "aggregate"), OPTIONS)
@pytest.mark.parametrize("value", [0.1, -1e6 / 3, 0.0])
def test_a_flat_group_gets_exactly_zero(std, aggregate, value):
    groups = torch.tensor([0, 0, 0, 1, 1])
    rewards = torch.tensor([value] * 3 + [0.0, 1.0])
    rewards[1] = torch.nextafter(rewards[1], torch.tensor(math.inf)) if value else 0.0
    got = group_advantages({"r": rewards}, groups, std=std, aggregate=aggregate, epsilon=1e-9)
    assert got[:3].tolist() == [0, 0, 0]
    assert got[4] > 0 > got[3]


def test_rewards_that_cancel_up_to_rounding_are_flat():
    a = torch.tensor([0.1, 0.7, 0.3])
    b = torch.nextafter(a, torch.tensor([1.0, 0.0, 1.0]))
    got = group_advantages({"a": a, "b": b}, torch.zeros(3, dtype=torch.long), weights={"b": -1.0}, epsilon=1e-12)
    assert got.tolist() == [0, 0, 0]


def test_a_small_but_real_preference_is_not_flat():
    got = group_advantages({"r": torch.tensor([0.5, 0.50001])}, torch.tensor([0, 0]), epsilon=0.0)
    assert got.tolist() == pytest.approx([-1, 1], rel=1e-6)


@pytest.mark.parametrize("std", ["group", "global"])
def test_single_and_all_failed_groups_get_zero(std):
    rewards = torch.tensor([5.0, math.nan, math.nan, math.nan, 1.0, 2.0])
    got = group_advantages({"r": rewards}, torch.tensor([0, 0, 1, 1, 2, 2]), std=std)
    assert got[:4].tolist() == [0, 0, 0, 0]
    assert got[5] > 0
    nothing = group_advantages({"r": torch.full((4,), math.nan)}, torch.tensor([0, 0, 1, 1]), std=std)
    assert nothing.tolist() == [0, 0, 0, 0]


def test_clip_bounds_and_none_does_not():
    rewards = {"r": torch.tensor([0.0] * 63 + [1.0])}
    groups = torch.zeros(64, dtype=torch.long)
    assert group_advantages(rewards, groups).max() == 5
    assert group_advantages(rewards, groups, clip=None).max() == pytest.approx(63**0.5, rel=1e-3)


def test_a_reward_of_weight_zero_plays_no_part_even_where_it_failed():
    rewards, groups = draw(5)
    alone = group_advantages({"a": rewards["a"]}, groups)
    rewards["b"][3] = math.nan
    assert torch.equal(group_advantages(rewards, groups, weights={"b": 0.0}), alone)


def test_the_two_ways_to_aggregate_differ_in_scale():
    """A reward on a scale of 1000 drowns the other in the sum, not in the sum of advantages."""
    rewards = {"large": torch.tensor([0.0, 1000.0, 0.0, 1000.0]), "small": torch.tensor([1.0, 0.0, 0.0, 1.0])}
    groups = torch.zeros(4, dtype=torch.long)
    assert group_advantages(rewards, groups, aggregate="rewards")[0] < -0.9
    assert group_advantages(rewards, groups, aggregate="advantages")[0].abs() < 1e-3


@pytest.mark.parametrize("std", ["unit", "group"])
def test_diversity_multiplies_positive_advantages_by_its_share_of_the_group(std):
    """GARDO: A d / mean d where A > 0; a distance that is not finite, or a group without any, changes nothing."""
    reward, groups = torch.tensor([3.0, 1.0, 2.0, 0.0, 1.0, 5.0, 4.0]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    diversity = torch.tensor([0.3, 0.1, math.nan, 0.6, 0.2, 0.0, 0.0])
    plain = group_advantages({"a": reward}, groups, std=std)
    found = group_advantages({"a": reward}, groups, std=std, diversity=diversity)
    factor = torch.tensor([0.3 / 0.2, 1.0, 1.0, 1.0, 0.2 / 0.4, 1.0, 1.0])
    torch.testing.assert_close(found, plain * torch.where(plain > 0, factor, 1.0))
    bound = group_advantages({"a": reward * 100}, groups, std="unit", diversity=diversity, clip=5.0)
    assert bound.abs().max() == 5.0


def test_a_total_ignores_what_has_no_weight_and_is_missing_where_another_failed():
    rewards = {"a": torch.tensor([1.0, 2.0, math.nan]), "b": torch.tensor([math.nan, 3.0, 4.0])}
    torch.testing.assert_close(weighted_total(rewards, {"a": 2.0, "b": 0.0}), rewards["a"] * 2, equal_nan=True)
    assert weighted_total(rewards, {"a": 2.0, "b": 1.0}).isnan().tolist() == [True, False, True]


def test_flat_share_counts_groups_that_teach_nothing():
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    rewards = {
        "a": torch.tensor([1.0, 1.0, 1.0, 2.0, 0.5, math.nan, 9.0]),
        "b": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
    }
    assert flat_share({"a": rewards["a"]}, groups) == 0.75
    assert flat_share(rewards, groups) == 0.5
    assert flat_share(rewards, groups, {"b": 0.0}) == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"c": 1.0}}, "unknown rewards c; known: a, b"),
        ({"weights": {"a": 0.0, "b": 0.0}}, "non-zero weight"),
        ({"std": "batch"}, "use group, global or unit"),
        ({"aggregate": "ranks"}, "rewards or advantages"),
        ({"clip": 0.0}, "clip positive or None"),
        ({"epsilon": -1.0}, "must not be negative"),
        ({"groups": torch.zeros(3, dtype=torch.long)}, r"both \(N,\)"),
    ],
)
def test_unusable_options_are_refused(options, message):
    rewards, groups = draw()
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, options.pop("groups", groups), **options)
