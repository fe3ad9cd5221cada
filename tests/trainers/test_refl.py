"""ReFL's trainer: the gradient of the whole way, every recipe, and the same run whatever interrupts it."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, FlowGRPOTrainer, LoraConfig, ReFLConfig, ReFLTrainer
from diffalign.diffusion.recipe import PRESETS, RecipeConfig
from diffalign.rewards.base import REWARDS, FunctionReward, Registered, get_reward
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.runtime.checkpoint import load
from diffalign.runtime.tracking import MetricsLog
from tests.conftest import PIPELINE, ROOT

IMAGES = str(ROOT / "assets/preferences/shapes.parquet")


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


REDNESS = FunctionReward("redness", redness, differentiable=True)


@pytest.fixture
def refl(tmp_path):
    """A configuration that trains in seconds; keyword arguments override it, those of the recipe by name."""

    def make(preset="refl_script", recipe=None, **changes) -> ReFLConfig:
        given = {"num_steps": 4, **(recipe or {})}
        # Four steps hold no five, and a reward that reads no text is none relative to words.
        own = {"draft_k": {"gradient_steps": 2}, "srpo": {"word_weight": 0.5}}.get(preset, {})
        resolved = RecipeConfig(preset=preset, **{**own, **given})
        found = resolved.resolve()
        settings = {
            "model": str(PIPELINE),
            "max_sequence_length": 16,
            "output_dir": tmp_path / "run",
            "lora": LoraConfig(rank=4),
            "recipe": resolved,
            "num_groups": 4,
            "rollout_batch_size": 2,
            "train_batch_size": 2,
            "max_train_steps": 2,
            "learning_rate": 1e-3,
        }
        if found.reward_loss in ("hinge", "distance"):
            settings["thresholds"] = {"redness": 0.9}
        if found.from_images or found.regulariser == "pretraining":
            settings["train_images"] = (IMAGES,)
            settings["data"] = dataclasses.replace(ReFLConfig().data, scan=4)
        if found.negative:
            settings["guidance_scale"] = 2.0
        return ReFLConfig(**(settings | changes))

    return make


def trainer_of(args, prompts, **options):
    own = args.train_rollouts or args.recipe.resolve().from_images
    return ReFLTrainer(
        args=args, reward_funcs=options.pop("reward", REDNESS), train_dataset=None if own else prompts, **options
    )


def moved(trainer):
    """Away from the start, where one half of a LoRA is zero and the other has no gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.loop.parameters:
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return trainer


def gradients(trainer, iteration=0):
    moved(trainer).collect(iteration)
    (micros,) = trainer.updates(iteration)
    for micro in micros:
        trainer.accelerator.backward(micro()[0])
    found = torch.cat([p.grad.flatten() for p in trainer.loop.parameters])
    trainer.loop.optimizer.zero_grad()
    return found


# Exactness ----------------------------------------------------------------------------------------------------------


def close(one, two, tolerance):
    assert two.norm() > 0
    assert (one - two).norm() < tolerance * two.norm(), (one - two).norm() / two.norm()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_gradient_of_draft_k_is_that_of_plain_autograd_through_the_pipeline(refl, train_prompts, guidance):
    args = refl("draft_k", guidance_scale=guidance, rollout_batch_size=4, train_batch_size=4)
    trainer = trainer_of(args, train_prompts)
    own = gradients(trainer)
    model, levels, batch = trainer.model, trainer.levels, trainer.batches[0]
    x = trainer.noise.normal_batch(model.latent_shape(), "refl/start", [(0, *sample) for sample in batch.samples])
    empty = trainer.encoded.empty[torch.zeros(4, dtype=torch.long)]
    for i in range(4):
        with torch.set_grad_enabled(i >= 2):
            time = levels.time[i].float().expand(4)
            v = model.evaluate(x, time, batch.conditioning)
            if guidance != 1:
                against = model.evaluate(x, time, empty)
                v = against + guidance * (v - against)
            x = x + (levels.sigma[i + 1] - levels.sigma[i]).float() * v
    loss = -redness(model.decode(x), None, None).mean()
    found = torch.autograd.grad(loss, trainer.loop.parameters)
    close(own, torch.cat([g.flatten() for g in found]), 1e-4)


def test_a_step_against_the_gradient_lowers_the_loss_as_much_as_it_says(refl, train_prompts):
    trainer = trainer_of(refl("draft_k", thresholds={}), train_prompts)
    direction = gradients(trainer)
    (micros,) = trainer.updates(0)
    values, size = [], 0.02 / direction.norm()
    with torch.no_grad():
        for sign in (1, -2):
            for part, p in zip(
                direction.split([p.numel() for p in trainer.loop.parameters]), trainer.loop.parameters, strict=True
            ):
                p += sign * size * part.reshape(p.shape)
            values.append(sum(micro()[0].item() for micro in micros))
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
    trainer.collect(0)
    total = 0.0
    for batch in trainer.batches:
        rows, level = torch.arange(2), trainer.levels[3]
        x, time = batch.state(rows, 3), trainer.levels.time[3].float().expand(2)
        empty = trainer.encoded.empty[torch.zeros(2, dtype=torch.long)]
        with torch.no_grad():
            against = trainer.model.evaluate(x, time, empty)
        v = against + 3.0 * (trainer.model.evaluate(x, time, batch.conditioning) - against)
        total = total - redness(trainer.model.decode(x - level.sigma.float() * v), None, None).sum() / 4
    literal = torch.cat([g.flatten() for g in torch.autograd.grad(total, trainer.loop.parameters)])
    close(found["detached"], literal, 1e-4)
    assert (found["full"] - found["detached"]).norm() > 0.01 * found["full"].norm()
    assert (found["off"] - found["detached"]).norm() > 0.01 * found["full"].norm()


def test_a_pass_of_its_own_for_each_image_draws_the_same_course_for_a_batch(refl, train_prompts):
    trainer = trainer_of(refl("alignprop", rollout_batch_size=2), train_prompts)
    trainer.collect(3)
    found = [batch.courses for batch in trainer.batches]
    trainer.collect(3)
    assert found == [batch.courses for batch in trainer.batches]
    drawn = set()
    for iteration in range(20):
        trainer.collect(iteration)
        drawn |= {len(batch.courses[0].moves) for batch in trainer.batches}
    assert drawn == {1, 2, 3, 4}


def test_the_regulariser_is_zero_at_the_reference_and_pulls_back(refl, train_prompts):
    trainer = trainer_of(refl("draft_1", {"regulariser": "reference", "regulariser_weight": 5.0}), train_prompts)
    trainer.collect(0)
    (micros,) = trainer.updates(0)
    assert micros[0]()[1]["regulariser"] == 0
    with torch.no_grad():
        for p in trainer.loop.parameters:
            p += 0.02
    own, metrics = micros[0]()
    assert metrics["regulariser"] > 0
    assert own.item() == pytest.approx((5 * metrics["regulariser"] - metrics["reward/mean"]).item() / 2, rel=1e-4)


# Everything that can be asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(refl, train_prompts, preset):
    args = refl(preset)
    trainer = trainer_of(args, train_prompts)
    before = [p.detach().clone() for p in trainer.loop.parameters]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.loop.parameters, strict=True))
    rows = [row for row in MetricsLog.read(args.output_dir / "metrics.jsonl") if "loss" in row]
    assert all("reward/redness" in row and row["grad_norm"] > 0 for row in rows)


OPTIONS = [
    {"preset": "draft_1", "recipe": {"reward_loss": "group"}, "group_size": 2},
    {"preset": "draft_1", "recipe": {"reward_loss": "distance"}},
    {"preset": "leapalign", "guidance_scale": 2.0},
    {"preset": "draft_k", "lora": LoraConfig(rank=0), "learning_rate": 1e-4, "decode_precision": "bf16"},
    {"preset": "drtune", "mixed_precision": "bf16", "ema_decay": 0.9, "gradient_checkpointing": True},
]


@pytest.mark.parametrize("setting", OPTIONS, ids=str)
def test_options_train(refl, train_prompts, setting):
    trainer = trainer_of(refl(**setting), train_prompts)
    trainer.train()
    assert trainer.loop.step == 2


def test_training_raises_the_reward(refl, train_prompts):
    args = refl("draft_1", max_train_steps=8, learning_rate=3e-3)
    trainer_of(args, train_prompts).train()
    rows = [row["reward/redness"] for row in MetricsLog.read(args.output_dir / "metrics.jsonl") if "loss" in row]
    assert sum(rows[-2:]) / 2 > sum(rows[:2]) / 2 + 0.01


def test_two_rewards_add_up_by_weight(refl, train_prompts):
    args = refl("draft_1", rewards={"brightness": 0.5, "sharpness": 2.0})
    trainer = ReFLTrainer(args=args, train_dataset=train_prompts)
    trainer.collect(0)
    (micros,) = trainer.updates(0)
    loss, metrics = micros[0]()
    expected = 0.5 * metrics["reward/brightness"] + 2 * metrics["reward/sharpness"]
    assert metrics["reward/mean"].item() == pytest.approx(expected.item())
    assert loss.item() == pytest.approx(-expected.item() / 2)


# The shared buffer ---------------------------------------------------------------------------------------------------


def test_a_buffer_on_disk_gives_the_states_and_the_prompts(refl, small, train_prompts):
    """One buffer, written by Flow-GRPO: it replays there, makes pairs for DPO, and starts ReFL."""
    writer = FlowGRPOTrainer(args=small(save_rollouts=True, max_train_steps=1), train_dataset=train_prompts)
    writer.collect(0)
    folder = small().output_dir / "rollouts"
    writer.rollout = dataclasses.replace(writer.rollout, buffer=RolloutBuffer.load(folder))
    writer.before_first_update()
    dpo = DiffusionDPOConfig(
        model=str(PIPELINE),
        max_sequence_length=16,
        train_data=(str(folder),),
        output_dir=folder.parent / "dpo",
        num_pairs=2,
        max_train_steps=1,
    )
    DiffusionDPOTrainer(args=dpo).train()
    args = refl("draft_1", train_rollouts=folder, num_groups=2, group_size=2, output_dir=folder.parent / "refl")
    trainer = trainer_of(args, None)
    trainer.collect(0)
    stored, levels = trainer.starts.buffer, trainer.levels
    for batch in trainer.batches:
        (course,) = batch.courses
        assert course.start == 3
        texts = [prompt.text for prompt in stored.prompts]
        found = batch.state(torch.arange(len(batch.samples)), 3)
        for row, prompt in enumerate(batch.prompts):
            group = texts.index(prompt.text)
            leaf = trainer.starts.members[group][batch.samples[row][1]]
            # The buffer keeps steps 0, 1, 2 and 4: the sampling goes on from 2.
            x = stored.x[stored.nodes(torch.tensor([leaf]), 2)]
            with torch.no_grad():
                v = trainer.model.predict(x, levels[2], trainer.encoded([prompt.text]))
            torch.testing.assert_close(found[row : row + 1], x + (levels.sigma[3] - levels.sigma[2]).float() * v)
    trainer.train()
    with pytest.raises(ValueError, match=r"set recipe\.num_steps: 4"):
        trainer_of(refl("draft_1", {"num_steps": 8}, train_rollouts=folder, num_groups=2), None)
    with pytest.raises(ValueError, match="lower group_size"):
        trainer_of(refl("draft_1", train_rollouts=folder, group_size=5), None)


# Watching ------------------------------------------------------------------------------------------------------------


def test_an_evaluation_tells_learning_from_hacking(refl, train_prompts):
    args = refl(
        "draft_1", eval_rewards=("shapes_strict",), held_out={"brightness": 1.0}, eval_steps=1, learning_rate=1e-2
    )
    trainer = trainer_of(args, train_prompts, eval_dataset=train_prompts[:3])
    trainer.train()
    rows = [row for row in MetricsLog.read(args.output_dir / "metrics.jsonl") if "eval/accuracy" in row]
    names = ("shapes_strict", "redness", "brightness", "diversity", "reference_distance", "sharpness/redness", "alarm")
    assert all(f"eval/{name}" in row for row in rows for name in names)
    assert rows[0]["eval/reference_distance"] == 0
    assert rows[-1]["eval/reference_distance"] > 0
    # Redness is linear: its drop is the step times the number of values times the root mean square of its slope, which
    # is 1 / HW in red and -1 / 2HW in green and blue.
    assert rows[0]["eval/sharpness/redness"] == pytest.approx(0.01 * 3 * 0.5**0.5, rel=1e-3)
    assert (args.output_dir / "hacking.png").is_file()


def test_early_stopping_ends_the_run_and_exports_the_best_weights(refl, train_prompts, monkeypatch):
    def blueness(images, prompts, metadata):
        return -redness(images, prompts, metadata)

    monkeypatch.setitem(
        REWARDS, "blueness", Registered(lambda name: FunctionReward(name, blueness), {"name": "blueness"})
    )
    args = refl(
        "draft_1", eval_steps=1, early_stopping=2, max_train_steps=6, learning_rate=1e-2, held_out={"blueness": 1.0}
    )
    trainer = trainer_of(args, train_prompts, eval_dataset=train_prompts[:2])
    with pytest.warns(UserWarning, match="blueness fell"):
        trainer.train()
    assert trainer.loop.step == 2
    assert (args.output_dir / "checkpoint-2").is_dir()
    best = load_file(args.output_dir / "pytorch_lora_weights.safetensors")
    assert not any(t.any() for name, t in best.items() if "lora_B" in name)
    assert any(t.any() for name, t in load_file(args.output_dir / "raw/pytorch_lora_weights.safetensors").items())


def test_combined_generation_samples_with_the_base_first(refl, train_prompts):
    args = refl("draft_1", eval_rewards=("brightness",), base_share=0.5)
    trainer = trainer_of(args, train_prompts, eval_dataset=train_prompts[:2])
    with torch.no_grad():
        for p in trainer.loop.parameters:
            p += 0.05
    assert trainer.eval_base_steps == 2
    levels, guidance = trainer.eval_levels, trainer.guidance
    images = {n: trainer.evaluation.run(levels, guidance, n)[1].images for n in (0, 2, 4)}
    with trainer.model.using("reference"):
        base = trainer.evaluation.run(levels, guidance)[1].images
    assert torch.equal(images[4], base)
    assert not torch.equal(images[2], base)
    assert not torch.equal(images[2], images[0])


# Resume, export ------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "setting",
    [{"preset": "alignprop", "ema_decay": 0.9}, {"preset": "srpo"}, {"preset": "imagerefl"}, {"preset": "reneg"}],
    ids=lambda setting: setting["preset"],
)
def test_resume_is_bit_exact(refl, tmp_path, train_prompts, setting):
    common = {"max_train_steps": 4, "checkpointing_steps": 2, "eval_steps": 2, "early_stopping": 9, **setting}
    watched = {"eval_dataset": train_prompts[:2]}
    trainer_of(refl(output_dir=tmp_path / "a", **common), train_prompts, **watched).train()
    broken = refl(output_dir=tmp_path / "b", **common)
    trainer = trainer_of(broken, train_prompts, **watched)
    collect = trainer.collect

    def stop(iteration):
        if iteration == 3:
            raise Stopped
        return collect(iteration)

    trainer.collect = stop
    with pytest.raises(Stopped):
        trainer.train()
    trainer_of(dataclasses.replace(broken, resume_from_checkpoint="latest"), train_prompts, **watched).train()
    (one, state_one), (two, state_two) = load(tmp_path / "a/checkpoint-4"), load(tmp_path / "b/checkpoint-4")
    assert state_one == state_two
    for group in one:
        assert all(torch.equal(one[group][name], two[group][name]) for name in one[group]), group


def test_the_lora_loads_in_plain_diffusers(refl, train_prompts):
    from diffusers import DiffusionPipeline

    args = refl("draft_1", learning_rate=1e-2)
    trainer = trainer_of(args, train_prompts)
    trainer.train()
    pipe = DiffusionPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(args.output_dir)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 16, "output_type": "latent"}
    noise = trainer.noise.normal((1, *trainer.model.latent_shape()), "test")
    theirs = pipe(train_prompts[0].text, latents=noise, **options).images
    x, conditioning = noise, trainer.encoded([train_prompts[0].text])
    with torch.no_grad():
        for i in range(4):
            v = trainer.model.predict(x, trainer.levels[i], conditioning)
            x = x + (trainer.levels.sigma[i + 1] - trainer.levels.sigma[i]).float() * v
    torch.testing.assert_close(theirs, x, rtol=1e-4, atol=1e-4)


def test_a_trained_negative_prompt_is_an_argument_of_the_pipeline(refl, train_prompts):
    from diffusers import DiffusionPipeline

    args = refl("reneg", learning_rate=0.1)
    trainer = trainer_of(args, train_prompts)
    trainer.train()
    negative = load_file(args.output_dir / "negative_prompt.safetensors")
    assert set(negative) == {"negative_prompt_embeds", "negative_pooled_prompt_embeds"}
    assert not torch.equal(negative["negative_prompt_embeds"], trainer.encoded.empty.tensors["embeds"])
    pipe = DiffusionPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "max_sequence_length": 16, "output_type": "latent"}
    noise = trainer.noise.normal((1, *trainer.model.latent_shape()), "test")
    theirs = pipe(train_prompts[0].text, latents=noise, **negative, **options).images
    x, conditioning = noise, trainer.encoded([train_prompts[0].text])
    with torch.no_grad():
        for i in range(4):
            v = trainer.model.predict(x, trainer.levels[i], conditioning, trainer.guidance)
            x = x + (trainer.levels.sigma[i + 1] - trainer.levels.sigma[i]).float() * v
    torch.testing.assert_close(theirs, x, rtol=1e-4, atol=1e-4)


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
        ({"preset": "draft_1", "recipe": {"reward_loss": "group"}}, "a lone image has no group"),
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
