"""Losses given as file.py:function: loaded with consent only, and refused where they are none."""

import pytest
import torch

from diffalign.losses.objective import PairObjective
from diffalign.losses.registry import get_loss, get_objective, get_reward_loss
from diffalign.losses.unpaired import SingleObjective

CODE = """
def pairs(pair, *, beta=3.0, power=2.0):
    return (1 - beta * pair.margin).abs() ** power

def singles(denoised, liked, *, beta=2.0):
    return beta * denoised.gain * liked

def no_default(pair, *, beta):
    return pair.margin

def other(x):
    return x

def rewards(reward, *, threshold):
    return threshold - reward
"""
LIKED = torch.tensor([True, False, True, False])


@pytest.fixture
def code(tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    return lambda name: f"{tmp_path}/own.py:{name}"


@pytest.mark.parametrize("get", [get_loss, get_reward_loss, get_objective])
def test_code_is_not_run_without_consent(tmp_path, get):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="is code: set allow_reward_code"):
        get(f"{tmp_path}/evil.py:loss")
    assert not (tmp_path / "ran").exists()


def test_a_function_of_pairs_is_a_loss_with_its_own_beta_and_options(code, make_pair):
    loss = get_loss(code("pairs"), allow_code=True)
    assert (loss.beta, loss.paired, loss.options) == (3.0, True, ("power",))
    pair = make_pair()
    found = PairObjective(code("pairs"), options={"power": 1.0})(pair)  # loaded: it needs no second consent
    assert torch.equal(found, (1 - 3.0 * pair.margin).abs() ** 1.0)


def test_a_function_of_single_images_is_a_loss(code, make_denoised):
    assert not get_loss(code("singles"), allow_code=True).paired
    image = make_denoised()
    assert torch.equal(SingleObjective(code("singles"), {})(image, LIKED, 2.0, torch.ones(4)), 2.0 * image.gain * LIKED)


def test_a_function_of_rewards_is_a_loss(code):
    loss = get_reward_loss(code("rewards"), allow_code=True)
    assert (loss.threshold, loss.groups) == (True, False)


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_default", "give its parameter beta a number"), ("other", "write it as"), ("absent", "no function of that")],
)
def test_code_that_is_no_loss_is_refused(code, name, message):
    with pytest.raises(ValueError, match=message):
        get_loss(code(name), allow_code=True)


@pytest.mark.parametrize(("name", "option"), [("kto", "alpha"), ("kto", "kl"), ("bco", "shift"), ("sft", "beta")])
def test_options_of_single_image_losses_are_checked(name, option):
    with pytest.raises(ValueError, match=f"{name!r} has no option {option}"):
        SingleObjective(name, {option: 1.0})


def test_a_label_is_no_option():
    with pytest.raises(ValueError, match="label belongs to each pair"):
        PairObjective("dpo", options={"label": 0.5})
