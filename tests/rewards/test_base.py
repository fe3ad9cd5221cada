import math
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

from diffalign.config import from_dict, to_dict
from diffalign.rewards import base
from diffalign.rewards.base import FunctionReward, Reward, RewardCard, RewardUnavailable, ask, get_reward, register
from diffalign.rewards.config import RewardConfig, build_rewards

IMAGES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def brightness(images, prompts, metadata, factor=1.0):
    return factor * images.mean((1, 2, 3))


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(base, "REWARDS", dict(base.REWARDS))
    return base.REWARDS


def test_every_registered_reward_keeps_the_contract():
    known = {"shapes", "shapes_strict", "shapes_correct", "jpeg_compressibility", "jpeg_incompressibility"}
    assert known <= set(base.REWARDS)
    for name in known:
        reward = get_reward(name)
        assert isinstance(reward, Reward)
        assert reward.name == name
        assert reward.differentiable is False
        assert reward.range[0] < reward.range[1]


def test_a_plain_function_is_wrapped_under_its_name():
    reward = get_reward(brightness)
    assert isinstance(reward, Reward)
    assert (reward.name, reward.differentiable, reward.range) == ("brightness", False, (-math.inf, math.inf))
    torch.testing.assert_close(reward(IMAGES, ["a", "b"], [{}, {}]), IMAGES.mean((1, 2, 3)))


def test_partials_lambdas_and_callable_objects_have_names():
    class Judge:
        def __call__(self, images, prompts, metadata):
            return torch.zeros(len(images))

    assert get_reward(partial(partial(brightness, factor=2.0))).name == "brightness"
    assert get_reward(lambda i, p, m: i).name == "lambda"
    assert get_reward(Judge()).name == "Judge"


def test_a_reward_is_returned_as_it_is():
    reward = FunctionReward("mine", brightness, differentiable=True, range=(0.0, 1.0))
    assert get_reward(reward) is reward


def test_registering_stacks_settings_of_one_class(registry):
    @register("bright")
    @register("dark", factor=-1.0)
    def build(name, factor=1.0):
        return FunctionReward(name, partial(brightness, factor=factor))

    assert get_reward("dark").name == "dark"
    total = get_reward("bright")(IMAGES, [], []) + get_reward("dark")(IMAGES, [], [])
    torch.testing.assert_close(total, torch.zeros(2))
    with pytest.raises(ValueError, match="'dark' is registered already"):
        register("dark")(build)
    assert registry.keys() >= {"bright", "dark"}


def test_an_unknown_name_lists_the_known_ones_and_the_closest():
    with pytest.raises(ValueError, match=r"unknown reward 'shape_strict'; known: .*jpeg.* mean 'shapes_strict'"):
        get_reward("shape_strict")


@pytest.mark.parametrize("spec", [7, None, FunctionReward])
def test_code_that_is_no_reward_is_refused(spec):
    with pytest.raises(ValueError, match="give a name, a function or an instance"):
        get_reward(spec)


CODE = "def half(images, prompts, metadata):\n    return images.mean((1, 2, 3)) / 2\n"


def test_code_is_found_by_module_and_by_file(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for spec in ("my_rewards:half", f"{tmp_path}/my_rewards.py:half"):
        reward = get_reward(spec, allow_code=True)
        assert reward.name == "half"
        torch.testing.assert_close(reward(IMAGES, ["a", "b"], [{}, {}]), IMAGES.mean((1, 2, 3)) / 2)


@pytest.mark.parametrize("spec", ["{0}/my_rewards.py:half", "my_rewards:half", "my_rewards:", ":my_rewards"])
def test_code_runs_only_where_it_is_allowed(spec, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="set allow_reward_code if you trust it"):
        get_reward(spec.format(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("spec", ["no_such_module:half", "math:half", "missing.py:half"])
def test_code_that_is_missing_is_refused(spec):
    with pytest.raises(ValueError, match=rf"{spec}' cannot be loaded: .*; write module:function"):
        get_reward(spec, allow_code=True)


BRIGHT = "class Bright:\n    name, differentiable, range = 'bright', True, (0.0, 1.0)\n" + (
    "    def __init__(self, factor=1.0):\n        self.factor = factor\n"
    "    def __call__(self, images, prompts, metadata):\n        return self.factor * images.mean((1, 2, 3))\n"
)


def test_a_class_in_code_is_made_with_the_options(tmp_path):
    (tmp_path / "mine.py").write_text(BRIGHT)
    reward = get_reward(f"{tmp_path}/mine.py:Bright", allow_code=True, factor=0.5)
    torch.testing.assert_close(reward(IMAGES, ["a", "b"], [{}, {}]), IMAGES.mean((1, 2, 3)) / 2)
    with pytest.raises(ValueError, match="takes no options"):
        get_reward(brightness, factor=0.5)


README = (
    "from diffalign import register\nfrom diffalign.rewards import FunctionReward, RewardCard\n"
    "@register('redness', RewardCard('how red an image is', scale=0.1))\n"
    "def redness(name, strength=1.0):\n"
    "    return FunctionReward(name, lambda i, p, m: strength * i[:, 0].mean((1, 2)))\n"
)


def test_a_file_may_register_what_it_is_named_for(registry, tmp_path):
    (tmp_path / "my_rewards.py").write_text(README)
    for strength in (1.0, 2.0):  # a second time, as evaluation asks
        reward = get_reward(f"{tmp_path}/my_rewards.py:redness", allow_code=True, strength=strength)
        assert reward.name == "redness"
        torch.testing.assert_close(reward(IMAGES, ["a", "b"], [{}, {}]), strength * IMAGES[:, 0].mean((1, 2)))
    assert get_reward("redness").name == "redness"
    with pytest.raises(ValueError, match=r"'redness': .*'strong'; its options: name, strength"):
        get_reward(f"{tmp_path}/my_rewards.py:redness", allow_code=True, strong=1.0)


def test_a_plain_function_in_code_takes_options(tmp_path):
    code = "def half(images, prompts, metadata, factor=0.5):\n    return factor * images.mean((1, 2, 3))\n"
    (tmp_path / "plain.py").write_text(code)
    spec = f"{tmp_path}/plain.py:half"
    reward = get_reward(spec, allow_code=True, factor=3.0)
    assert reward.name == "half"
    torch.testing.assert_close(reward(IMAGES, ["a", "b"], [{}, {}]), 3 * IMAGES.mean((1, 2, 3)))
    with pytest.raises(ValueError, match=r"reward 'half': .*'bogus'; its options: factor"):
        get_reward(spec, allow_code=True, bogus=1)


def test_a_dataclass_in_a_file_and_its_wrong_options(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass(frozen=True)\n"
        "class Mine:\n    name: str = 'mine'\n    factor: float = 2.0\n    differentiable: bool = True\n"
        "    range: tuple[float, float] = (0.0, 2.0)\n"
        "    def __call__(self, images, prompts, metadata):\n        return self.factor * images.mean((1, 2, 3))\n"
    )
    spec = f"{tmp_path}/mine.py:Mine"
    reward = get_reward(spec, allow_code=True, factor=3.0)
    torch.testing.assert_close(reward(IMAGES, ["a", "b"], [{}, {}]), 3 * IMAGES.mean((1, 2, 3)))
    with pytest.raises(ValueError, match=r"reward 'Mine': .*'bogus'; its options: name, factor"):
        get_reward(spec, allow_code=True, bogus=1)


@pytest.mark.parametrize(("code", "cause"), [("def f(:\n", "SyntaxError"), ("f = nothing\n", "NameError")])
def test_errors_of_a_file_are_one_line_and_can_be_fixed(code, cause, tmp_path):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(ValueError, match=rf"bad\.py:f' cannot be loaded: {cause}: "):
        get_reward(f"{tmp_path}/bad.py:f", allow_code=True)
    (tmp_path / "bad.py").write_text(CODE.replace("half", "f"))
    assert get_reward(f"{tmp_path}/bad.py:f", allow_code=True).name == "f"


def test_an_option_that_a_reward_does_not_take_is_named_with_those_that_it_takes():
    with pytest.raises(ValueError, match=r"'pickscore': .*'prcision'; its options: .*precision"):
        get_reward("pickscore", prcision="bf16")


def test_plug_ins_of_other_packages_are_found_by_name(registry, tmp_path, monkeypatch):
    (tmp_path / "plugged.py").write_text(
        "from diffalign.rewards import FunctionReward\n"
        "def make(name, factor=2.0):\n    return FunctionReward(name, lambda i, p, m: factor * i.mean((1, 2, 3)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    points = EntryPoints([EntryPoint("plugged", "plugged:make", base.PLUGINS)])
    monkeypatch.setattr(base, "entry_points", lambda group: points.select(group=group))
    with pytest.raises(ValueError, match=r"known: .*plugged.*did you mean 'plugged'"):
        get_reward("pluged")
    reward = get_reward("plugged", factor=3.0)
    assert reward.name == "plugged"
    torch.testing.assert_close(reward(IMAGES, ["a", "b"], [{}, {}]), 3 * IMAGES.mean((1, 2, 3)))


def test_every_registered_reward_has_a_description():
    for name, registered in base.REWARDS.items():
        assert isinstance(registered.facts, RewardCard), name
        assert registered.facts.measures, name
        assert registered.facts.scale > 0, name
        assert bool(registered.facts.weights) == bool(registered.facts.licence) == bool(registered.facts.millions), name


@dataclass
class Run:
    rewards: dict[str, float | RewardConfig]


def test_a_configuration_gives_weights_or_options():
    table = {"shapes": 0.5, "file": {"reward": "jpeg_compressibility", "weight": 2}}
    run = from_dict(Run, {"rewards": table})
    rewards, weights = build_rewards(run.rewards)
    assert list(rewards) == ["shapes", "file"]
    assert weights == {"shapes": 0.5, "file": 2.0}
    assert rewards["file"].range == (-math.inf, 0.0)
    assert from_dict(Run, to_dict(run)) == run
    assert build_rewards({"p": RewardConfig(reward="pickscore", options={"precision": "bf16"})})[0]["p"].name
    with pytest.raises(ValueError, match="set allow_reward_code"):
        build_rewards({"mine": RewardConfig(reward="mine.py:half")})


def test_rewards_may_return_scores_alone_or_with_extras():
    bare, pair = (lambda i, p, m: torch.ones(2)), (lambda i, p, m: (torch.ones(2), {"doubt": torch.zeros(2)}))
    for function, extras in ((bare, set()), (pair, {"doubt"})):
        values, more = ask(FunctionReward("f", function), IMAGES, ["a", "b"], [{}, {}])
        assert values.tolist() == [1, 1]
        assert set(more) == extras
    with pytest.raises(RewardUnavailable, match=r"'f' returned shape \(2, 1\) for 2 images: return one number each"):
        ask(FunctionReward("f", lambda i, p, m: torch.ones(2, 1)), IMAGES, ["a", "b"], [{}, {}])
