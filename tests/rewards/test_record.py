"""Rewards that were passed from Python are recorded so that a configuration makes them again."""

import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.config import load_yaml
from diffalign.rewards import FunctionReward, RewardConfig, base, get_reward
from diffalign.rewards.base import PASSED
from diffalign.rewards.config import build_rewards
from diffalign.rewards.support.record import passed_from_python, reward_record
from diffalign.trainers.inputs import reward_table
from tests.conftest import PROMPTS, ROOT
from tests.reliability.trainers import TRAINERS, short

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2))


class Light:
    name, differentiable, range = "light", False, (0.0, 1.0)

    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))


light = Light()
graded = FunctionReward("graded", redness, differentiable=True)
HERE = __name__


def record(spec):
    return reward_record(spec, reward_table(spec, allow_code=True)[0])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("shapes", {"shapes": 1.0}),
        (["shapes", "brightness"], {"shapes": 1.0, "brightness": 1.0}),
        ({"shapes": 0.5, "brightness": 2}, {"shapes": 0.5, "brightness": 2.0}),
        (get_reward("shapes"), {"shapes": 1.0}),
        (get_reward("pickscore", precision="bf16"),
         {"pickscore": RewardConfig(reward="pickscore", options={"precision": "bf16"})}),
        (redness, {"redness": RewardConfig(reward=f"{HERE}:redness")}),
        (light, {"light": RewardConfig(reward=f"{HERE}:light")}),
        (graded, {"graded": RewardConfig(reward=f"{HERE}:graded")}),
        ([redness, "shapes"], {"redness": RewardConfig(reward=f"{HERE}:redness"), "shapes": 1.0}),
        (f"{HERE}:redness", {"redness": RewardConfig(reward=f"{HERE}:redness")}),
        (lambda i, p, m: i.mean((1, 2, 3)), {"lambda": RewardConfig(reward=PASSED)}),
        (partial(redness), {"redness": RewardConfig(reward=PASSED)}),
        (Light(), {"light": RewardConfig(reward=PASSED)}),
        (FunctionReward("redness", redness, True), {"redness": RewardConfig(reward=PASSED)}),
    ],
    ids=["name", "names", "weights", "registered", "options", "function", "instance", "wrapped", "mixed", "code",
         "lambda", "partial", "object", "passed"],
)  # fmt: skip
def test_a_record_rebuilds_the_same_rewards(spec, expected):
    found = record(spec)
    assert found == expected
    if not passed_from_python(found):
        again, weights = build_rewards(found, allow_code=True)
        first, before = reward_table(spec, allow_code=True)
        assert (list(again), weights) == (list(first), before)
        for name in again:
            assert (again[name].name, again[name].differentiable) == (first[name].name, first[name].differentiable)


def test_a_local_function_cannot_be_recorded():
    def redness(images, prompts, metadata):  # of the same name as one that could be found
        return images.mean((1, 2, 3))

    assert passed_from_python(record(redness)) == ["redness"]


SCRIPT = """
from diffalign import register
from diffalign.rewards import FunctionReward

def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2))

@register("made_here")
def made_here(name, factor=2.0):
    return FunctionReward(name, lambda i, p, m: factor * i.mean((1, 2, 3)))

if __name__ == "__main__":
    def hidden(images, prompts, metadata):
        return images.mean((1, 2, 3))
"""


def run_as_script(path, monkeypatch):
    """Its module as ``python path`` has it."""
    module = type(sys)("__main__")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(compile(path.read_text(), path, "exec"), vars(module))
    return module


def test_a_reward_of_a_script_is_found_in_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "REWARDS", dict(base.REWARDS))
    monkeypatch.setattr("diffalign.rewards.support.record.REWARDS", base.REWARDS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    script = run_as_script(tmp_path / "train.py", monkeypatch)
    assert record(script.redness) == {"redness": RewardConfig(reward="train.py:redness")}
    assert record(script.hidden) == {"hidden": RewardConfig(reward=PASSED)}
    made = record(get_reward("made_here", factor=3.0))
    assert made == {"made_here": RewardConfig(reward="train.py:made_here", options={"factor": 3.0})}
    monkeypatch.chdir(ROOT)
    assert record(script.redness)["redness"].reward == f"{tmp_path}/train.py:redness"
    base.REWARDS.pop("made_here")
    monkeypatch.chdir(tmp_path)
    found, _ = build_rewards(made, allow_code=True)
    torch.testing.assert_close(found["made_here"](IMAGES, ["", ""], [{}, {}]), 3 * IMAGES.mean((1, 2, 3)))


def test_a_script_that_trains_while_it_is_loaded_says_so(tmp_path):
    text = "from diffalign.trainers.inputs import reward_table\nreward_table('shapes')\n" + SCRIPT
    (tmp_path / "train.py").write_text(text)
    with pytest.raises(ValueError, match="put that under if __name__ == '__main__'"):
        get_reward(f"{tmp_path}/train.py:redness", allow_code=True)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("online_dpo", "refl")]


@pytest.mark.parametrize("name", ["flow_grpo", *SLOW])
def test_a_run_is_repeated_from_its_record(name, tmp_path, capsys):
    case = TRAINERS[name]
    file = tmp_path / "mine.py"
    file.write_text(
        "from diffalign.rewards import FunctionReward\n"
        "red = FunctionReward('red', lambda i, p, m: i[:, 0].mean((1, 2)), differentiable=True)\n"
    )
    args = short(name, tmp_path / "run", rewards={}, max_train_steps=1, checkpointing_steps=0, allow_reward_code=True)
    case.trainer(args=args, reward_funcs=f"{file}:red").train()
    written = load_yaml(tmp_path / "run/config.yaml")
    assert written["rewards"] == {"red": {"weight": 1.0, "reward": f"{file}:red", "options": {}}}
    card = (tmp_path / "run/README.md").read_text()
    assert f"--config {tmp_path}/run/config.yaml --allow_reward_code\n" in card
    trainer = {"online_dpo": "diffusion_dpo"}.get(name, name)
    command = ["train", trainer, "--config", str(tmp_path / "run/config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert main(command) == 2
    assert "type --allow_reward_code" in capsys.readouterr().err
    assert main([*command, "--allow_reward_code"]) == 0
    first, again = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("run", "again"))
    assert all(torch.equal(first[key], again[key]) for key in first), "the same run, to the last bit"


def test_what_was_passed_from_python_is_named_on_the_card_and_when_it_is_missed(tmp_path, capsys, train_prompts):
    case = TRAINERS["flow_grpo"]
    args = short("flow_grpo", tmp_path / "run", rewards={}, max_train_steps=1, train_prompts=None)
    case.trainer(args=args, reward_funcs=lambda i, p, m: i.mean((1, 2, 3)), train_dataset=train_prompts).train()
    card = (tmp_path / "run/README.md").read_text()
    assert "# passed from Python, to be passed again: reward lambda, train_dataset" in card
    command = ["train", "flow_grpo", "--config", str(tmp_path / "run/config.yaml"), "--allow_reward_code"]
    assert main([*command, "--train_prompts", str(PROMPTS / "shapes_train.jsonl")]) == 2
    assert "was passed from Python, and no file names it: pass reward_funcs= again" in capsys.readouterr().err
