"""One buffer on disk, written by a Flow-GRPO run, trains Flow-GRPO's update, online DPO and best-of-n."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from diffalign import DiffusionDPOTrainer, FlowGRPOTrainer
from diffalign.data.rollouts import Pairing
from diffalign.losses.registry import get_loss
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.collector import Rollout
from diffalign.rollout.sampler import SamplingPlan
from diffalign.trainers.diffusion_dpo.batches import RolloutSource
from tests.phases import collect


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


@pytest.fixture
def run(small, tmp_path, train_prompts):
    """A Flow-GRPO trainer and the rollout of its first iteration, 2 groups of 4, which is on disk too."""
    args = small(output_dir=tmp_path / "grpo", save_rollouts=True)
    trainer = FlowGRPOTrainer(args=args, train_dataset=train_prompts, reward_funcs=brightness)
    return trainer, collect(trainer)


@pytest.fixture
def folder(run):
    return run[0].args.output_dir / "rollouts"


def gradient(trainer, batch):
    for parameter in trainer.loop.state.parameters:
        parameter.grad = None
    for minibatch in trainer.algorithm.minibatches(batch, 0):
        for micro in minibatch.micros:
            (trainer.algorithm.loss(micro)[0] * micro.weight).backward()
    return torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters])


def ranked(buffer):
    """Per group the samples of the buffer, the best first."""
    leaves = buffer.leaves
    score = buffer.rewards["brightness"][leaves]
    return [
        sorted((i for i in range(len(leaves)) if buffer.group[leaves[i]] == group), key=lambda i: -score[i])
        for group in (0, 1)
    ]


def examples_of(trainer):
    """Return (text, latents, label) of each example of a first iteration, sorted by text."""
    found = collect(trainer).ranked
    order = sorted(range(len(found.texts)), key=lambda i: found.texts[i])
    return [(found.texts[i], found.latents[i], found.label[i].item()) for i in order]


class Recalled:
    """Stands for the collector: a rollout from disk, with its rewards."""

    def __init__(self, buffer):
        self.buffer, self.weights = buffer, {"brightness": 1.0}

    def sample(self, iteration):
        return Rollout(self.buffer, None, None)

    def score(self, rollout):
        pass

    def advantage(self, rollout):
        pass


def learns(trainer):
    before = [p.detach().clone() for p in trainer.loop.state.parameters]
    trainer.train()
    return any(not torch.equal(a, b) for a, b in zip(before, trainer.loop.state.parameters, strict=True))


def test_it_trains_flow_grpo(run, folder):
    buffer, (trainer, rollout) = RolloutBuffer.load(folder), run
    expected = gradient(trainer, rollout)
    # All that the update sees comes from disk: the plan's levels are the model's, and prompts are encoded again.
    plan = SamplingPlan(rollout.plan.plan, trainer.algorithm.levels, trainer.run.guidance)
    loaded = Rollout(buffer, plan, trainer.run.prompts([p.text for p in buffer.prompts]))
    assert expected.norm() > 0
    assert torch.equal(gradient(trainer, loaded), expected)


@pytest.mark.parametrize("rule", ["best_worst", "all"])
def test_it_trains_dpo_on_pairs_of_its_images(run, folder, dpo, rule):
    args = dpo(train_data=(str(folder),), num_pairs=2, train_batch_size=2, max_train_steps=1)
    if rule == "all":
        args = dataclasses.replace(args, data=dataclasses.replace(args.data, rollouts=Pairing(rule=rule)), num_pairs=12)
    trainer = DiffusionDPOTrainer(args=args)
    found = examples_of(trainer)
    assert len(found) == (2 if rule == "best_worst" else 12)
    if rule == "best_worst":
        buffer = run[1].buffer
        latents = buffer.x[buffer.leaves]
        places = sorted(zip((p.text for p in buffer.prompts), ranked(buffer), strict=True))
        for (text, pair, _), (prompt, order) in zip(found, places, strict=True):
            assert text == prompt
            for side, sample in enumerate((order[0], order[-1])):
                # Decoded, rounded to 8 bits and encoded again: nearer to its own latents than to any others.
                distances = (latents - pair[side]).flatten(1).norm(dim=1)
                assert distances.argmin() == sample
    assert learns(trainer)


def test_it_trains_online_dpo_from_its_latents(folder, dpo):
    buffer = RolloutBuffer.load(folder)
    trainer = DiffusionDPOTrainer(args=dpo(train_data=(str(folder),), num_pairs=2, max_train_steps=1))
    online = dataclasses.replace(trainer.run, config=dataclasses.replace(trainer.args, num_groups=2, group_size=4))
    trainer.algorithm.source = RolloutSource(online, Recalled(buffer), trainer.algorithm.kind)
    batch = collect(trainer)
    for pair, order in zip(batch.ranked.latents, ranked(buffer), strict=True):
        assert torch.equal(pair, buffer.x[buffer.leaves[[order[0], order[-1]]]])
    assert learns(trainer)


def test_it_trains_on_the_best_of_each_group(run, folder, dpo):
    args = dpo(train_data=(str(folder),), loss="sft", beta=None, num_pairs=2, train_batch_size=2, max_train_steps=1)
    trainer = DiffusionDPOTrainer(args=args)
    found = examples_of(trainer)
    buffer = run[1].buffer
    places = sorted(zip((p.text for p in buffer.prompts), ranked(buffer), strict=True))
    latents = buffer.x[buffer.leaves]
    assert [label for _, _, label in found] == [1, 1]
    for (text, single, _), (prompt, order) in zip(found, places, strict=True):
        assert (text, len(single)) == (prompt, 1)
        assert (latents - single[0]).flatten(1).norm(dim=1).argmin() == order[0]
    assert learns(trainer)


def test_an_image_of_many_pairs_is_one_single_image(folder, dpo):
    buffer, args = RolloutBuffer.load(folder), dpo()
    data = dataclasses.replace(args.data, rollouts=Pairing(rule="all"))
    args = dataclasses.replace(args, data=data, num_groups=2, group_size=4)
    run = SimpleNamespace(config=args, gather=lambda own: own)
    liked = {order[k] for order in ranked(buffer) for k in range(3)}
    for name, places in (("kto", set(range(8))), ("sft", liked)):
        source = RolloutSource(run, Recalled(buffer), get_loss(name))
        batch = source.sample(0)
        source.rank(batch)
        examples = batch.ranked
        # Of four images in a ranking, all but the last have won once.
        rows = [(buffer.x[buffer.leaves] == x).flatten(1).all(1).nonzero().item() for (x,) in examples.latents]
        assert sorted(rows) == sorted(places)
        assert {row: bool(label) for row, label in zip(rows, examples.label, strict=True)} == {
            row: row in liked for row in places
        }
        assert len(set(examples.number)) == len(rows)
