import math
import warnings

import pytest
import torch

from diffalign.rewards import FunctionReward, get_reward
from diffalign.rewards.base import RewardUnavailable
from diffalign.rewards.support import weights
from diffalign.rollout.scoring import RewardWarning, ScoreBook, score
from diffalign.structures import Prompt

IMAGES = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2) / 4
PROMPTS = [Prompt(text, {"bonus": i}) for i, text in enumerate(["zero", "one", "two", "three"])]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)).double()


def with_bonus(images, prompts, metadata):
    return torch.tensor([len(p) + 10.0 * m["bonus"] for p, m in zip(prompts, metadata, strict=True)])


def fails_on_two(images, prompts, metadata):
    if "two" in prompts:
        raise RuntimeError("cannot see two")
    return brightness(images, prompts, metadata)


def reward(function, name="mine"):
    return FunctionReward(name, function)


def test_scores_are_float32_and_see_prompts_and_metadata():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = score([get_reward(brightness), get_reward(with_bonus)], IMAGES, PROMPTS)
    assert list(scores) == ["brightness", "with_bonus"]
    assert scores["brightness"].dtype == torch.float32
    assert scores["brightness"].tolist() == [0, 0.25, 0.5, 0.75]
    assert scores["with_bonus"].tolist() == [4, 13, 23, 35]


def test_names_come_from_a_mapping():
    assert list(score({"a": reward(brightness), "b": reward(brightness)}, IMAGES, PROMPTS)) == ["a", "b"]
    with pytest.raises(ValueError, match="share a name"):
        score([reward(brightness), reward(with_bonus)], IMAGES, PROMPTS)


def test_a_failure_costs_only_its_sample_and_only_its_reward():
    with pytest.warns(RewardWarning, match=r"'mine' failed on 1 of 4 .*RuntimeError: cannot see two.*: 'two'$"):
        scores = score([reward(fails_on_two), reward(brightness, "other")], IMAGES, PROMPTS)
    assert scores["mine"].isnan().tolist() == [False, False, True, False]
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(scores["mine"][keep], scores["other"][keep])
    assert scores["other"][2] == 0.5


def test_what_is_not_finite_is_nan_and_reported():
    def odd(images, prompts, metadata):
        return torch.tensor([1.0, math.inf, math.nan, 2.0])

    with pytest.warns(RewardWarning, match="2 of 4 samples .*not finite.*'one', 'two'"):
        values = score([reward(odd)], IMAGES, PROMPTS)["mine"]
    assert values.isnan().tolist() == [False, True, True, False]


def test_an_image_that_is_not_finite_has_no_score():
    images = IMAGES.clone()
    images[3, 1, 0, 0] = math.nan
    with pytest.warns(RewardWarning, match="'three'"):
        values = score([reward(with_bonus)], images, PROMPTS)["mine"]
    assert values.isnan().tolist() == [False, False, False, True]


@pytest.mark.parametrize("shape", [(4, 1), ()])
def test_a_wrong_shape_is_an_error_that_names_the_reward(shape):
    with pytest.raises(ValueError, match=r"'mine' returned shape .* for 4 images: return one number each"):
        score([reward(lambda *_: torch.zeros(shape))], IMAGES, PROMPTS)


def test_a_wrong_shape_is_an_error_in_the_retry_too():
    def one_column(images, prompts, metadata):
        if len(images) > 1:
            raise MemoryError
        return torch.zeros(1, 1)

    with pytest.raises(ValueError, match="'mine' returned shape"):
        score([reward(one_column)], IMAGES, PROMPTS)


def test_a_prompt_that_gives_two_scores_costs_its_sample_alone():
    """As one that holds the special word after which a model's head reads."""

    def reads_words(images, prompts, metadata):
        return torch.cat([torch.full((1 + ("two" in p),), float(len(p))) for p in prompts])

    with pytest.warns(RewardWarning, match=r"failed on 1 of 4 .*returned shape \(2,\) for 1 images.*: 'two'$"):
        values = score([reward(reads_words)], IMAGES, PROMPTS)["mine"]
    assert values[[0, 1, 3]].tolist() == [4, 3, 5]
    assert values[2].isnan()


def test_no_images_have_no_scores():
    for function in (brightness, lambda i, p, m: i.amax()):
        assert score([reward(function)], IMAGES[:0], [])["mine"].shape == (0,)


def test_a_network_that_cannot_be_loaded_ends_the_run_after_one_attempt():
    attempts = []

    def load():
        attempts.append(1)
        raise OSError("no folder my/weights")

    def judge(images, prompts, metadata):
        return weights.load_once(load)(images)

    with pytest.raises(RewardUnavailable, match=r"'mine': what it needs cannot be loaded: OSError: no folder"):
        score([reward(judge)], IMAGES, PROMPTS)
    assert len(attempts) == 1


def test_a_package_that_is_missing_ends_the_run():
    def judge(images, prompts, metadata):
        import no_such_package  # noqa: F401

    with pytest.raises(RewardUnavailable, match="'mine': No module named 'no_such_package'"):
        score([reward(judge)], IMAGES, PROMPTS)


def test_no_gradient_is_kept():
    images = IMAGES.clone().requires_grad_()
    seen = []
    score([reward(lambda i, p, m: seen.append(i.mean((1, 2, 3))) or seen[0])], images, PROMPTS)
    assert not seen[0].requires_grad


def test_images_and_prompts_must_match():
    with pytest.raises(ValueError, match="4 images for 3 prompts"):
        score([reward(brightness)], IMAGES, PROMPTS[:3])


class Ranks:
    """The place of an image in its group, by brightness."""

    name, differentiable, needs_groups, range = "ranks", False, True, (0.0, math.inf)

    def __call__(self, images, prompts, metadata, groups):
        light = images.mean((1, 2, 3))
        if (light < 0).any():
            raise RuntimeError("too dark to rank")
        return torch.tensor([float((light[groups == g] < x).sum()) for x, g in zip(light, groups, strict=True)])


def with_extras(images, prompts, metadata):
    light = brightness(images, prompts, metadata)
    return light, {"doubt": light / 10, "map": images[:, 0]}


def test_a_reward_that_needs_groups_sees_whole_ones():
    groups = torch.tensor([7, 3, 7, 3])
    assert score([Ranks()], IMAGES, PROMPTS, groups)["ranks"].tolist() == [0, 0, 1, 1]
    same = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    assert score([Ranks()], IMAGES, same)["ranks"].tolist() == [0, 0, 1, 1], "images of one prompt are a group"


def test_a_group_that_cannot_be_ranked_costs_the_others_nothing():
    images = IMAGES.clone()
    images[1] = -1
    with pytest.warns(RewardWarning, match="too dark to rank"):
        values = score([Ranks()], images, PROMPTS, torch.tensor([0, 1, 0, 1]))["ranks"]
    assert values.isnan().tolist() == [False, True, False, True]


def test_numbers_that_a_reward_adds_are_scores_too():
    scores = score([reward(with_extras)], IMAGES, PROMPTS)
    assert list(scores) == ["mine", "mine/doubt"]
    torch.testing.assert_close(scores["mine/doubt"], scores["mine"] / 10)


def test_micro_batches_add_up_to_the_whole():
    rewards = {"mine": reward(with_extras), "ranks": Ranks()}
    groups = torch.tensor([0, 0, 1, 1])
    book = ScoreBook(rewards)
    for rows in (slice(0, 3), slice(3, 4)):
        book.add(IMAGES[rows], PROMPTS[rows])
    found, whole = book.scores(groups), score(rewards, IMAGES, PROMPTS, groups)
    assert set(found) == set(whole)
    for name in whole:
        assert torch.equal(found[name], whole[name])
    alone = ScoreBook({"mine": reward(brightness)})
    alone.add(IMAGES, PROMPTS)
    assert alone.images == [], "images are kept only where a reward waits for them"


def test_an_extra_of_one_micro_batch_is_nan_in_the_others():
    def sometimes(images, prompts, metadata):
        light = brightness(images, prompts, metadata)
        return (light, {"doubt": light}) if "zero" in prompts else light

    book = ScoreBook({"mine": reward(sometimes)})
    for rows in (slice(0, 2), slice(2, 4)):
        book.add(IMAGES[rows], PROMPTS[rows])
    assert book.scores(torch.arange(4))["mine/doubt"].isnan().tolist() == [False, False, True, True]


@pytest.mark.parametrize("size", [1, 2, 3, 4, None])
def test_scores_in_batches_are_those_of_one_call_with_one_warning_for_each_reward(size):
    calls = []

    def counted(images, prompts, metadata):
        calls.append(len(images))
        return fails_on_two(images, prompts, metadata)

    rewards = {"mine": reward(counted), "dark": reward(lambda *a: brightness(*a).log()), "ranks": Ranks()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = score(rewards, IMAGES, PROMPTS, torch.tensor([0, 0, 1, 1]), batch_size=size, device=IMAGES.device)
    assert max(calls) == (size or 4)
    assert [str(one.message).split(" samples")[0] for one in caught] == [
        "reward 'mine' failed on 1 of 4",
        "reward 'dark' failed on 1 of 4",
    ]
    with pytest.warns(RewardWarning):
        whole = score(rewards, IMAGES, PROMPTS, torch.tensor([0, 0, 1, 1]))
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=0, atol=0, equal_nan=True)
