"""Diffusion-DPO's trainer: exact at the start, one noise for a pair, and the same run whatever interrupts it."""

import dataclasses
import io
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from diffalign import DiffusionDPOTrainer, LoraConfig
from diffalign.diffusion.plan import PlanConfig
from diffalign.runtime.tracking import MetricsLog
from tests.phases import collect
from tests.reliability.compare import same_checkpoint
from tests.reliability.stops import crash_before


def online(dpo, **changes):
    return dpo(
        train_data=(),
        rewards={"shapes": 1.0},
        plan=PlanConfig(preset="ode", num_steps=3),
        shared_start=False,
        num_groups=2,
        group_size=4,
        **changes,
    )


def first_losses(trainer):
    batch = collect(trainer, 0)
    (minibatch, *_) = trainer.algorithm.minibatches(batch, 0)
    found = [(trainer.algorithm.loss(micro), micro.weight) for micro in minibatch.micros]
    return [(loss * weight, metrics) for (loss, metrics), weight in found]


# Exactness ----------------------------------------------------------------------------------------------------------


def test_the_first_loss_is_ln_2_and_the_accuracy_a_half(dpo):
    ((loss, metrics),) = first_losses(DiffusionDPOTrainer(args=dpo()))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["accuracy"].item() == 0.5
    assert metrics["margin"].item() == 0
    loss.backward()


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batch_size_does_not_change_gradients(dpo, size):
    found = []
    for batch in (4, size):
        trainer = DiffusionDPOTrainer(args=dpo(train_batch_size=batch, output_dir=dpo().output_dir / str(batch)))
        for loss, _ in first_losses(trainer):
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters]))
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


def test_both_images_of_a_pair_have_one_noise_and_level_and_steps_have_others(dpo):
    trainer = DiffusionDPOTrainer(args=dpo(prompt_dropout=0.0))
    batch = collect(trainer, 0)
    rows = torch.arange(4)
    (winner, loser), noised = trainer.algorithm.denoise(batch.ranked, rows, 0)
    # The flow's target is noise - x0, so targets differ by the latents alone.
    latents = batch.ranked.latents
    torch.testing.assert_close(winner.target - loser.target, latents[:, 1] - latents[:, 0])
    assert torch.equal(*noised.level.sigma.chunk(2))
    assert torch.equal(*noised.noise.chunk(2))
    assert len(noised.level.sigma.unique()) == 4
    _, other = trainer.algorithm.denoise(batch.ranked, rows, 1)
    assert not (other.level.sigma == noised.level.sigma).any()
    assert not (other.noise == noised.noise).any()


@torch.no_grad()
def test_some_prompts_are_left_out_for_both_images_of_a_pair(dpo, monkeypatch):
    trainer = DiffusionDPOTrainer(args=dpo(num_pairs=12, prompt_dropout=0.25))
    batch = collect(trainer, 0)
    examples, rows = batch.ranked, torch.arange(12)
    full, empty = trainer.run.prompts(examples.texts).tensors, trainer.run.prompts.empty.tensors
    counts, seen, predict = [], [], trainer.algorithm.forward.predict
    monkeypatch.setattr(trainer.algorithm.forward, "predict", lambda *args: seen.append(args[1]) or predict(*args))
    for step in range(4):
        trainer.algorithm.denoise(examples, rows, step)
        found = seen[step].tensors
        kept = [torch.equal(found["embeds"][i], full["embeds"][i]) for i in range(12)]
        for name, values in found.items():
            side = torch.stack([full[name][i] if kept[i] else empty[name][0] for i in range(12)])
            assert torch.equal(values, torch.cat([side, side])), name
        counts.append(12 - sum(kept))
    assert 4 < sum(counts) < 20, "12 of 48 on average"


def test_the_preferred_image_comes_first(dpo, pairs):
    trainer = DiffusionDPOTrainer(args=dpo())
    batch = collect(trainer, 0)
    number = 0
    text = batch.ranked.texts[number]
    (row,) = [r for r in Dataset.from_parquet(str(pairs)) if r["caption"] == text][:1]
    images = [row["jpg_0"], row["jpg_1"]] if row["label_0"] == 1 else [row["jpg_1"], row["jpg_0"]]
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    for side, content in enumerate(images):
        image = pil_to_tensor(Image.open(io.BytesIO(content)).convert("RGB"))[None].float() / 255
        with torch.no_grad():
            expected = trainer.model.encode_images(image)[0]
        torch.testing.assert_close(batch.ranked.latents[number, side], expected, rtol=0, atol=1e-6)


def test_training_prefers_the_winners(dpo):
    args = dpo(max_train_steps=12, num_pairs=12, train_batch_size=12, learning_rate=3e-3, prompt_dropout=0.0)
    trainer = DiffusionDPOTrainer(args=args)
    trainer.train()
    rows = [row for row in MetricsLog.read(args.output_dir / "metrics.jsonl") if "loss" in row]
    assert rows[0]["accuracy"] == 0.5
    assert sum(row["margin"] for row in rows[-3:]) > 0
    assert (args.output_dir / "pytorch_lora_weights.safetensors").is_file()


# Everything that can be asked for ------------------------------------------------------------------------------------

OFFLINE = [
    {"loss": "ipo"},
    {"loss": "linear_dpo", "reference_decay": 0.9},
    {"loss": "mapo"},
    {"loss": "kto"},
    {"loss": "bco"},
    {"loss": "sft", "beta": None},
    {"loss": "dpo", "winner_mu": 0.9, "winner_weight": 0.1, "anchor_weight": 0.1, "max_margin": 0.1},
    {"auto_beta": 0.2, "reference_steps": 2},
    {"lora": LoraConfig(rank=0), "learning_rate": 1e-4},
    {"streaming": True, "time_sampling": "logit_normal"},
    {"times": (800.0, 500.0), "random_crop": True, "random_flip": True, "reduction": "sum", "beta": 0.1},
]


@pytest.mark.parametrize("setting", OFFLINE, ids=str)
def test_options_run_and_learn(dpo, setting):
    trainer = DiffusionDPOTrainer(args=dpo(**setting))
    before = [p.detach().clone() for p in trainer.loop.state.parameters]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.loop.state.parameters, strict=True))
    card = (trainer.args.output_dir / "README.md").read_text()
    assert ("A LoRA for" in card) == trainer.model.has_adapter


@pytest.mark.parametrize("loss", ["dpo", "kto", "sft"])
def test_the_models_own_images_make_examples(dpo, train_prompts, loss):
    args = online(dpo, loss=loss, beta=None, updates_per_rollout=2)
    trainer = DiffusionDPOTrainer(args=args, train_dataset=train_prompts)
    trainer.train()
    rows = [row for row in MetricsLog.read(args.output_dir / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    assert all("pairs" in row for row in rows)


# Resume -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"reference_decay": 0.9, "ema_decay": 0.9}, marks=pytest.mark.slow),
        pytest.param({"auto_beta": 0.2, "streaming": True}, marks=pytest.mark.slow),
        {"loss": "bco", "random_crop": True},
    ],
    ids=str,
)
def test_resume_is_bit_exact(dpo, tmp_path, setting):
    common = {"max_train_steps": 4, "checkpointing_steps": 2, **setting}
    DiffusionDPOTrainer(args=dpo(output_dir=tmp_path / "a", **common)).train()
    broken = dpo(output_dir=tmp_path / "b", **common)
    crash_before(DiffusionDPOTrainer(args=broken), 3)
    DiffusionDPOTrainer(args=dataclasses.replace(broken, resume_from_checkpoint="latest")).train()
    same_checkpoint(tmp_path / "a/checkpoint-4", tmp_path / "b/checkpoint-4")
    loras = [load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in "ab"]
    assert all(torch.equal(loras[0][name], loras[1][name]) for name in loras[0])


def test_a_warm_cache_changes_nothing_and_a_damaged_one_is_made_anew(dpo, tmp_path):
    weights = []
    for run in range(3):
        trainer = DiffusionDPOTrainer(args=dpo(output_dir=tmp_path / str(run), cache_dir=tmp_path / "cache"))
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.loop.state.parameters])
        files = sorted((tmp_path / "cache").rglob("*.safetensors"))
        assert files
        for file in files[:: run + 1]:
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"train_data": ()}, "train_data is missing"),
        ({"loss": "dop"}, "unknown preference loss 'dop'"),
        ({"loss": "sft"}, "'sft' has no beta"),
        ({"loss": "kto", "winner_weight": 1.0}, "winner_weight: for losses of pairs"),
        ({"loss": "cpo", "max_margin": 1.0}, "has no margin to bound"),
        ({"reference_decay": 0.9, "reference_steps": 2}, "the reference moves one way"),
        ({"num_pairs": 0}, "num_pairs must be at least 1"),
        ({"prompt_dropout": 1.0}, "prompt_dropout must be at least 0 and less than 1"),
        ({"rewards": {"shapes": 1.0}}, "two sources of pairs"),
        ({"loss": "kto", "streaming": True}, "single images, which are not streamed"),
    ],
)
def test_settings_that_cannot_train_are_refused(dpo, setting, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDPOTrainer(args=dpo(**setting))


def test_an_evaluation_needs_a_judge(dpo, train_prompts):
    with pytest.raises(ValueError, match="eval_rewards is missing"):
        DiffusionDPOTrainer(args=dpo(), eval_dataset=train_prompts)
