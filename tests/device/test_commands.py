"""Commands and helpers ask for the accelerator in one place."""

import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffalign import device, score_images
from diffalign.cli import main
from diffalign.commands import gallery
from diffalign.commands.doctor import machine, probes
from diffalign.commands.relabel import Pending, judge
from diffalign.evaluation.diversity import embedding_distance, pairwise_distance
from diffalign.forecast.dry_run import free_memory
from diffalign.rewards import FunctionReward, clip, get_reward
from diffalign.rewards.remote import RemoteReward, RewardServer
from diffalign.rewards.support.http_client import HTTPClient
from diffalign.rewards.support.isolation import isolated
from diffalign.rewards.support.probe import try_rewards
from diffalign.runtime.oom import make_room
from diffalign.runtime.provenance import machine as origin
from diffalign.structures import Pair, Prompt
from tests.conftest import ROOT
from tests.device import strict
from tests.device.runs import train


@pytest.fixture
def reward():
    """A reward that wants images of the device."""

    def brightness(images, prompts, metadata):
        assert images.device.type == strict.NAME
        return images.mean((1, 2, 3))

    return FunctionReward("brightness", brightness)


def test_the_device_is_the_accelerator_unless_the_launcher_says_otherwise(monkeypatch):
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    assert device.default_device().type == strict.NAME
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert device.default_device() == torch.device(strict.NAME, 0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert device.default_device() == torch.device("cpu")


def test_images_are_scored_on_the_device(reward):
    found = score_images([Image.new("RGB", (8, 8), "white")], "", {"brightness": reward})
    assert found["brightness"].tolist() == [1.0]


def test_pairs_are_relabelled_on_the_device(reward):
    images = tuple(torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 255))
    pair = Pair("0", Prompt(""), images, 1.0)
    (scores,) = judge({"brightness": reward}, [Pending(pair, "", images)])
    assert scores == {"brightness/0": 0.0, "brightness/1": 1.0}


def test_the_server_and_the_probe_of_rewards_use_the_device(reward):
    with RewardServer({"brightness": reward}, port=0) as server:
        assert server.device.type == strict.NAME
    try_rewards({"brightness": reward}, [Prompt("a"), Prompt("b")])


def test_a_network_behind_the_server_scores_on_the_device(monkeypatch):
    folder = str(ROOT / "assets/judges/pickscore")
    judge = get_reward("pickscore", path=folder, tokenizer=folder)
    images, prompts = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ["a red circle"] * 2
    expected = judge(images, prompts, [{}] * 2)
    devices, plain = [], clip.on_device

    def watched(network, weights, device):
        devices.append(device.type)
        return plain(network, weights, device)

    monkeypatch.setattr(clip, "on_device", watched)
    with RewardServer({"pickscore": judge}, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = HTTPClient(f"http://127.0.0.1:{server.server_port}", timeout=60.0)
        found = RemoteReward("pickscore", line, "pickscore")(images.to(strict.NAME), prompts, [{}] * 2)
        server.shutdown()
    assert set(devices) == {strict.NAME}
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", ["eval", "compare"])
def test_checkpoints_are_sampled_and_scored_on_the_device(command, tmp_path, monkeypatch):
    devices, plain = set(), gallery.score

    def watched(rewards, images, *args, **kwargs):
        devices.add(images.device.type)
        return plain(rewards, images, *args, **kwargs)

    monkeypatch.setattr(gallery, "score", watched)
    train("flow_grpo", run := tmp_path / "run", max_train_steps=1)
    prompts = str(ROOT / "assets/prompts/shapes_validation.jsonl")
    options = ["--prompts", prompts, "--limit", "2", "--rewards", "brightness", "--output_dir", str(tmp_path / "out")]
    assert main([command, str(run), *options]) == 0
    assert devices == {strict.NAME}


def test_checks_and_forecasts_see_the_device():
    assert probes.training_device()[0].type == strict.NAME
    assert all(finding.status != "problem" for finding in machine.devices())
    assert all(finding.status != "problem" for finding in probes.lora_round_trip(ROOT / "assets/shapes-sd3"))
    assert free_memory()[0] > 0
    assert origin(1, strict.NAME)["processor"] == strict.NAME


def test_a_reward_that_seeds_does_not_seed_the_device():
    before = torch.strict.get_rng_state()
    isolated(lambda: torch.manual_seed(7))
    assert torch.equal(torch.strict.get_rng_state(), before)
    torch.manual_seed(7)
    assert not torch.equal(torch.strict.get_rng_state(), before)


def test_memory_is_emptied_when_a_batch_did_not_fit():
    config = SimpleNamespace(auto_batch=True, train_batch_size=4)
    assert "train_batch_size is 2" in make_room(config, "update", 0, 1, torch.OutOfMemoryError("full"))


def test_figures_of_images_need_no_float64(both_precisions):
    images, groups = torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 1, 1])
    for measure, rows in ((pairwise_distance, images), (embedding_distance, images.flatten(1))):
        found = measure(rows.to(strict.NAME), groups.to(strict.NAME))
        assert found == pytest.approx(measure(rows, groups), rel=1e-6)


def test_means_in_float64_are_as_exact_without_it(both_precisions):
    x = torch.rand(2, 16_390, generator=torch.Generator().manual_seed(0))
    leaf = x.to(strict.NAME).requires_grad_()
    found = device.mean_float64(leaf)
    found.sum().backward()
    assert found.dtype == torch.float64
    exact = x.double().mean(1)
    torch.testing.assert_close(found.detach().cpu(), exact, rtol=1e-12 if both_precisions else 1e-8, atol=0)
    torch.testing.assert_close(leaf.grad.cpu(), torch.full_like(x, 1 / x.shape[1]))
