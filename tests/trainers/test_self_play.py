"""SPIN-Diffusion: the data's liked images against what the model's earlier self draws of their prompts."""

import pytest
import torch

from diffalign import DiffusionDPOTrainer
from diffalign.data.pairs import load_pairs
from diffalign.data.unpaired import load_labelled
from diffalign.diffusion.plan import PlanConfig
from diffalign.models.weights import REFERENCE
from diffalign.rollout.generate import NoiseKeys, generate
from diffalign.rollout.sampler import SamplingPlan, ode_plan
from tests.phases import collect


@pytest.fixture
def spin(dpo):
    def make(**changes):
        plan = PlanConfig(preset="ode", num_steps=2)
        return dpo(**{"losers": "reference", "plan": plan, "reference_steps": 2, "rollout_batch_size": 3} | changes)

    return make


def test_losers_are_images_of_the_reference_and_winners_the_liked_ones(spin, pairs):
    trainer = DiffusionDPOTrainer(args=spin())
    batch = collect(trainer, 0)
    examples, model = batch.ranked, trainer.model
    assert examples.latents.shape == (4, 2, *model.latent_shape())
    data = load_pairs(pairs)
    winners = [data[i].images[0 if data[i].label == 1 else 1].read() for i in range(len(data))]
    assert [image.read() for image in (trainer.algorithm.source.winners.data[i].image for i in range(12))] == winners
    # The base draws them, with the noise of each example's number.
    number = torch.arange(4)
    addresses = NoiseKeys(trainer.run.rng, "self play", 0, number, torch.zeros_like(number))
    route = SamplingPlan(ode_plan(2), model.levels(2), trainer.run.guidance)
    conditioning = model.encode(examples.texts)
    with model.using(REFERENCE):
        ((_, expected),) = generate(model, route, conditioning, number, addresses, 4)
        decoded = model.decode(examples.latents[:, 1])
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)


def test_losers_follow_the_refreshed_reference(spin):
    trainer = DiffusionDPOTrainer(args=spin(max_train_steps=2, learning_rate=1e-2))
    batch = collect(trainer, 0)
    before = batch.ranked.latents
    for parameter in trainer.loop.state.parameters:
        parameter.data += 0.01
    batch = collect(trainer, 0)
    assert torch.equal(batch.ranked.latents, before), "the policy draws none of them"
    trainer.run.progress.step = 1
    trainer.algorithm.on_step(batch, {"accuracy": 0.5})
    batch = collect(trainer, 0)
    assert torch.equal(batch.ranked.latents, before), "a refresh every two steps"
    trainer.run.progress.step = 2
    trainer.algorithm.on_step(batch, {"accuracy": 0.5})
    batch = collect(trainer, 0)
    assert torch.equal(batch.ranked.latents[:, 0], before[:, 0])
    assert not torch.isclose(batch.ranked.latents[:, 1], before[:, 1]).all(-1).any()


def test_it_trains(spin):
    trainer = DiffusionDPOTrainer(args=spin(max_train_steps=3))
    trainer.train()
    assert any(p.abs().max() > 0 for n, p in trainer.model.raw_denoiser.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"loss": "kto", "reference_steps": 0}, "'kto' has none: use a loss of pairs with one"),
        ({"loss": "mapo", "reference_steps": 0}, "read only by losses with a reference, unlike 'mapo'"),
        ({"streaming": True}, "losers: reference learns from single images, which are not streamed"),
        ({"train_data": (), "train_prompts": "x.txt", "rewards": {"shapes": 1.0}, "shared_start": False}, "give train"),
    ],
)
def test_what_has_no_earlier_self_is_refused(spin, setting, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDPOTrainer(args=spin(**setting))


def test_pairs_are_no_winners_and_single_images_no_pairs(spin, dpo, pairs):
    with pytest.raises(ValueError, match="losers: reference wants single images: pass what load_labelled gave"):
        DiffusionDPOTrainer(args=spin(), train_dataset=load_pairs(pairs))
    with pytest.raises(ValueError, match="loss 'dpo' wants pairs: pass what load_pairs gave"):
        DiffusionDPOTrainer(args=dpo(), train_dataset=load_labelled(pairs))
