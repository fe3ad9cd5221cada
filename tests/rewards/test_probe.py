"""Every reward is tried on two small images before a model loads."""

import random

import numpy as np
import pytest
import torch

from diffalign.cli import main
from diffalign.commands import evaluate as evaluation
from diffalign.models import load as loading
from diffalign.rewards import FunctionReward
from diffalign.rewards.base import RewardUnavailable
from diffalign.rewards.support.probe import try_rewards, untried
from diffalign.structures import Prompt
from diffalign.trainers import base
from tests.conftest import PIPELINE, PROMPTS
from tests.reliability.trainers import TRAINERS, short

ASKED = [Prompt("a red circle", {"tag": "colors"}), Prompt("a blue square")]


def raises(error):
    def reward(images, prompts, metadata):
        raise error

    return reward


FAULTS = {
    "two_parameters": (lambda images, prompts: images, "cannot be called with"),
    "four_parameters": (lambda a, b, c, d: a, "cannot be called with"),
    "none": (lambda i, p, m: None, "returned NoneType"),
    "text": (lambda i, p, m: "good", "returned str"),
    "words": (lambda i, p, m: ["good", "bad"], "returned list"),
    "mapping": (lambda i, p, m: {"score": 1.0}, "returned dict"),
    "scalar": (lambda i, p, m: i.mean(), r"returned shape \(\) for 2 images"),
    "image": (lambda i, p, m: i, r"returned shape \(2, 3, 64, 64\)"),
    "column": (lambda i, p, m: i.mean((2, 3)), r"returned shape \(2, 3\)"),
    "short": (lambda i, p, m: i.mean((1, 2, 3))[:1], r"returned shape \(1,\)"),
    "complex": (lambda i, p, m: i.mean((1, 2, 3)).to(torch.complex64), "returned numbers of type torch.complex64"),
    "key": (lambda i, p, m: torch.tensor([x["nothing"] for x in m]), "raised KeyError: 'nothing'"),
    "exit": (raises(SystemExit(0)), "raised SystemExit"),
    "long": (raises(ValueError("x" * 10**6)), "raised ValueError: xxx"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_of_a_reward_name_it(fault):
    function, message = FAULTS[fault]
    with pytest.raises(ValueError, match=f"reward 'mine' {message}") as caught:
        try_rewards({"mine": FunctionReward("mine", function)}, ASKED)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "result",
    [
        lambda i: [1.0, 2.0],
        lambda i: np.array([1, 2]),
        lambda i: (torch.ones(2), {"map": i}),
        lambda i: torch.ones(2) > 0,
        lambda i: torch.full((2,), torch.nan),
        lambda i: torch.ones(2, dtype=torch.bfloat16),
    ],
)
def test_usable_rewards_pass(result):
    try_rewards({"mine": FunctionReward("mine", lambda i, p, m: result(i))}, ASKED)


def test_one_that_fails_on_one_sample_or_lacks_metadata_that_are_not_here_is_let_pass():
    def picky(images, prompts, metadata):
        return torch.tensor([float(len(entry["tag"])) for entry in metadata])

    try_rewards({"picky": FunctionReward("picky", picky)}, ASKED)
    try_rewards({"picky": FunctionReward("picky", picky)}, [])
    with pytest.raises(ValueError, match="raised KeyError: 'tag'"):
        try_rewards({"picky": FunctionReward("picky", picky)}, ASKED[1:])


def test_missing_weights_are_unavailable():
    with pytest.raises(RewardUnavailable, match="reward 'mine': no file"):
        try_rewards({"mine": FunctionReward("mine", raises(RewardUnavailable("no file")))}, ASKED)


def test_a_trial_leaves_no_trace():
    class Counts:
        name, differentiable, range, calls = "counts", False, (0.0, 1.0), 0

        def __call__(self, images, prompts, metadata):
            self.calls += 1
            images.zero_()
            metadata[0]["tag"] = "other"
            return torch.rand(2) + random.random() + np.random.rand()

    reward = Counts()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    try_rewards({"counts": reward}, ASKED)
    assert reward.calls == 0
    assert ASKED[0].metadata == {"tag": "colors"}
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    with untried():
        try_rewards({"mine": FunctionReward("mine", raises(KeyError()))}, ASKED)


@pytest.mark.parametrize("name", ["flow_grpo", "online_dpo", "refl"])
def test_no_model_is_loaded_for_a_reward_that_cannot_work(name, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    wrong = FunctionReward("wrong", lambda i, p, m: i.mean((2, 3)), differentiable=True)
    with pytest.raises(ValueError, match=r"reward 'wrong' returned shape \(2, 3\)"):
        TRAINERS[name].trainer(args=short(name, tmp_path / "run", rewards={}), reward_funcs=wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["eval", "compare", "train"])
def test_no_model_is_loaded_for_an_invalid_reward(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def wrong(images, prompts, metadata):\n    return images.mean((2, 3))\n")
    for module in (base, evaluation, loading):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    prompts = str(PROMPTS / "shapes_validation.jsonl")
    argv = [command, "--prompts", prompts, "--rewards", "['mine.py:wrong']", "--limit", "2"]
    if command == "train":
        argv = ["train", "flow_grpo", "--rewards.brightness", "1.0", "--eval_prompts", prompts]
        argv += ["--train_prompts", prompts, "--eval_rewards", "['mine.py:wrong']"]
    assert main([*argv, "--model", str(PIPELINE), "--allow_reward_code"]) == 2
    assert "reward 'mine.py:wrong' returned shape (2, 3)" in capsys.readouterr().err
