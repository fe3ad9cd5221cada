import math
import os
from functools import partial

import numpy as np
import pytest
import torch

from diffalign.rewards.base import FunctionReward, Reward, get_reward
from diffalign.rewards.combine import (
    RULES,
    Calibration,
    Combined,
    calibrate,
    load_calibrations,
    majority,
    save_calibrations,
)
from diffalign.rollout.scoring import score
from diffalign.structures import Prompt

SCORES = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
IMAGES = torch.rand(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1


def channel(images, prompts, metadata, index):
    return images[:, index].mean((1, 2))


def parts(*weights):
    return {
        "rgb"[i]: (FunctionReward("rgb"[i], partial(channel, index=i), differentiable=True), w)
        for i, w in enumerate(weights)
    }


CALIBRATIONS = {
    name: calibrate(torch.rand(50, generator=torch.Generator().manual_seed(i))) for i, name in enumerate("rgb")
}


def test_rules_against_numpy():
    s, w = SCORES.numpy(), WEIGHTS.numpy()
    share = w / w.sum()
    mean = share @ s
    expected = {
        "weighted_sum": w @ s,
        "soft_and": w @ -np.log1p(np.exp(-s)),
        "pessimistic": mean - 0.7 * np.sqrt(share @ (s - mean) ** 2),
        "minimum": s.min(0),
    }
    assert expected.keys() == RULES.keys()
    for name, rule in RULES.items():
        np.testing.assert_allclose(rule(SCORES, WEIGHTS, 0.7), expected[name], rtol=1e-12)


def test_judges_that_agree_have_a_finite_gradient():
    scores = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(RULES["pessimistic"](scores, WEIGHTS, 1.0).sum(), scores)
    torch.testing.assert_close(gradient, (WEIGHTS / WEIGHTS.sum())[:, None].expand(3, 2))


@pytest.mark.parametrize("value", [0.273, 22.0, -0.1, 1e6])
@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_judges_that_agree_have_no_deviation_whatever_their_scores(value, count, dtype):
    """A mean that is rounded leaves a deviation of one unit in the last place, whose slope is as large as k."""
    scores = torch.full((count, 2), value, dtype=dtype, requires_grad=True)
    weights = torch.arange(1, count + 1).to(dtype)
    found = RULES["pessimistic"](scores, weights, 5.0)
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    torch.testing.assert_close(found.detach(), torch.full((2,), value, dtype=dtype))
    torch.testing.assert_close(gradient, (weights / weights.sum())[:, None].expand(count, 2))


def test_the_soft_and_is_not_bought_by_one_reward():
    scores = torch.tensor([[50.0, 1.0], [-5.0, 1.0]])
    assert RULES["soft_and"](scores, torch.ones(2), 0).argmax() == 1
    assert RULES["weighted_sum"](scores, torch.ones(2), 0).argmax() == 0


def test_calibration_against_numpy():
    values = np.random.default_rng(0).gamma(2.0, size=400)
    found = calibrate(torch.tensor([*values, math.nan, math.inf]))
    assert (found.mean, found.std) == pytest.approx((values.mean(), values.std()))
    new = torch.linspace(-1, values.max() + 1, 50, dtype=torch.float64)
    torch.testing.assert_close(found.standardise(new), (new - values.mean()) / values.std())
    knots = np.quantile(values, np.linspace(0, 1, 101))
    np.testing.assert_allclose(found.rank(new), np.interp(new, knots, np.linspace(0, 1, 101)), atol=1e-12)


def test_scores_that_differ_by_rounding_alone_calibrate_nothing():
    for values in (torch.full((5,), 0.273), torch.tensor([22.0, 22.0 + 2e-6])):
        with pytest.raises(ValueError, match="without any difference cannot calibrate"):
            calibrate(values)


def test_a_rank_of_scores_with_ties_is_defined():
    found = calibrate(torch.tensor([0.0] * 50 + [1.0] * 50))
    ranks = found.rank(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64))
    assert ranks.isfinite().all()
    assert (ranks.diff() >= 0).all()
    assert (ranks[0], ranks[-1]) == (0, 1)


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [math.nan, 1.0]])
def test_what_cannot_calibrate_is_refused(values):
    with pytest.raises(ValueError, match="score more images"):
        calibrate(torch.tensor(values))


def test_calibrations_survive_the_disk(tmp_path):
    save_calibrations(tmp_path / "c.json", CALIBRATIONS)
    assert load_calibrations(tmp_path / "c.json") == CALIBRATIONS
    for text in ("[1]", "{", '{"r": {"mean": 1}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json holds no calibrations"):
            load_calibrations(tmp_path / "bad.json")


@pytest.mark.parametrize("scale", ["raw", "standardised", "rank"])
@pytest.mark.parametrize("rule", RULES)
def test_a_combination_is_a_differentiable_reward(rule, scale):
    weights = (1.0, 1.0, 1.0) if rule == "minimum" else (1.0, 2.0, 0.5)
    reward = Combined("all", parts(*weights), rule, scale, CALIBRATIONS)
    assert isinstance(reward, Reward)
    assert reward.differentiable
    values = reward(IMAGES, [""] * 5, [{}] * 5)
    assert values.shape == (5,)
    alone = torch.cat([reward(IMAGES[i : i + 1], [""], [{}]) for i in range(5)])
    torch.testing.assert_close(values, alone)
    images = IMAGES[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, [""] * 2, [{}] * 2), images)


def test_an_image_on_which_a_part_fails_has_no_score():
    broken = FunctionReward("broken", lambda i, p, m: torch.tensor([0.5, math.nan]))
    for rule in RULES:
        values = Combined("c", {"broken": (broken, 1.0), **parts(1.0)}, rule)(IMAGES[:2], [""] * 2, [{}] * 2)
        assert values.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "product"}, "'product' is unknown; choose one of weighted_sum"),
        ({"scale": "log"}, "'log' is unknown; choose one of raw"),
        ({"rewards": {}}, "has no rewards: give at least one"),
        ({"rewards": parts(1.0, 0.5), "rule": "minimum"}, "a minimum has no weights; leave out that of g"),
        ({"rewards": parts(1.0, 0.0)}, "that of g is not"),
        ({"scale": "rank", "calibrations": {"r": CALIBRATIONS["r"]}}, "no calibration of g"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Combined(**{"name": "c", "rewards": parts(1.0, 1.0), **options})


def test_the_majority_of_rewards_labels_a_pair():
    first = torch.tensor([[1.0, 0.0, 1.0, math.nan], [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.5, 1.0]])
    second = torch.tensor([[0.0, 1.0, 0.0, 5.0], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.5, 1.0]])
    assert majority(first, second).tolist() == [1, -1, 0, 1]


@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff\xfe", b'{"a": {"mean": 0}}', b"7", None])
def test_what_holds_no_calibrations_is_named(content, tmp_path):
    path = tmp_path / "bad.json"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json holds no calibrations"):
        load_calibrations(path)


def test_calibrations_are_plain_numbers():
    assert isinstance(CALIBRATIONS["r"], Calibration)
    assert all(type(value) is float for value in CALIBRATIONS["r"].quantiles)


def test_parts_with_extras_and_parts_that_rank_are_combined():
    class Ranks:
        name, differentiable, needs_groups, range = "ranks", False, True, (0.0, math.inf)

        def __call__(self, images, prompts, metadata, groups):
            light = images.mean((1, 2, 3))
            return torch.stack([(light[groups == g] < x).sum() for x, g in zip(light, groups, strict=True)]).double()

    doubted = FunctionReward("doubted", lambda i, p, m: (i.mean((1, 2, 3)), {"doubt": i.mean((1, 2, 3))}))
    reward = Combined("c", {"doubted": (doubted, 1.0), "ranks": (Ranks(), 10.0)})
    groups = torch.tensor([0, 1, 0, 1, 1])
    expected = IMAGES.mean((1, 2, 3)) + 10 * Ranks()(IMAGES, [], [], groups)
    torch.testing.assert_close(score([reward], IMAGES, [Prompt("")] * 5, groups)["c"], expected.float())
    assert not Combined("c", parts(1.0)).needs_groups


def test_calibrations_go_by_the_names_of_the_entries(tmp_path):
    """Two entries of one reward, which would share its name."""
    found = {"low": Calibration(0.0, 1.0, (0.0, 1.0)), "high": Calibration(0.0, 10.0, (0.0, 1.0))}
    save_calibrations(tmp_path / "c.json", found)
    entries = {name: {"reward": "brightness"} for name in found}
    options = {"rewards": entries, "scale": "standardised", "calibrations": str(tmp_path / "c.json")}
    light = get_reward("brightness")(IMAGES, [""] * 5, [{}] * 5)
    torch.testing.assert_close(get_reward("combined", **options)(IMAGES, [""] * 5, [{}] * 5), 1.1 * light)
