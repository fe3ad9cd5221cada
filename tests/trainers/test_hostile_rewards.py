"""Runs with rewards that write to their images, change the process, or try to end it: the same run, or a loud end."""

import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.config import save_yaml
from diffalign.rewards.base import REWARDS, FunctionReward, register
from diffalign.rollout.scoring import RewardWarning
from diffalign.runtime.errors import Interrupted
from tests.reliability.trainers import TRAINERS, default, held_out, short
from tests.trainers.made_refl import config, gradients, trainer_of

LORA = "pytorch_lora_weights.safetensors"
ONLINE = [name for name in TRAINERS if name != "diffusion_dpo"]


def light(images, prompts, metadata):
    return images.mean((1, 2, 3))


def harmful(images, prompts, metadata):
    """The same scores, and every harm that a reward can do."""
    found = light(images, prompts, metadata).clone()
    with torch.no_grad():
        images.zero_()
    prompts.clear()
    for entry in metadata:
        entry.clear()
    os.chdir("/")
    os.environ.clear()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    warnings.resetwarnings()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.set_autocast_enabled("cpu", True)
    torch.set_grad_enabled(False)
    return found


@pytest.fixture
def registered():
    """Registers functions for one test."""
    names = []

    def add(name, factory):
        register(name)(factory)
        names.append(name)
        return name

    yield add
    for name in names:
        del REWARDS[name]


def of_function(function):
    return lambda name: FunctionReward(name, function, differentiable=True)


def options(name, reward, folder):
    """A run that trains on ``reward``, or of preference pairs evaluates with it."""
    if name in ONLINE:
        return {"rewards": {reward: 1.0}, "max_unscored": 0.6}
    return {"eval_prompts": held_out(folder), "eval_rewards": (reward,)}


@pytest.mark.parametrize("name", default("flow_grpo"))
def test_a_hostile_reward_changes_nothing_of_a_run(name, tmp_path, registered):
    weights = []
    for function in (light, harmful):
        reward, folder = registered(function.__name__, of_function(function)), tmp_path / function.__name__
        folder.mkdir()
        args = short(name, folder / "run", max_train_steps=2, **options(name, reward, folder))
        before = os.getcwd(), dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()
        TRAINERS[name].make(args).train()
        assert (os.getcwd(), dict(os.environ), torch.get_default_dtype(), torch.get_num_threads()) == before
        weights.append(load_file(folder / "run" / LORA))
    for key, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][key])


def exits_on(which):
    """A function that leaves the program for some of its images."""
    calls = []

    def leaving(images, prompts, metadata):
        calls.append(len(images))
        # After the trial: for the first batch, and for its first image where it is asked again image by image.
        if which == "all" or len(calls) == 2 or (len(calls) == 3 and calls[1] > 1):
            raise SystemExit(0)
        return light(images, prompts, metadata)

    return leaving


def command(name, args, folder):
    file = folder / "config.yaml"
    save_yaml(args, file)
    return main(["train", "diffusion_dpo" if "dpo" in name else name, "--config", str(file)])


@pytest.mark.parametrize("name", ONLINE)
def test_a_reward_that_exits_now_and_then_costs_samples(name, tmp_path, registered):
    reward = registered("leaving", of_function(exits_on("some")))
    args = short(name, tmp_path / "run", max_train_steps=2, **options(name, reward, tmp_path))
    with pytest.warns(RewardWarning, match=r"failed on \d of \d samples \(RewardExit: it raised SystemExit"):
        assert command(name, args, tmp_path) == 0
    assert (tmp_path / "run" / LORA).is_file()


@pytest.mark.filterwarnings("ignore::diffalign.rollout.scoring.RewardWarning")
@pytest.mark.parametrize("name", ONLINE)
def test_a_reward_that_always_exits_is_no_success(name, tmp_path, registered, capsys):
    reward = registered("leaving", of_function(exits_on("all")))
    args = short(name, tmp_path / "run", max_train_steps=2, **options(name, reward, tmp_path))
    assert command(name, args, tmp_path) not in (0, None)
    assert "reward 'leaving' raised SystemExit (0,) (on 2 test images" in capsys.readouterr().err
    assert not (tmp_path / "run" / LORA).exists()


@pytest.mark.parametrize("name", ONLINE)
def test_a_reward_that_exits_while_it_is_made_is_no_success(name, tmp_path, registered):
    def factory(name):
        raise SystemExit(0)

    reward = registered("leaving", factory)
    args = short(name, tmp_path / "run", max_train_steps=2, **options(name, reward, tmp_path))
    assert command(name, args, tmp_path) not in (0, None)
    assert not (tmp_path / "run" / LORA).exists()


@pytest.mark.parametrize("name", ONLINE)
def test_a_real_interrupt_while_a_reward_works_saves_and_stops(name, tmp_path, registered):
    calls = []

    def slow(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) > 1:  # the first is the trial, before there is anything to save
            os.kill(os.getpid(), signal.SIGINT)
        return light(images, prompts, metadata)

    reward = registered("slow", of_function(slow))
    args = short(name, tmp_path / "run", max_train_steps=2, **options(name, reward, tmp_path))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
    try:
        with pytest.raises(Interrupted) as stopped:
            TRAINERS[name].make(args).train()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
    assert stopped.value.code == 130
    assert list((tmp_path / "run").glob("checkpoint-*"))


# The path of a reward's gradient --------------------------------------------------------------------------------------


def test_the_gradient_beside_a_hostile_reward_is_as_alone(tmp_path, train_prompts):
    """Two rewards of equal scores: the second must see what the first saw, and both gradients count."""
    both = {"first": FunctionReward("first", harmful, differentiable=True),
            "second": FunctionReward("second", light, differentiable=True)}  # fmt: skip
    alone = {name: FunctionReward(name, light, differentiable=True) for name in both}
    recipe = {"reward_loss": "negative"}
    found = [
        gradients(trainer_of(config(tmp_path / kind, recipe=recipe), train_prompts[:4], reward=list(table.values())))
        for kind, table in (("both", both), ("alone", alone))
    ]
    assert found[0].norm() > 0
    assert torch.equal(*found)


class Leaving(torch.autograd.Function):
    """Scores whose backward pass leaves the program for dark images."""

    @staticmethod
    def forward(ctx, images):
        ctx.count = len(images)
        ctx.shape = images.shape
        return images.mean((1, 2, 3))

    @staticmethod
    def backward(ctx, output):
        if ctx.count > 1:
            raise KeyboardInterrupt
        return output.view(-1, 1, 1, 1).expand(ctx.shape) / ctx.shape[1:].numel()


def test_what_a_rewards_backward_pass_raises_costs_no_run(tmp_path, train_prompts):
    """Asked image by image it has a gradient, and that is what is trained on."""
    recipe, tables = {"reward_loss": "negative"}, (lambda i, p, m: Leaving.apply(i), light)
    found = [
        gradients(trainer_of(config(tmp_path / str(k), recipe=recipe), train_prompts[:4],
                             reward=FunctionReward("mine", function, differentiable=True)))
        for k, function in enumerate(tables)
    ]  # fmt: skip
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-9)


def test_a_reward_that_fails_when_it_is_watched_costs_a_figure(tmp_path, train_prompts):
    """Sharpness asks trained rewards again, about images that moved."""
    evaluations = []

    def fails_with_a_gradient(images, prompts, metadata):
        evaluations.append(images.requires_grad)
        if images.requires_grad and len(images) == 2:
            raise SystemExit(0)
        return light(images, prompts, metadata)

    args = config(tmp_path, recipe={"reward_loss": "negative"}, max_train_steps=1, eval_images_per_prompt=1,
                  num_groups=1, rollout_batch_size=1, train_batch_size=1)  # fmt: skip
    reward = FunctionReward("mine", fails_with_a_gradient, differentiable=True)
    with pytest.warns(RewardWarning, match="no sharpness of reward 'mine': RewardExit"):
        trainer_of(args, train_prompts[:1], reward=reward, eval_dataset=train_prompts[:2]).train()
    assert (tmp_path / "run" / LORA).is_file()
