"""Rewards that are asked while the caller goes on: in another thread, and all else as if they were not."""

import ctypes
import re
import signal
import threading
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from diffalign.rewards import FunctionReward, get_reward
from diffalign.rewards.base import RewardUnavailable
from diffalign.rollout.scoring import RewardWarning, ScoreBook
from diffalign.structures import Prompt
from tests.conftest import ROOT

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt(text) for text in ("a red circle", "two squares", "a blue star", "a circle", "a star", "a square")]
PARTS = (slice(0, 2), slice(2, 4), slice(4, 6))
JUDGE = str(ROOT / "assets/judges/pickscore")
PATIENCE = 20.0  # seconds; only a test that fails waits so long


def brightness(images, prompts, metadata):
    light = images.mean((1, 2, 3))
    return light, {"doubt": light / 10}


class Ranks:
    name, differentiable, needs_groups, range = "ranks", False, True, (0.0, 9.0)

    def __call__(self, images, prompts, metadata, groups):
        light = images.mean((1, 2, 3))
        return torch.tensor([float((light[groups == g] < x).sum()) for x, g in zip(light, groups, strict=True)])


def book_of(function, **others):
    return ScoreBook({"mine": FunctionReward("mine", function), **others})


def fill(book, aside, parts=PARTS):
    for rows in parts:
        book.add(IMAGES[rows], PROMPTS[rows], aside)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("rewards")]


@pytest.mark.parametrize("keep", [False, True])
def test_scores_are_the_same_to_the_bit(keep):
    judge = get_reward("pickscore", path=JUDGE, tokenizer=JUDGE)
    rewards = {"mine": FunctionReward("mine", brightness), "ranks": Ranks(), "judge": judge}
    found = []
    for aside in (False, True):
        with ScoreBook({name: rewards[name] for name in (rewards if keep else ("mine", "judge"))}, keep) as book:
            fill(book, aside)
            found.append((book.scores(torch.arange(6) // 3), book.images))
    (plain, images), (beside, others) = found
    assert list(plain) == list(beside) == ["mine", "mine/doubt", "judge", *(["ranks"] if keep else [])]
    assert all(torch.equal(plain[name], beside[name]) for name in plain)
    assert len(images) == len(others) == 3 * keep
    assert not keep or torch.equal(torch.cat(others), IMAGES)


def test_the_caller_goes_on_while_rewards_are_asked():
    went_on = threading.Event()

    def waits(images, prompts, metadata):
        assert went_on.wait(PATIENCE)
        return images.mean((1, 2, 3))

    with book_of(waits) as book:
        book.add(IMAGES, PROMPTS, aside=True)
        went_on.set()
        assert book.scores(torch.zeros(6))["mine"].isfinite().all()


def test_one_thread_at_a_time_in_the_order_of_micro_batches():
    busy, seen = threading.Lock(), []

    def noted(images, prompts, metadata):
        assert busy.acquire(blocking=False)
        time.sleep(0.01)
        seen.append((prompts[0], threading.current_thread() is threading.main_thread()))
        busy.release()
        return images.mean((1, 2, 3))

    with book_of(noted) as book:
        for rows, aside in zip(PARTS, (True, True, False), strict=True):
            book.add(IMAGES[rows], PROMPTS[rows], aside)
        scores = book.scores(torch.zeros(6))
    assert seen == [("a red circle", False), ("a blue star", False), ("a star", True)]
    assert torch.equal(scores["mine"], IMAGES.mean((1, 2, 3)))


@pytest.mark.parametrize("last", [False, True])
def test_what_ends_a_run_is_raised_in_the_callers_thread_with_its_traceback(last):
    def broken(images, prompts, metadata):
        raise RewardUnavailable("no weights")

    with book_of(broken) as book:
        fill(book, True, PARTS[:1])
        with pytest.raises(RewardUnavailable, match="no weights") as caught:
            book.scores(torch.zeros(2)) if last else fill(book, True, PARTS[1:])
    assert "in broken\n" in "".join(traceback.format_exception(caught.value))


def test_warnings_are_the_callers_threads():
    def fails(images, prompts, metadata):
        if "two squares" in prompts:
            raise RuntimeError("cannot see it")
        return images.mean((1, 2, 3))

    with book_of(fails) as book, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fill(book, True, PARTS[:2])
        assert [str(one.message) for one in caught if one.category is RewardWarning] == [
            "reward 'mine' failed on 1 of 2 samples (RuntimeError: cannot see it); they count as NaN: 'two squares'"
        ]
        assert book.scores(torch.zeros(4))["mine"].isnan().tolist() == [False, True, False, False]
        assert len(caught) == 1
    with book_of(fails) as book, warnings.catch_warnings():
        warnings.simplefilter("error")
        fill(book, True, PARTS[:1])
        with pytest.raises(RewardWarning, match="two squares"):
            fill(book, True, PARTS[1:])


def test_what_was_warned_of_is_not_lost_where_another_reward_ends_the_run():
    def broken(images, prompts, metadata):
        raise RewardUnavailable("no weights")

    with book_of(lambda images, *_: images.mean((1, 2, 3)) / 0, other=FunctionReward("other", broken)) as book:
        fill(book, True, PARTS[:1])
        with pytest.warns(RewardWarning, match="'mine' failed on 2 of 2"), pytest.raises(RewardUnavailable):
            book.scores(torch.zeros(2))


@pytest.mark.parametrize("interrupt", [False, True])
def test_a_caller_that_leaves_waits_for_what_is_under_way(interrupt):
    added, asked, done = threading.Event(), threading.Event(), []

    def slow(images, prompts, metadata):
        assert added.wait(PATIENCE)
        asked.set()
        if interrupt:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.05)
        done.append(len(images))
        return images.mean((1, 2, 3))

    def leaves():
        with book_of(slow) as book:
            fill(book, True, PARTS[:1])
            added.set()
            assert asked.wait(PATIENCE)
            fill(book, True, PARTS[1:2]) if interrupt else 1 / 0

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
    try:
        with pytest.raises(KeyboardInterrupt if interrupt else ZeroDivisionError):
            leaves()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert done == [2]


def openmp_threads():
    """What OpenMP itself would take; torch sets it at the first question."""
    maps = Path("/proc/self/maps")
    found = re.search(r"\S+/libgomp\S+", maps.read_text()) if maps.exists() else None
    return ctypes.CDLL(found[0]).omp_get_max_threads() if found else None


def test_torch_is_as_in_the_main_thread():
    states, threads = [], torch.get_num_threads()

    def noted(images, prompts, metadata):
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        states.append((*modes, torch.get_default_dtype(), openmp_threads(), torch.get_num_threads()))
        return images.mean((1, 2, 3))

    torch.set_num_threads(3)  # not what the environment says
    try:
        for aside in (False, True):
            with book_of(noted) as book:
                fill(book, aside, PARTS[:1])
    finally:
        torch.set_num_threads(threads)
    assert states[0] == states[1]
    assert states[0][:3] == (False, False, False)
