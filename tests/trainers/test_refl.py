"""ReFL's trainer: the gradient of the whole way, every recipe, and what is refused."""

import dataclasses

import pytest
import torch

from diffalign import LoraConfig, ReFLTrainer
from diffalign.diffusion.reward_gradient_presets import PRESETS
from diffalign.rewards.base import get_reward
from diffalign.runtime.tracking import MetricsLog
from tests.models import tiny_unet_pipelines as tiny
from tests.phases import collect
from tests.trainers.made_refl import IMAGES, close, gradients, gradients_of, moved, redness, trainer_of

# Exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_gradient_of_draft_k_is_that_of_plain_autograd_through_the_pipeline(refl, train_prompts, guidance):
    args = refl("draft_k", guidance_scale=guidance, rollout_batch_size=4, train_batch_size=4)
    trainer = trainer_of(args, train_prompts)
    iteration = collect(moved(trainer))
    own = gradients_of(trainer, iteration)
    model, levels, (batch,) = trainer.model, trainer.algorithm.levels, iteration.parts
    x = trainer.run.rng.normal_batch(model.latent_shape(), "refl/start", [(0, *sample) for sample in batch.samples])
    empty = trainer.run.prompts.empty[torch.zeros(4, dtype=torch.long)]
    for i in range(4):
        with torch.set_grad_enabled(i >= 2):
            time = levels.time[i].float().expand(4)
            v = model.evaluate(x, time, batch.conditioning)
            if guidance != 1:
                against = model.evaluate(x, time, empty)
                v = against + guidance * (v - against)
            x = x + (levels.sigma[i + 1] - levels.sigma[i]).float() * v
    loss = -redness(model.decode(x), None, None).mean()
    found = torch.autograd.grad(loss, trainer.loop.state.parameters)
    close(own, torch.cat([g.flatten() for g in found]), 1e-4)


def test_a_step_against_the_gradient_lowers_the_loss_as_much_as_it_says(refl, train_prompts):
    trainer = trainer_of(refl("draft_k", thresholds={}), train_prompts)
    batch = collect(moved(trainer))
    direction = gradients_of(trainer, batch)
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    values, size, parameters = [], 0.02 / direction.norm(), trainer.loop.state.parameters
    with torch.no_grad():
        for sign in (1, -2):
            for part, p in zip(direction.split([p.numel() for p in parameters]), parameters, strict=True):
                p += sign * size * part.reshape(p.shape)
            values.append(sum((trainer.algorithm.loss(micro)[0] * micro.weight).item() for micro in minibatch.micros))
    assert (values[0] - values[1]) / (2 * size * direction.norm() ** 2) == pytest.approx(1.0, rel=0.02)


SAVINGS = [
    {"train_batch_size": 1},
    {"decode_slice": 1},
    {"vae_checkpointing": True},
    {"step_checkpointing": True},
    {"gradient_checkpointing": True},
]


@pytest.mark.parametrize("saving", SAVINGS, ids=str)
def test_saving_memory_changes_no_gradient(refl, train_prompts, saving):
    args = refl("draft_k", guidance_scale=2.0)
    own = gradients(trainer_of(dataclasses.replace(args, **saving), train_prompts))
    close(own, gradients(trainer_of(args, train_prompts)), 1e-5)


def test_a_detached_negative_is_full_guidance_less_the_negatives_gradient(refl, train_prompts):
    found = {}
    for mode in ("full", "detached", "off"):
        args = refl("draft_1", {"guidance": mode}, guidance_scale=3.0)
        found[mode] = gradients(trainer_of(args, train_prompts))
    halves = refl("draft_1", {"guidance": "detached", "compensate": True}, guidance_scale=3.0)
    close(3 * gradients(trainer_of(halves, train_prompts)), found["detached"], 1e-5)
    # At the last step v = n + g (c - n), so that the slopes by c and by n are g and 1 - g of the same thing.
    trainer = moved(trainer_of(refl("draft_1", guidance_scale=3.0), train_prompts))
    total = 0.0
    for batch in collect(trainer).parts:
        rows, level = torch.arange(2), trainer.algorithm.levels[3]
        x, time = batch.state(rows, 3), trainer.algorithm.levels.time[3].float().expand(2)
        empty = trainer.run.prompts.empty[torch.zeros(2, dtype=torch.long)]
        with torch.no_grad():
            against = trainer.model.evaluate(x, time, empty)
        v = against + 3.0 * (trainer.model.evaluate(x, time, batch.conditioning) - against)
        total = total - redness(trainer.model.decode(x - level.sigma.float() * v), None, None).sum() / 4
    literal = torch.cat([g.flatten() for g in torch.autograd.grad(total, trainer.loop.state.parameters)])
    close(found["detached"], literal, 1e-4)
    assert (found["full"] - found["detached"]).norm() > 0.01 * found["full"].norm()
    assert (found["off"] - found["detached"]).norm() > 0.01 * found["full"].norm()


def test_a_pass_of_its_own_for_each_image_draws_the_same_course_for_a_batch(refl, train_prompts):
    trainer = trainer_of(refl("alignprop", rollout_batch_size=2), train_prompts)
    found = [part.courses for part in collect(trainer, 3).parts]
    assert found == [part.courses for part in collect(trainer, 3).parts]
    drawn = set()
    for iteration in range(20):
        drawn |= {len(part.courses[0].moves) for part in collect(trainer, iteration).parts}
    assert drawn == {1, 2, 3, 4}


def test_the_regulariser_is_zero_at_the_reference_and_pulls_back(refl, train_prompts):
    trainer = trainer_of(refl("draft_1", {"regulariser": "reference", "regulariser_weight": 5.0}), train_prompts)
    batch = collect(trainer, 0)
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    assert trainer.algorithm.loss(minibatch.micros[0])[1]["regulariser"] == 0
    with torch.no_grad():
        for p in trainer.loop.state.parameters:
            p += 0.02
    own, metrics = trainer.algorithm.loss(minibatch.micros[0])
    assert metrics["regulariser"] > 0
    weighted = own.item() * minibatch.micros[0].weight
    assert weighted == pytest.approx((5 * metrics["regulariser"] - metrics["reward/mean"]).item() / 2, rel=1e-4)


def test_imagerefl_denoises_its_images_where_its_samplings_begin(refl, train_prompts):
    trainer = trainer_of(refl("imagerefl", guidance_scale=3.0), train_prompts)
    batch = collect(trainer, 0)
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    found = trainer.algorithm.loss(minibatch.micros[0])[1]["regulariser"]
    batch, first = batch.parts[0], trainer.algorithm.recipe.first
    level, x = trainer.algorithm.levels[first], trainer.algorithm.starts(0, batch.samples, first).x
    images, _, _ = trainer.algorithm.pictures(0, [group for group, _ in batch.samples])
    with torch.no_grad():
        output = trainer.model.predict(x, level, batch.conditioning)
    assert found.item() == pytest.approx((output - (x - images) / level.sigma).square().mean().item(), rel=1e-4)


# Everything that can be asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(refl, train_prompts, preset):
    args = refl(preset)
    trainer = trainer_of(args, train_prompts)
    before = [p.detach().clone() for p in trainer.loop.state.parameters]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.loop.state.parameters, strict=True))
    rows = [row for row in MetricsLog.read(args.output_dir / "metrics.jsonl") if "loss" in row]
    assert all("reward/redness" in row and row["grad_norm"] > 0 for row in rows)


OPTIONS = [
    {"preset": "draft_1", "recipe": {"reward_loss": "group"}, "group_size": 2},
    {"preset": "draft_1", "recipe": {"reward_loss": "distance"}},
    {"preset": "leapalign", "guidance_scale": 2.0},
    {"preset": "reneg", "mixed_precision": "bf16", "checkpointing_steps": 1, "ema_decay": 0.9},
    {"preset": "draft_k", "lora": LoraConfig(rank=0), "learning_rate": 1e-4, "decode_precision": "bf16"},
    {"preset": "drtune", "mixed_precision": "bf16", "ema_decay": 0.9, "gradient_checkpointing": True},
]


@pytest.mark.parametrize("setting", OPTIONS, ids=str)
def test_options_train(refl, train_prompts, setting):
    trainer = trainer_of(refl(**setting), train_prompts)
    trainer.train()
    assert trainer.loop.progress.step == 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("preset", ["draft_k", "direct_align", "leapalign"])
def test_unets_train_through_the_same_interface(refl, train_prompts, tmp_path, family, preset):
    tiny.build(family, tmp_path / "model")
    args = refl(preset, model=str(tmp_path / "model"), max_sequence_length=None, guidance_scale=2.0)
    trainer = trainer_of(args, train_prompts)
    # A LoRA begins where one of its factors has no gradient: the other must have one.
    batch = collect(trainer, 0)
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    for micro in minibatch.micros:
        (trainer.algorithm.loss(micro)[0] * micro.weight).backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for p in trainer.loop.state.parameters)


def test_training_raises_the_reward(refl, train_prompts):
    args = refl("draft_1", max_train_steps=8, learning_rate=3e-3)
    trainer_of(args, train_prompts).train()
    rows = [row["reward/redness"] for row in MetricsLog.read(args.output_dir / "metrics.jsonl") if "loss" in row]
    assert sum(rows[-2:]) / 2 > sum(rows[:2]) / 2 + 0.01


def test_two_rewards_add_up_by_weight(refl, train_prompts):
    args = refl("draft_1", rewards={"brightness": 0.5, "sharpness": 2.0})
    trainer = ReFLTrainer(args=args, train_dataset=train_prompts)
    batch = collect(trainer, 0)
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    loss, metrics = trainer.algorithm.loss(minibatch.micros[0])
    expected = 0.5 * metrics["reward/brightness"] + 2 * metrics["reward/sharpness"]
    assert metrics["reward/mean"].item() == pytest.approx(expected.item())
    assert loss.item() * minibatch.micros[0].weight == pytest.approx(-expected.item() / 2)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_reward_without_gradient_is_refused_with_those_that_have_one(refl, train_prompts):
    with pytest.raises(ValueError, match="shapes: no gradient reaches an image") as error:
        trainer_of(refl("draft_1"), train_prompts, reward=get_reward("shapes"))
    for name in ("pickscore", "hpsv2.1", "vqascore", "image_reward", "brightness"):
        assert f" {name}," in str(error.value)
    assert "jpeg_compressibility" not in str(error.value)
    with pytest.raises(ValueError, match="redness: no gradient"):
        trainer_of(refl("draft_1"), train_prompts, reward=redness)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"thresholds": {}}, "needs a threshold of redness"),
        ({"thresholds": {"blue": 1.0}}, "blue is none of the rewards redness"),
        ({"preset": "draft_1", "thresholds": {"redness": 1.0}}, "has none; leave them out"),
        ({"preset": "imagerefl", "train_images": ()}, "needs real images: give train_images"),
        ({"train_images": (IMAGES,)}, "uses none; leave them out"),
        ({"preset": "reneg", "guidance_scale": 1.0}, "a negative prompt acts by guidance"),
        ({"preset": "draft_1", "recipe": {"compensate": True}}, "divides by a guidance that is off"),
        ({"preset": "draft_1", "recipe": {"reward_loss": "group"}}, "group_size must be at least 2"),
        (
            {"preset": "draft_1", "recipe": {"reward_loss": "group"}, "group_size": 4, "train_batch_size": 2},
            "make rollout_batch_size a multiple of 4",
        ),
        ({"num_groups": 0}, "num_groups must be at least 1"),
        ({"early_stopping": 1}, "early_stopping needs evaluations on the way"),
        ({"preset": "nothing"}, "recipe.preset must be one of"),
    ],
)
def test_settings_that_cannot_train_are_refused(refl, train_prompts, setting, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(refl(**setting), train_prompts)
