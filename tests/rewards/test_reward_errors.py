"""Whatever a reward raises, when it is called or in its backward pass, costs its sample and never the program."""

import asyncio
import os
import signal
import sys
import warnings

import pytest
import torch

from diffalign.rewards import FunctionReward, get_reward
from diffalign.rewards.base import RewardUnavailable, ask
from diffalign.rewards.remote import RewardServer
from diffalign.rewards.support.http_client import encode_image
from diffalign.rewards.support.isolation import RewardExit, isolated, named, said
from diffalign.rollout.scoring import RewardWarning, ScoreBook, score
from diffalign.runtime.signals import Signals
from diffalign.structures import Prompt
from tests.rewards.test_isolation import TEXTS, images_of, light, prompts_of, response_of

# What a reward raises -------------------------------------------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit(0)


class Own(BaseException):
    pass


ERRORS = [SystemExit(0), SystemExit("bye"), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), Own("own"),
          StopIteration(1), Unprintable(), MemoryError(), RecursionError(), ValueError("x" * 10**6)]  # fmt: skip


def raising(error):
    def mine(images, prompts, metadata):
        if TEXTS[1] in prompts:
            raise error
        return light(images)

    return FunctionReward("mine", mine, differentiable=True)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("aside", [False, True])
def test_whatever_a_reward_raises_costs_its_sample(error, aside):
    rewards = {"mine": raising(error), "brightness": get_reward("brightness")}
    with warnings.catch_warnings(record=True) as caught, ScoreBook(rewards) as book:
        warnings.simplefilter("always")
        book.add(images_of(), prompts_of(), aside)
        found = book.scores(torch.zeros(2))
    assert found["mine"].isnan().tolist() == [False, True]
    assert found["brightness"].isfinite().all()
    (message,) = [str(warning.message) for warning in caught if warning.category is RewardWarning]
    assert message.startswith("reward 'mine' failed on 1 of 2 samples")
    assert len(message) < 2000
    assert type(error).__name__ in message
    assert "'two squares'" in message


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_server_answers_what_its_reward_raises(error):
    server = RewardServer({"mine": raising(error)}, port=0)
    pictures = [encode_image(image) for image in images_of()]
    try:
        answer = response_of(server, {"reward": "mine", "prompts": TEXTS, "images": pictures})
    finally:
        server.server_close()
    assert answer["scores"] == [pytest.approx(0.8, abs=1e-3), None]
    assert type(error).__name__ in answer["error"]
    assert len(answer["error"]) < 2000


def test_warnings_name_a_few_prompts():
    def mine(images, prompts, metadata):
        raise ValueError("no")

    prompts = [Prompt(f"{i} " + "word " * 10**5) for i in range(64)]
    with pytest.warns(RewardWarning, match="'mine' failed on 64 of 64 .* and 56 more") as caught:
        score([get_reward(mine)], torch.zeros(64, 3, 1, 1), prompts)
    assert len(str(caught[0].message)) < 2000


def interrupting(swallow):
    def mine(images, prompts, metadata):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(10**6):  # until the handler has run
                pass
        except BaseException:
            if not swallow:
                raise
        return light(images)

    return get_reward(mine)


@pytest.mark.parametrize("swallow", [False, True])
def test_a_real_interrupt_ends_the_program(swallow):
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            score([interrupting(swallow)], images_of(), prompts_of())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_real_interrupt_of_a_run_is_noted_and_costs_nothing(capfd):
    with Signals() as signals:
        found = score([interrupting(False)], images_of(), prompts_of())
    assert signals.received == signal.SIGINT
    assert found["mine"].isfinite().all()


def test_isolated_returns_and_raises_as_the_function_does():
    assert isolated(lambda: 3) == 3
    with pytest.raises(KeyError):
        isolated(lambda: {}["a"])
    with pytest.raises(RewardExit, match=r"it raised SystemExit \(5,\)"):
        isolated(lambda: sys.exit(5))
    assert said(None) == "NoneType: None"
    assert named(["a", "a", "b"]) == "'a', 'b'"


# Gradients ------------------------------------------------------------------------------------------------------------


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, error):
        ctx.error = error
        return images.mean((1, 2, 3))

    @staticmethod
    def backward(ctx, output):
        if ctx.error is None:
            return torch.full((2, 3, 4, 4), torch.nan), None
        raise ctx.error


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), ValueError("no slope")])
def test_a_backward_pass_that_raises_is_an_error_of_the_reward(error):
    reward = FunctionReward("mine", lambda i, p, m: Backward.apply(i, error), differentiable=True)
    with pytest.raises((RewardExit, ValueError), match=r"no slope|it raised"):
        ask(reward, images_of().requires_grad_(), TEXTS, [{}, {}])


def test_a_gradient_that_is_not_finite_costs_the_score():
    reward = FunctionReward("mine", lambda i, p, m: Backward.apply(i, None), differentiable=True)
    assert ask(reward, images_of().requires_grad_(), TEXTS, [{}, {}])[0].isnan().all()


@pytest.mark.parametrize(
    "function", [lambda i, p, m: light(i).detach(), lambda i, p, m: torch.ones(2).requires_grad_()]
)
def test_a_reward_without_the_gradient_that_it_promises_is_said(function):
    with pytest.raises(RewardUnavailable, match="'mine': it declares differentiable=True"):
        ask(FunctionReward("mine", function, differentiable=True), images_of().requires_grad_(), TEXTS, [{}, {}])


def test_gradients_through_ask_are_those_of_the_reward():
    def mine(images, prompts, metadata):
        return (images**3 * torch.arange(1.0, 3.0).view(2, 1, 1, 1)).sum((1, 2, 3)).sin()

    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad((mine(images, None, None) * torch.tensor([2.0, -3.0])).sum(), images)
    values = ask(FunctionReward("mine", mine, differentiable=True), images, TEXTS, [{}, {}])[0]
    (found,) = torch.autograd.grad((values * torch.tensor([2.0, -3.0])).sum(), images)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert torch.equal(values, mine(images, None, None))
