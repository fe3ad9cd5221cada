"""Runs of ReFL: where they start, what is watched, the same run whatever interrupts it, and what it leaves."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, FlowGRPOTrainer, Prompt
from diffalign.rewards.base import REWARDS, FunctionReward, Registered
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.inputs import Inputs
from diffalign.trainers.refl import hacking_monitor
from diffalign.trainers.refl.hacking_monitor import HackingMonitor
from tests.conftest import PIPELINE
from tests.phases import collect
from tests.reliability.compare import same_checkpoint
from tests.reliability.stops import crash_before
from tests.trainers.made_refl import redness, trainer_of

# The shared buffer ---------------------------------------------------------------------------------------------------


def test_a_buffer_on_disk_gives_the_states_and_the_prompts(refl, small, train_prompts):
    """One buffer, written by Flow-GRPO: it replays there, makes pairs for DPO, and starts ReFL."""
    writer = FlowGRPOTrainer(args=small(save_rollouts=True, max_train_steps=1), train_dataset=train_prompts)
    rollout = collect(writer)
    folder = small().output_dir / "rollouts"
    writer.loop._before_first_update(dataclasses.replace(rollout, buffer=RolloutBuffer.load(folder)))
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
    parts = collect(trainer).parts
    stored, levels = trainer.algorithm.starts.buffer, trainer.algorithm.levels
    for batch in parts:
        (course,) = batch.courses
        assert course.start == 3
        texts = [prompt.text for prompt in stored.prompts]
        found = batch.state(torch.arange(len(batch.samples)), 3)
        for row, prompt in enumerate(batch.prompts):
            group = texts.index(prompt.text)
            leaf = trainer.algorithm.starts.members[group][batch.samples[row][1]]
            # The buffer keeps steps 0, 1, 2 and 4: the sampling goes on from 2.
            x = stored.x[stored.nodes(torch.tensor([leaf]), 2)]
            with torch.no_grad():
                v = trainer.model.predict(x, levels[2], trainer.run.prompts([prompt.text]))
            torch.testing.assert_close(found[row : row + 1], x + (levels.sigma[3] - levels.sigma[2]).float() * v)
    trainer.train()
    with pytest.raises(ValueError, match=r"set recipe\.num_steps: 4"):
        trainer_of(refl("draft_1", {"num_steps": 8}, train_rollouts=folder, num_groups=2), None)
    with pytest.raises(ValueError, match="lower group_size"):
        trainer_of(refl("draft_1", train_rollouts=folder, group_size=5), None)


# Watching ------------------------------------------------------------------------------------------------------------


def test_an_evaluation_tells_learning_from_hacking(refl, train_prompts, monkeypatch):
    """Rewards see each prompt's own metadata, also where prompts share a text, as edits of several sources do."""
    held_out, seen = [dataclasses.replace(prompt, text="the same") for prompt in train_prompts[:3]], []
    asked = hacking_monitor.ask
    monkeypatch.setattr(hacking_monitor, "ask", lambda *given: seen.append(given[3]) or asked(*given))
    args = refl(
        "draft_1", eval_rewards=("shapes_strict",), held_out={"brightness": 1.0}, eval_steps=1, learning_rate=1e-2
    )
    trainer = trainer_of(args, train_prompts, eval_dataset=held_out)
    trainer.train()
    assert len(seen) >= 2
    assert all(metadata == [prompt.metadata for prompt in held_out] for metadata in seen)
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
    assert trainer.loop.progress.step == 2
    assert (args.output_dir / "checkpoint-2").is_dir()
    best = load_file(args.output_dir / "pytorch_lora_weights.safetensors")
    assert not any(t.any() for name, t in best.items() if "lora_B" in name)
    assert any(t.any() for name, t in load_file(args.output_dir / "raw/pytorch_lora_weights.safetensors").items())


def test_combined_generation_samples_with_the_base_first(refl, train_prompts):
    args = refl("draft_1", eval_rewards=("brightness",), base_share=0.5)
    trainer = trainer_of(args, train_prompts, eval_dataset=train_prompts[:2])
    with torch.no_grad():
        for p in trainer.loop.state.parameters:
            p += 0.05
    plan, evaluation = trainer.algorithm.eval_plan(), trainer.outputs.evaluation
    assert plan.base_steps == 2
    images = {n: evaluation.run(dataclasses.replace(plan, base_steps=n))[1].images for n in (0, 2, 4)}
    with trainer.model.using("reference"):
        base = evaluation.run(dataclasses.replace(plan, base_steps=0))[1].images
    assert torch.equal(images[4], base)
    assert not torch.equal(images[2], base)
    assert not torch.equal(images[2], images[0])


def test_figures_that_nothing_was_measured_of_are_kept_in_a_checkpoint():
    config = SimpleNamespace(watched="accuracy", early_stopping=0)
    run, inputs = SimpleNamespace(config=config, model=None), Inputs(config, eval_prompts=[Prompt("a circle")])
    monitor, again = HackingMonitor(run, inputs), HackingMonitor(run, inputs)
    monitor.base = {"accuracy": math.nan, "diversity": 0.25}
    tensors, plain = monitor.state_dict()
    again.load_state_dict((tensors, json.loads(json.dumps(plain, allow_nan=False))))
    assert math.isnan(again.base.pop("accuracy"))
    assert again.base == {"diversity": 0.25}


# Resume, export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"preset": "alignprop", "ema_decay": 0.9}, marks=pytest.mark.slow),
        pytest.param({"preset": "reneg"}, marks=pytest.mark.slow),
        pytest.param({"preset": "srpo"}, marks=pytest.mark.slow),
        pytest.param({"preset": "imagerefl"}, marks=pytest.mark.slow),
    ],
    ids=lambda setting: setting["preset"],
)
def test_resume_is_bit_exact(refl, tmp_path, train_prompts, setting):
    common = {"max_train_steps": 4, "checkpointing_steps": 2, "eval_steps": 2, "early_stopping": 9, **setting}
    watched = {"eval_dataset": train_prompts[:2]}
    trainer_of(refl(output_dir=tmp_path / "a", **common), train_prompts, **watched).train()
    broken = refl(output_dir=tmp_path / "b", **common)
    crash_before(trainer_of(broken, train_prompts, **watched), 3)
    trainer_of(dataclasses.replace(broken, resume_from_checkpoint="latest"), train_prompts, **watched).train()
    same_checkpoint(tmp_path / "a/checkpoint-4", tmp_path / "b/checkpoint-4")


def test_the_lora_loads_in_plain_diffusers(refl, train_prompts):
    from diffusers import DiffusionPipeline

    args = refl("draft_1", learning_rate=1e-2)
    trainer = trainer_of(args, train_prompts)
    trainer.train()
    pipe = DiffusionPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(args.output_dir)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 16, "output_type": "latent"}
    noise = trainer.run.rng.normal((1, *trainer.model.latent_shape()), "test")
    theirs = pipe(train_prompts[0].text, latents=noise, **options).images
    x, conditioning = noise, trainer.run.prompts([train_prompts[0].text])
    with torch.no_grad():
        for i in range(4):
            v = trainer.model.predict(x, trainer.algorithm.levels[i], conditioning)
            x = x + (trainer.algorithm.levels.sigma[i + 1] - trainer.algorithm.levels.sigma[i]).float() * v
    torch.testing.assert_close(theirs, x, rtol=1e-4, atol=1e-4)


def test_a_trained_negative_prompt_is_an_argument_of_the_pipeline(refl, train_prompts):
    from diffusers import DiffusionPipeline

    args = refl("reneg", learning_rate=0.1)
    trainer = trainer_of(args, train_prompts)
    trainer.train()
    negative = load_file(args.output_dir / "negative_prompt.safetensors")
    assert set(negative) == {"negative_prompt_embeds", "negative_pooled_prompt_embeds"}
    assert not torch.equal(negative["negative_prompt_embeds"], trainer.run.prompts.empty.tensors["embeds"])
    pipe = DiffusionPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "max_sequence_length": 16, "output_type": "latent"}
    noise = trainer.run.rng.normal((1, *trainer.model.latent_shape()), "test")
    theirs = pipe(train_prompts[0].text, latents=noise, **negative, **options).images
    x, conditioning = noise, trainer.run.prompts([train_prompts[0].text])
    with torch.no_grad():
        for i in range(4):
            v = trainer.model.predict(x, trainer.algorithm.levels[i], conditioning, trainer.algorithm.guidance.plain)
            x = x + (trainer.algorithm.levels.sigma[i + 1] - trainer.algorithm.levels.sigma[i]).float() * v
    torch.testing.assert_close(theirs, x, rtol=1e-4, atol=1e-4)
