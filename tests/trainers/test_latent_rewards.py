"""Rewards of latents: every trainer hands them the sampler's latents, and decodes nothing where none wants images."""

from dataclasses import dataclass

import pytest
import torch

from diffalign.models import load_model
from diffalign.models.base import DiffusionModel
from diffalign.rewards import FunctionReward
from diffalign.rewards.base import ask, wanted
from diffalign.rewards.combine import Combined
from diffalign.rollout.scoring import ScoreBook, score
from diffalign.structures import Prompt
from tests.conftest import PIPELINE
from tests.phases import collect, update
from tests.reliability.trainers import TRAINERS, held_out, short

REWARDED = [name for name in TRAINERS if name != "diffusion_dpo"]


def energy(samples, prompts, metadata):
    return samples.square().flatten(1).mean(1)


def latent_reward(function=energy, name="energy"):
    return FunctionReward(name, function, differentiable=True, wants="latents")


def image_reward():
    return FunctionReward("light", lambda images, prompts, metadata: images.mean((1, 2, 3)), differentiable=True)


def trainer(name, folder, rewards, **changes):
    return TRAINERS[name].trainer(args=short(name, folder, rewards={}, **changes), reward_funcs=rewards)


@pytest.fixture
def decoded(monkeypatch):
    """Shapes of what is decoded."""
    shapes, plain = [], DiffusionModel.decode
    monkeypatch.setattr(DiffusionModel, "decode", lambda model, x: shapes.append(tuple(x.shape)) or plain(model, x))
    return shapes


def iteration(run):
    batch = collect(run)
    update(run, batch)
    return batch


@pytest.mark.parametrize("name", REWARDED)
def test_nothing_is_decoded_where_every_reward_wants_latents(name, tmp_path, decoded):
    asked = []

    def seen(samples, prompts, metadata):
        asked.append(tuple(samples.shape[1:]))
        return energy(samples, prompts, metadata)

    both = Combined("both", {"a": (latent_reward(seen), 1.0), "b": (latent_reward(), 1.0)})
    iteration(trainer(name, tmp_path, [latent_reward(seen), both]))
    assert not decoded
    assert (8, 8, 8) in asked


@pytest.mark.parametrize("name", REWARDED)
def test_images_are_decoded_where_one_reward_wants_them(name, tmp_path, decoded):
    seen = set()

    def note(samples, prompts, metadata):
        seen.add(samples.shape[1])
        return energy(samples, prompts, metadata)

    iteration(trainer(name, tmp_path, [latent_reward(note), image_reward()]))
    assert decoded
    assert 8 in seen


@pytest.mark.parametrize("name", [name for name in REWARDED if name != "refl"])
def test_the_latents_are_those_of_the_images(name, tmp_path):
    """A latent reward that decodes by itself scores as a reward of images does."""
    model = load_model(str(PIPELINE))

    def decoding(latents, prompts, metadata):
        return (latents if latents.shape[1] == 3 else model.decode(latents)).mean((1, 2, 3))

    batch = collect(trainer(name, tmp_path, [latent_reward(decoding, "late"), image_reward()]))
    rollout = getattr(batch, "rollout", None) or batch
    late, light = (rollout.buffer.rewards[name] for name in ("late", "light"))
    torch.testing.assert_close(late, light, equal_nan=True)


def test_the_gradient_of_refl_is_that_of_the_latents(tmp_path):
    run = trainer("refl", tmp_path, [latent_reward(name="energy")])
    batch = collect(run)
    (minibatch,) = run.algorithm.minibatches(batch, 0)
    loss, metrics = run.algorithm.loss(minibatch.micros[0])
    loss.backward()
    assert metrics["reward/energy"].isfinite()
    assert max(p.grad.abs().max() for p in run.loop.state.parameters if p.grad is not None) > 0


def test_a_latent_reward_that_fails_costs_its_sample(tmp_path):
    calls = []

    def failing(latents, prompts, metadata):
        calls.append(len(latents))
        if len(latents) > 1 or len(calls) == 2:
            raise ValueError("no")
        return energy(latents, prompts, metadata)

    run = trainer("refl", tmp_path, [latent_reward(failing)], train_batch_size=2, num_groups=2)
    calls.clear()
    (minibatch,) = run.algorithm.minibatches(collect(run), 0)
    loss, metrics = run.algorithm.loss(minibatch.micros[0])
    loss.backward()
    assert metrics["unscored"] == 0.5
    assert all(p.grad.isfinite().all() for p in run.loop.state.parameters if p.grad is not None)


def test_evaluations_hand_over_latents_and_keep_images(tmp_path, decoded):
    seen = []

    def note(samples, prompts, metadata):
        seen.append(samples.shape[1])
        return energy(samples, prompts, metadata)

    run = trainer("flow_grpo", tmp_path / "run", [latent_reward(note)], eval_prompts=held_out(tmp_path))
    seen.clear()
    _, shown = run.outputs.evaluation.run(run.algorithm.eval_plan())
    assert set(seen) == {8}
    assert shown.images.shape[1] == 3
    assert decoded


@dataclass(frozen=True)
class OfAnotherVae:
    name: str = "other"
    differentiable: bool = True
    range: tuple[float, float] = (0.0, 1.0)
    wants: str = "latents"

    def __call__(self, samples, prompts, metadata):
        return energy(samples, prompts, metadata)

    def check_latents(self, vae_config):
        assert vae_config["latent_channels"] == 8
        raise ValueError("it scores latents of another VAE")


@pytest.mark.parametrize("name", REWARDED)
def test_latents_of_another_vae_are_refused_before_the_run(name, tmp_path):
    for reward in (OfAnotherVae(), Combined("both", {"inner": (OfAnotherVae(), 1.0)})):
        with pytest.raises(ValueError, match=r"reward '(other|both)': .*it scores latents of another VAE"):
            trainer(name, tmp_path, [reward])


def test_groups_are_scored_by_latents_too():
    @dataclass(frozen=True)
    class Group:
        name: str = "group"
        differentiable: bool = False
        needs_groups: bool = True
        wants: str = "latents"
        range: tuple[float, float] = (0.0, 1.0)

        def __call__(self, samples, prompts, metadata, groups):
            return samples[:, 0, 0, 0] - groups

    latents, prompts = torch.arange(4.0).view(4, 1, 1, 1), [Prompt("a"), Prompt("b")]
    with ScoreBook({"group": Group()}) as book:
        for part in (latents[:2], latents[2:]):
            book.add(None, prompts, aside=True, latents=part)
        assert book.scores(torch.tensor([0, 0, 1, 1]))["group"].tolist() == [0.0, 1.0, 1.0, 2.0]


def test_without_latents_images_are_passed_and_without_both_an_error():
    images, reward = torch.rand(2, 3, 4, 4), latent_reward()
    torch.testing.assert_close(ask(reward, images, ["a", "b"], [{}, {}])[0], energy(images, None, None))
    assert wanted(image_reward(), images, torch.zeros(2, 8, 1, 1)) is images
    with pytest.raises(ValueError, match="reward 'light' needs images: decode the latents"):
        score([image_reward()], None, [Prompt("a")], latents=torch.zeros(1, 8, 1, 1))
