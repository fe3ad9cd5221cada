"""Rewards compute in a rehearsal as in a run: memory of their networks and activations, without weights."""

import pytest
import torch

from diffalign.forecast.counter import Counter
from diffalign.forecast.fake_rewards import JUDGING, RehearsedReward, network_bytes
from diffalign.forecast.stand_ins import FiniteValues
from diffalign.rewards import get_reward
from diffalign.rewards.base import FunctionReward, names, registered, wants_latents
from tests.conftest import ROOT
from tests.forecast.measured import peak_of

JUDGES = ROOT / "assets/judges"
OPTIONS = {
    "pickscore": {"path": str(JUDGES / "pickscore"), "tokenizer": str(JUDGES / "pickscore")},
    "hpsv2.1": {"path": str(JUDGES / "hps")},
    "vqascore": {"path": str(JUDGES / "vqascore"), "tokenizer": str(JUDGES / "vqascore"), "precision": "no"},
}
# Published networks that are rehearsed: those of the presets, and a judge of 11 billion parameters.
PUBLISHED = ["pickscore", "clipscore", "hpsv2", "hpsv2.1", "image_reward", "aesthetic", "ict", "hp", "vqascore_xl"]
PROMPTS = ["a red circle", "two blue squares above a green triangle"]


def rehearsed(name, options, images, gradients, side=64):
    """The reward, with what it adds to the bytes that are alive."""
    counter = Counter(64)
    found = RehearsedReward(name, get_reward(name, **options), counter)
    with FiniteValues(), counter, counter.during("score"):
        found.prepare((side, side))
        with counter.fake:
            pixels = torch.empty(images, 3, side, side).requires_grad_(gradients)
        counter.restart()
        start = counter.live
        prompts = [PROMPTS[i % 2] for i in range(images)]
        if gradients:
            scores = found(pixels, prompts, [{}] * images)
            scores.sum().backward()
        else:
            with torch.no_grad():
                found(pixels, prompts, [{}] * images)
        extra = max(counter.peaks.values()) - start
    return found, counter, extra


@pytest.mark.parametrize("gradients", [False, True], ids=["scores", "gradients"])
@pytest.mark.parametrize("name", OPTIONS)
def test_memory_of_scoring_is_the_measured_one(name, gradients):
    images, reward = 8, get_reward(name, **OPTIONS[name])

    def score():
        pixels = torch.rand(images, 3, 64, 64, requires_grad=gradients)
        with torch.set_grad_enabled(gradients):
            scores = reward(pixels, [PROMPTS[i % 2] for i in range(images)], [{}] * images)
            if gradients:
                scores.sum().backward()

    score()  # loads its network
    found, _, extra = rehearsed(name, OPTIONS[name], images, gradients)
    assert found.note is None
    assert extra + 8 * 3 * 64 * 64 * 4 == pytest.approx(peak_of(score), rel=0.2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_has_the_parameters_of_its_card(name):
    """Networks of published size, without weights, network or time."""
    counter = Counter()
    reward = get_reward(name)
    found = RehearsedReward(name, reward, counter)
    with FiniteValues(), counter, counter.during("score"):
        found.prepare((512, 512))
    assert found.note is None
    width = getattr(getattr(reward, "weights", None), "dtype", torch.float32).itemsize
    assert found.size / width == pytest.approx(registered(name).facts.millions * 1e6, rel=0.03)
    assert counter.flops["score", JUDGING] == 0  # its only call was to load it


def test_what_is_not_rehearsed_is_said_in_a_line():
    for name in names():
        counter = Counter()
        try:
            reward = get_reward(name)
        except (ValueError, ImportError):
            continue  # one that needs options
        found = RehearsedReward(name, reward, counter)
        if (
            not registered(name).facts.millions
            or registered(name).facts.served
            or name in (*PUBLISHED, "vqascore", "vqascore_qwen2.5", "ict_hp", "f_clipscore")
        ):
            continue
        with FiniteValues(), counter, counter.during("score"):
            found.prepare((512, 512))
        assert found.note is not None, name
        assert found.note.startswith(f"reward {name}: ")
        assert "\n" not in found.note
        assert "GiB of weights are counted" in found.note
        width = getattr(getattr(reward, "weights", None), "dtype", torch.float32).itemsize
        assert found.size == pytest.approx(registered(name).facts.millions * 1e6 * width, rel=0.01)


@pytest.mark.parametrize("path", ["", "head.pth"])
def test_a_reward_whose_file_is_not_its_whole_network_counts_by_its_card(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "head.pth").write_bytes(b"0" * 1000)
    for name in ("mps", "aesthetic_v2.5"):
        assert network_bytes(get_reward(name, path=path)) == registered(name).facts.millions * 4e6


def test_weights_on_a_server_are_neither_counted_nor_rehearsed():
    counter = Counter()
    found = RehearsedReward("far", get_reward("unified_reward", url="http://127.0.0.1:1"), counter)
    with counter, counter.during("score"):
        found.prepare((64, 64))
    assert found.note is None
    assert found.size == 0


def test_a_rehearsed_reward_of_latents_wants_latents():
    counter = Counter()
    reward = FunctionReward(
        "mine", lambda samples, prompts, metadata: samples.flatten(1).mean(1), True, wants="latents"
    )
    found = RehearsedReward("mine", reward, counter)
    assert wants_latents(found)
    assert not wants_latents(RehearsedReward("pickscore", get_reward("pickscore"), counter))
    with counter, counter.during("score"):
        latents = torch.rand(2, 16, 4, 4).requires_grad_()
        found(latents, PROMPTS, [{}] * 2).sum().backward()
    assert latents.grad.shape == (2, 16, 4, 4)


def test_a_reward_of_the_user_is_named():
    counter = Counter()
    found = RehearsedReward("mine", get_reward(lambda images, prompts, metadata: images.mean((1, 2, 3))), counter)
    with counter, counter.during("score"):
        found.prepare((64, 64))
        assert len(found(torch.rand(2, 3, 64, 64), PROMPTS, [{}] * 2)) == 2
    assert found.note == "reward mine: what it computes is not rehearsed: it is not among the registered rewards"


@pytest.mark.parametrize("offload", [False, True])
def test_a_network_that_is_offloaded_is_resident_while_it_scores(offload):
    counter = Counter(64)
    reward = get_reward("pickscore", **OPTIONS["pickscore"], offload=offload)
    found = RehearsedReward("pickscore", reward, counter)
    with FiniteValues(), counter, counter.during("score"), torch.no_grad():
        found.prepare((64, 64))
        held = counter.live
        with counter.fake:
            images = torch.empty(2, 3, 64, 64)
        found(images, PROMPTS, [{}] * 2)
    assert found.size > 0
    assert (held >= found.size) != offload
    assert max(counter.peaks.values()) > found.size


def test_scores_beside_sampling_hold_their_activations_meanwhile():
    counter = Counter(64)
    found = RehearsedReward("pickscore", get_reward("pickscore", **OPTIONS["pickscore"]), counter, overlaps=True)
    with FiniteValues(), counter, counter.during("sample"), torch.no_grad():
        found.prepare((64, 64))
        with counter.fake:
            images = torch.empty(2, 3, 64, 64)
        before = counter.live
        found(images, PROMPTS, [{}] * 2)
        assert counter.live > before
        found.release()
        assert counter.live == before
