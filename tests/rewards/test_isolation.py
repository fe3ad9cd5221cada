"""A reward cannot alter what others see, nor the process that calls it, nor end it."""

import dataclasses
import gc
import json
import logging
import os
import random
import signal
import sys
import threading
import warnings
from types import MappingProxyType

import numpy as np
import pytest
import torch

from diffalign.commands.relabel import Pending, judge
from diffalign.commands.score import score_images
from diffalign.rewards import FunctionReward, get_reward
from diffalign.rewards.base import ask
from diffalign.rewards.combine import Combined
from diffalign.rewards.remote import RewardServer
from diffalign.rewards.support.http_client import encode_image
from diffalign.rewards.support.isolation import SETTINGS, isolated
from diffalign.rewards.support.reward_server import ScoreRequest
from diffalign.rollout.scoring import RewardWarning, ScoreBook, score
from diffalign.structures import Pair, Prompt

TEXTS = ["a red circle", "two squares"]
METADATA = {"include": [{"class": "circle", "count": 1}], "tag": "one"}


def images_of(value=0.8):
    return torch.full((2, 3, 4, 4), value)


def prompts_of():
    return [Prompt(text, {"include": [{"class": "circle", "count": 1}], "tag": "one"}) for text in TEXTS]


def light(images):
    return images.mean((1, 2, 3))


# What a reward is given -----------------------------------------------------------------------------------------------


def in_place(images, prompts, metadata):
    images.sub_(0.5).div_(2)


def through_numpy(images, prompts, metadata):
    images.detach().numpy()[:] = 0


def through_data(images, prompts, metadata):
    images.data.zero_()


def through_a_view(images, prompts, metadata):
    images[0].fill_(0.1)


def resized(images, prompts, metadata):
    images.detach().resize_(1)


def words(images, prompts, metadata):
    prompts[0] = "another"
    prompts.clear()


def facts(images, prompts, metadata):
    metadata[0]["include"][0]["count"] = 99
    metadata[0]["new"] = 1
    metadata[1].clear()


ALTERED = [in_place, through_numpy, through_data, through_a_view, resized, words, facts]


def altering(how):
    def mine(images, prompts, metadata):
        found = light(images).clone()
        with torch.no_grad():
            how(images, prompts, metadata)
        return found

    return mine


class Witness:
    """Remembers what it was given, as it was then."""

    name, differentiable, range = "witness", True, (0.0, 1.0)

    def __init__(self):
        self.seen = []

    def __call__(self, images, prompts, metadata):
        self.seen.append(
            (images.detach().clone(), list(prompts), [dict(m, include=str(m["include"])) for m in metadata])
        )
        return light(images)

    def check(self, images=None):
        images = images_of() if images is None else images
        for seen, prompts, metadata in self.seen:
            torch.testing.assert_close(seen, images, rtol=0, atol=1e-6)
            assert prompts == TEXTS
            assert metadata == [{**METADATA, "include": str(METADATA["include"])}] * 2
        assert self.seen


def by_score(rewards):
    images, prompts = images_of(), prompts_of()
    found = score(rewards, images, prompts).values
    assert torch.equal(images, images_of())
    assert prompts == prompts_of()
    return found


def by_score_aside(rewards):
    images, prompts = images_of(), prompts_of()
    with ScoreBook(rewards, keep_images=True) as book:
        book.add(images, prompts, aside=True)
        book.add(images_of(), prompts_of())
        found = {name: values[:2] for name, values in book.scores(torch.zeros(4)).values.items()}
        assert torch.equal(torch.cat(book.images), torch.cat([images_of()] * 2))
    assert prompts == prompts_of()
    return found


def by_combined(rewards):
    combined = Combined("all", {name: (reward, 1.0) for name, reward in rewards.items()})
    ask(combined, images_of(), TEXTS, [dict(METADATA), dict(METADATA)])
    return by_score(rewards)


def by_score_images(rewards):
    images, metadata = images_of(), [p.metadata for p in prompts_of()]
    found = score_images(images, TEXTS, rewards, metadata=metadata)
    assert torch.equal(images, images_of())
    assert metadata == [METADATA] * 2
    return found


def by_relabel(rewards):
    pictures = tuple((images_of()[0] * 255).byte() for _ in range(2))
    entries = [Pending(Pair("k", prompt, (None, None), 1.0), "c", pictures) for prompt in prompts_of()]
    found = judge(rewards, [entries[0]])
    return {name: torch.tensor([found[0][f"{name}/0"], found[0][f"{name}/1"]]) for name in rewards}


def response_of(server, body):
    return server._score_request(ScoreRequest.parse(json.dumps(body).encode()))


def by_server(rewards):
    server = RewardServer(rewards, port=0)
    pictures = [encode_image(image) for image in images_of()]
    try:
        bodies = {name: {"reward": name, "prompts": TEXTS, "metadata": [METADATA] * 2, "images": pictures}
                  for name in rewards}  # fmt: skip
        return {name: torch.tensor(response_of(server, body)["scores"]) for name, body in bodies.items()}
    finally:
        server.server_close()


def in_place_with_a_gradient(images, prompts, metadata):
    return images.mul_(2).mean((1, 2, 3)) / 2


def test_a_differentiable_reward_may_write_to_its_images():
    images = images_of().requires_grad_()
    reward = FunctionReward("mine", in_place_with_a_gradient, differentiable=True)
    values = ask(reward, images * 1, TEXTS, [{}, {}])[0]
    (gradient,) = torch.autograd.grad(values.sum(), images)
    torch.testing.assert_close(values, torch.full((2,), 0.8))
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / 48))


def by_gradient(rewards):
    images = images_of().requires_grad_()
    seen = images * 1  # no leaf, as decoded images are
    texts, metadata = list(TEXTS), [p.metadata for p in prompts_of()]
    found = {name: ask(reward, seen, texts, metadata)[0] for name, reward in rewards.items()}
    (gradient,) = torch.autograd.grad(sum(v.sum() for v in found.values()), images)
    torch.testing.assert_close(gradient.sum((1, 2, 3)), torch.full((2,), float(len(rewards))))
    assert torch.equal(seen, images_of())
    assert (texts, metadata) == (TEXTS, [METADATA] * 2)
    return {name: values.detach() for name, values in found.items()}


CALLERS = [by_score, by_score_aside, by_combined, by_score_images, by_relabel, by_server, by_gradient]


@pytest.mark.parametrize("how", ALTERED)
@pytest.mark.parametrize("caller", CALLERS)
def test_a_reward_cannot_alter_what_another_sees(caller, how):
    witness = Witness()
    mine = FunctionReward("mine", altering(how), differentiable=True)
    found = caller({"mine": mine, "witness": witness, "brightness": get_reward("brightness")})
    for name in ("mine", "witness", "brightness"):
        torch.testing.assert_close(found[name].float(), torch.full((2,), 0.8), rtol=0, atol=1e-6)
    if caller is not by_relabel:
        witness.check()


@pytest.mark.parametrize("caller", [by_score, by_score_aside, by_gradient])
def test_a_reward_that_keeps_what_it_saw_cannot_alter_it_later(caller):
    kept = []

    def mine(images, prompts, metadata):
        result = light(images).clone()
        with torch.no_grad():
            for images_, values, prompts_, metadata_ in kept:
                images_.zero_()
                values.zero_()
                prompts_.clear()
                metadata_.clear()
        kept.append((images, result.detach(), prompts, metadata))
        return result

    witness = Witness()
    first = caller({"mine": FunctionReward("mine", mine, differentiable=True), "witness": witness})
    before = {name: values.clone() for name, values in first.items()}
    caller({"mine": FunctionReward("mine", mine, differentiable=True), "witness": witness})
    for name in before:
        assert torch.equal(first[name], before[name])
    witness.check()


def test_a_reward_that_returns_one_buffer_each_time_keeps_no_hold_of_scores():
    buffer = torch.zeros(2)

    def mine(images, prompts, metadata):
        return buffer.copy_(light(images))

    one, two = (score([get_reward(mine)], images_of(value), prompts_of())["mine"] for value in (0.2, 0.6))
    assert (one.tolist(), two.tolist()) == (pytest.approx([0.2] * 2), pytest.approx([0.6] * 2))


def test_groups_are_the_rewards_own():
    class Ranks:
        name, differentiable, range, needs_groups = "ranks", False, (0.0, 1.0), True

        def __call__(self, images, prompts, metadata, groups):
            groups.zero_()
            return light(images)

    groups = torch.tensor([0, 1])
    score([Ranks(), Ranks()][:1], images_of(), prompts_of(), groups)
    assert groups.tolist() == [0, 1]


@pytest.mark.parametrize("metadata", [{"lock": threading.Lock()}, MappingProxyType({"a": [1]}), {"f": sys.stdout}])
def test_metadata_that_cannot_be_copied_are_passed_on(metadata):
    seen = []

    def mine(images, prompts, metadata):
        seen.extend(metadata)
        return light(images)

    score([get_reward(mine)], images_of(), [Prompt("a", metadata)] * 2)
    assert [dict(entry) for entry in seen] == [dict(metadata)] * 2


def test_rewards_of_this_package_get_the_images_themselves(monkeypatch):
    """They are held to leave them alone, so that nothing is copied for them."""
    found, images = [], images_of()
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **o: found.append(self.shape) or clone(self, **o))
    score([get_reward("brightness"), get_reward("sharpness")], images, prompts_of())
    assert images.shape not in found
    score([get_reward(altering(in_place))], images, prompts_of())
    assert found.count(images.shape) == 1


# The state of the process ---------------------------------------------------------------------------------------------

CHANGES = {
    "default device": lambda: torch.set_default_device("meta"),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "grad mode": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "fill of uninitialized memory": lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
    "cudnn": lambda: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
    "float32 precision": lambda: torch.set_float32_matmul_precision("medium"),
    "float32 precision by part": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "float32 precision, TF32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "float32 precision, cuDNN": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "float32 precision everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "attention kernels": lambda: torch.backends.cuda.enable_math_sdp(not torch.backends.cuda.math_sdp_enabled()),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "autocast on the accelerator": lambda: torch.set_autocast_dtype("cuda", torch.bfloat16),
    "torch's generator": lambda: torch.manual_seed(5),
    "numpy's generator": lambda: np.random.seed(5),
    "numpy's errors": lambda: np.seterr(all="ignore"),
    "Python's generator": lambda: random.seed(5),
    "working directory": lambda: os.chdir("/"),
    "environment": lambda: (os.environ.update(NEW="1", HOME="/elsewhere"), os.environ.pop("PATH")),
    "environment, emptied": lambda: os.environ.clear(),
    "garbage collector": gc.disable,
    "recursion limit": lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 7),
    "numpy's generator, of another kind": lambda: np.random.set_bit_generator(np.random.PCG64(1)),
    "timers": lambda: signal.setitimer(signal.ITIMER_REAL, 1000),
    "umask": lambda: os.umask(0o777),
    "blocked signals": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}),
    "standard streams": lambda: os.close(0),
    "level of logging": lambda: logging.disable(logging.CRITICAL),
}


def state():
    return {name: setting.read() for name, setting in SETTINGS.items()}


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_reward_changes_in_the_process_is_put_back(change, raises, aside):
    seen = []

    def mine(images, prompts, metadata):
        before = state()
        CHANGES[change]()
        seen.append(state() != before)
        if raises:
            raise ValueError("after all")
        return light(images.cpu() if images.device.type == "cpu" else images)

    before = state()
    with (
        ScoreBook({"mine": get_reward(mine), "brightness": get_reward("brightness")}) as book,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RewardWarning)
        book.add(images_of(), prompts_of(), aside)
        found = book.scores(torch.zeros(2))
    assert seen[0], "the change itself is seen"
    assert state() == before
    torch.testing.assert_close(found["brightness"], torch.full((2,), 0.8))


def test_every_setting_has_a_change():
    assert {name.partition(",")[0].removesuffix(" by part").removesuffix(" everywhere") for name in CHANGES} == {
        *SETTINGS
    } - {"the accelerator's generators"}


def test_a_setting_that_cannot_be_put_back_keeps_no_other_from_it(monkeypatch):
    def fails():
        if os.environ.get("CHANGED"):
            raise OSError("gone")

    monkeypatch.setitem(SETTINGS, "default device", dataclasses.replace(SETTINGS["default device"], read=fails))
    before = random.getstate()
    with pytest.warns(UserWarning, match="default device, and it cannot be restored: OSError: gone"):
        isolated(lambda: (random.random(), os.environ.update(CHANGED="1"), warnings.simplefilter("error")))
    assert random.getstate() == before
    assert "CHANGED" not in os.environ


@pytest.mark.parametrize(
    "change",
    [
        lambda: warnings.simplefilter("ignore"),
        lambda: warnings.filterwarnings("error", message="x"),
        warnings.resetwarnings,
        lambda: setattr(warnings, "filters", []),
        lambda: warnings.catch_warnings().__enter__() or warnings.simplefilter("ignore"),
    ],
)
def test_filters_of_warnings_are_put_back(change):
    def mine(images, prompts, metadata):
        change()
        return light(images)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        score([get_reward(mine)], images_of(), prompts_of())
        assert warnings.filters == before
        warnings.warn("still heard", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["still heard"]


def test_standard_streams_and_signal_handlers_are_put_back():
    streams, handlers = (sys.stdout, sys.stderr), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def mine(images, prompts, metadata):
        sys.stdout = sys.stderr = None
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: None)
        return light(images)

    score([get_reward(mine)], images_of(), prompts_of())
    assert (sys.stdout, sys.stderr) == streams
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_directory_that_is_gone_is_said(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def mine(images, prompts, metadata):
        os.chdir("/")
        folder.rmdir()
        return light(images)

    with pytest.warns(UserWarning, match="gone cannot be entered again"):
        score([get_reward(mine)], images_of(), prompts_of())


def test_random_numbers_of_a_reward_move_nothing_for_the_run():
    def mine(images, prompts, metadata):
        return torch.rand(len(images)) + random.random() + np.random.rand()

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    score([get_reward(mine)], images_of(), prompts_of())
    assert torch.equal(torch.rand(3), expected)
