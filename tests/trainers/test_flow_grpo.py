"""The trainer: exact where it must be, and loud where it cannot be right."""

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from diffalign import FlowGRPOTrainer, LoraConfig, Prompt
from diffalign.diffusion.plan import PlanConfig, make_plan
from diffalign.rewards.base import FunctionReward
from diffalign.runtime import checkpoint
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.flow_grpo.algorithm import step_weights
from tests.conftest import PIPELINE, PROMPTS
from tests.phases import collect
from tests.reliability.compare import same_run
from tests.reliability.stops import crash_before


def collected(args, prompts, **kwargs):
    trainer = FlowGRPOTrainer(args=args, train_dataset=prompts, **kwargs)
    return trainer, collect(trainer)


def gradients(trainer, batch):
    """The gradient of the first update, without taking it."""
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    for micro in minibatch.micros:
        (trainer.algorithm.loss(micro)[0] * micro.weight).backward()
    return torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters])


# Exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["flow_grpo", "flow_grpo_fast", "mix_grpo", "dance_grpo", "cps", "first_steps"])
def test_the_first_ratio_is_exactly_one(small, train_prompts, preset):
    window = {} if preset in ("flow_grpo", "dance_grpo", "cps") else {"window_size": 2}
    trainer, batch = collected(small(plan=PlanConfig(preset=preset, num_steps=5, **window)), train_prompts)
    batch.buffer.advantage.fill_(1.0)  # a flat group would be left out, and another batch shape rounds differently
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    for micro in minibatch.micros:
        _, metrics = trainer.algorithm.loss(micro)
        assert metrics["ratio_mean"].item() == 1.0
        assert metrics["log_ratio_max"].item() == 0.0


def test_gradient_is_minus_advantage_times_score(small, train_prompts):
    """On-policy, the gradient of the loss is that of -A log p, averaged over samples and trained steps."""
    trainer, batch = collected(small(), train_prompts)
    found = gradients(trainer, batch)
    samples = torch.arange(8)
    for parameter in trainer.loop.state.parameters:
        parameter.grad = None
    for step in batch.plan.plan.trained_steps:
        nodes = batch.buffer.nodes(samples, step + 1)
        result = trainer.algorithm._replay(batch, nodes)
        (-(batch.buffer.advantage[nodes] * result.log_prob).mean() / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters])
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batch_size_does_not_change_gradients(small, train_prompts, size):
    plain = gradients(*collected(small(rollout_batch_size=8, train_batch_size=4), train_prompts))
    other = gradients(*collected(small(rollout_batch_size=8, train_batch_size=size), train_prompts))
    assert plain.norm() > 0
    assert (plain - other).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("times", [2, 3, 8])
@pytest.mark.parametrize(
    "changes",
    [
        {"plan": PlanConfig("flow_grpo", num_steps=5)},
        {"plan": PlanConfig("flow_grpo", num_steps=5), "step_weights": "tempflow", "kl_beta": 0.1},
        {"plan": PlanConfig("flow_grpo", num_steps=4, branch=(2, 2)), "group_size": 8, "train_batch_size": 4},
    ],
    ids=["a chain", "weights of steps and a KL", "trees"],
)
def test_trained_times_in_one_forward_pass_do_not_change_gradients(changes, times, small, train_prompts, monkeypatch):
    """Nor the number of evaluations, which are in fewer passes."""
    found, calls = [], []
    for together in (1, times):
        trainer, batch = collected(
            small(**{"train_batch_size": 3, "train_times_per_forward": together, **changes}), train_prompts
        )
        with monkeypatch.context() as patch:
            calls.append(evaluations(patch, trainer.model))
            found.append(gradients(trainer, batch))
    plain, other = found
    assert plain.norm() > 0
    assert (plain - other).norm() < 1e-5 * plain.norm()
    assert sum(calls[0]) == sum(calls[1])
    assert len(calls[1]) < len(calls[0])


def test_a_flat_group_gives_zero_gradient(small, train_prompts):
    flat = collected(small(), train_prompts, reward_funcs=lambda images, prompts, metadata: torch.ones(len(images)))
    assert not gradients(*flat).any()


def evaluations(monkeypatch, model):
    """The rows of every call of the denoiser from now on."""
    rows, evaluate = [], type(model).evaluate

    def counted(self, x, time, conditioning):
        rows.append(len(x))
        return evaluate(self, x, time, conditioning)

    monkeypatch.setattr(type(model), "evaluate", counted)
    return rows


def test_samples_without_advantage_are_not_trained_on(small, train_prompts, monkeypatch):
    """The second group is flat: the update costs half, and its gradient is that of all samples."""

    def judge(images, prompts, metadata):
        flat = torch.tensor([text == second for text in prompts])
        return torch.where(flat, 1.0, images.mean((1, 2, 3)))

    trainer = FlowGRPOTrainer(args=small(), train_dataset=train_prompts, reward_funcs=judge)
    second = trainer.algorithm.collector.prompts_of(0)[1].text
    batch = collect(trainer, 0)
    rows = evaluations(monkeypatch, trainer.model)
    sparse = gradients(trainer, batch)
    assert sum(rows) == 4 * 2
    for parameter in trainer.loop.state.parameters:
        parameter.grad = None
    trainer.args.filter_zero_advantage = False
    whole = gradients(trainer, batch)
    assert sum(rows) == 4 * 2 + 8 * 2
    assert whole.norm() > 0
    assert (whole - sparse).norm() < 1e-5 * whole.norm()


def test_updates_without_a_gradient_are_skipped_and_do_not_sound_the_canary(small, train_prompts):
    """The first update's samples score as their groups do on average, the second's do not."""
    args = small(updates_per_rollout=2, max_train_steps=3)

    def judge(images, prompts, metadata):
        here = update_of[:4] if prompts[0] == first else update_of[4:]
        return torch.where(here == 0, 0.5, (here.cumsum(0) - 1).float())

    trainer = FlowGRPOTrainer(args=args, train_dataset=train_prompts, reward_funcs=judge)
    collector, plan = trainer.algorithm.collector, make_plan(args.plan, 0, args.seed)
    update_of, first = collector.update_index(0, plan), collector.prompts_of(0)[0].text
    trainer.train()
    rows = [row for row in MetricsLog.read(args.output_dir / "metrics.jsonl") if "loss" in row]
    assert [row["grad_norm"] > 0 for row in rows[:2]] == [False, True]
    assert [row.get("skipped") for row in rows[:2]] == [1.0, None]
    assert [row["kept_fraction"] for row in rows[:2]] == [0.25, 1.0]
    assert [row["passes_saved"] for row in rows[:2]] == [0.0, 0.0]


def test_a_kl_is_paid_for_every_sample(small, train_prompts, monkeypatch):
    flat, batch = collected(small(kl_beta=0.1), train_prompts, reward_funcs=lambda images, *_: torch.ones(len(images)))
    rows = evaluations(monkeypatch, flat.model)
    gradients(flat, batch)
    assert sum(rows) == 2 * 8 * 2  # policy and reference


def test_a_failed_sample_changes_no_other(small, train_prompts):
    def nearly(images, prompts, metadata):
        return images.mean((1, 2, 3)) * torch.tensor([torch.nan, 1.0, 1.0, 1.0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, batch = collected(small(max_unscored=0.3), train_prompts, reward_funcs=nearly)
    advantage = batch.buffer.advantage[batch.buffer.leaves].view(2, 4)
    assert (advantage[:, 0] == 0).all()
    assert advantage[:, 1:].sum(1).abs().max() < 1e-4
    assert advantage[:, 1:].abs().min() > 0


def test_kl_is_zero_at_the_reference_and_its_reference_is_the_base(small, train_prompts):
    trainer, batch = collected(small(kl_beta=0.1), train_prompts)
    algorithm = trainer.algorithm
    step = batch.plan.plan.trained_steps[0]
    nodes = batch.buffer.nodes(torch.arange(4), step + 1)
    result = algorithm._replay(batch, nodes)
    reference = algorithm._reference_means(batch, [nodes])[0]
    assert algorithm._kl(batch, result, reference, step).abs().max() == 0
    with torch.no_grad():
        for parameter in trainer.loop.state.parameters:
            parameter.add_(0.01)
    moved = algorithm._replay(batch, nodes)
    reference = algorithm._reference_means(batch, [nodes])[0]
    expected = (moved.mean - result.mean).square().flatten(1).mean(1) / (2 * moved.std**2)
    assert torch.allclose(algorithm._kl(batch, moved, reference, step), expected.float(), rtol=1e-4)
    algorithm._kl(batch, moved, reference, step).mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in trainer.loop.state.parameters)


def test_tempflow_weights_follow_the_schedule(small, train_prompts):
    args = small(plan=PlanConfig(preset="flow_grpo", num_steps=6), step_weights="tempflow")
    trainer, batch = collected(args, train_prompts)
    weights = step_weights(batch.plan.plan, trainer.algorithm.levels, "tempflow")
    assert list(weights) == [0, 1, 2, 3, 4]
    assert abs(sum(weights.values()) / 5 - 1) < 1e-9
    assert len(set(weights.values())) > 1


@pytest.mark.parametrize(
    "setting",
    [
        {"loss": "grpo_guard", "clip_range": 1e-3, "clip_unit": "per_dim"},
        {"kl_beta": 0.1, "kl_kind": "published"},
        {"old_log_prob": "recompute", "train_batch_size": 3},
        {"updates_per_rollout": 2, "max_train_steps": 4},
        {"guidance_scale": 3.0},
        {"gradient_checkpointing": True},
        {"lora": LoraConfig(rank=0), "kl_beta": 0.1},
        {"aggregate": "advantages", "advantage_std": "global", "shared_start": False},
        {"mixed_precision": "bf16", "decode_precision": "bf16", "clip_range": 100.0},
    ],
)
def test_options_run_and_learn(small, train_prompts, setting):
    args = small(**setting)
    trainer = FlowGRPOTrainer(args=args, train_dataset=train_prompts)
    before = [p.detach().clone() for p in trainer.loop.state.parameters]
    trainer.train()
    rows = MetricsLog.read(args.output_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, args.max_train_steps + 1))
    assert all(row["grad_norm"] > 0 for row in rows if "loss" in row)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.loop.state.parameters, strict=True))


# Resume -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resume_is_bit_exact(small, train_prompts, tmp_path):
    settings = {
        "ema_decay": 0.9,
        "checkpointing_steps": 2,
        "lr_scheduler": "cosine",
        "updates_per_rollout": 2,
        "eval_rewards": ("shapes_strict",),
        "eval_steps": 2,
    }
    straight = small(output_dir=tmp_path / "a", max_train_steps=6, **settings)
    FlowGRPOTrainer(args=straight, train_dataset=train_prompts, eval_dataset=train_prompts).train()
    broken = small(output_dir=tmp_path / "b", max_train_steps=6, **settings)
    crash_before(FlowGRPOTrainer(args=broken, train_dataset=train_prompts, eval_dataset=train_prompts), 2)
    torch.rand(100)  # what else the process drew must not matter
    again = dataclasses.replace(broken, resume_from_checkpoint="latest")
    FlowGRPOTrainer(args=again, train_dataset=train_prompts, eval_dataset=train_prompts).train()
    assert checkpoint.load(tmp_path / "a/checkpoint-6")[0].keys() == {"weights", "optimizer", "ema"}
    same_run(tmp_path / "a", tmp_path / "b")


def test_a_finished_run_is_left_alone(small, train_prompts, capsys):
    args = small()
    FlowGRPOTrainer(args=args, train_dataset=train_prompts).train()
    files = {path: path.stat().st_mtime_ns for path in args.output_dir.rglob("*.safetensors")}
    again = dataclasses.replace(args, resume_from_checkpoint="latest")
    FlowGRPOTrainer(args=again, train_dataset=train_prompts).train()
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in args.output_dir.rglob("*.safetensors")} == files


def test_training_consumes_no_global_generator(small, train_prompts):
    before = torch.random.get_rng_state()
    FlowGRPOTrainer(args=small(), train_dataset=train_prompts).train()
    assert torch.equal(torch.random.get_rng_state(), before)


# Checks -------------------------------------------------------------------------------------------------------------


def test_drift_before_the_first_update_stops_the_run(small, train_prompts):
    trainer, batch = collected(small(), train_prompts)
    trainer.loop._before_first_update(batch)
    batch.buffer.log_prob += trainer.algorithm.clip
    with pytest.raises(RuntimeError, match=r"drift by more than a tenth of the clip range .*step 0: .*recompute"):
        trainer.loop._before_first_update(batch)


def test_an_update_that_changes_nothing_stops_the_run(small, train_prompts):
    trainer, batch = collected(small(), train_prompts)
    trainer.loop._before_first_update(batch)
    with pytest.raises(RuntimeError, match="changed nothing in the denoiser's output"):
        trainer.loop._after_first_update(batch)
    trainer.loop._before_first_update(batch)
    with torch.no_grad():
        for parameter in trainer.loop.state.parameters:
            parameter.add_(0.01)
    trainer.loop._after_first_update(batch)


REFUSED = [
    ({"group_size": 1}, "a lone image has no group"),
    ({"num_groups": 3, "group_size": 3, "updates_per_rollout": 2}, "9 images do not divide"),
    ({"model": ""}, "model is missing: write model:"),
    ({"rewards": {}}, "rewards is empty: write rewards:"),
    ({"rewards": {"shape": 1.0}}, "unknown reward 'shape'.*did you mean 'shapes'"),
    ({"clip_range": 0.0}, "clip_range must be more than 0"),
    ({"checkpoints_total_limit": 1}, "must be at least 2"),
    ({"schedule": "karras"}, r"schedule: expected pipeline\|uniform"),
    ({"plan": PlanConfig(preset="first_steps", num_steps=4, window_size=4)}, "the last of 4 steps is not trained"),
    ({"ema_decay": 1.0}, "0.9 to 0.999 are usual"),
    ({"report_to": "notebook"}, "report_to 'notebook' is unknown"),
    ({"kl_beta": -1.0}, "kl_beta must be at least 0"),
]


@pytest.mark.parametrize(("setting", "message"), REFUSED)
def test_settings_that_cannot_train_are_refused_before_any_work(small, train_prompts, setting, message, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded before the settings were checked")

    monkeypatch.setattr("diffalign.trainers.base.load_model", loaded)
    with pytest.raises(ValueError, match=message):
        FlowGRPOTrainer(args=small(**setting), train_dataset=train_prompts)


def test_missing_prompts_are_refused(small):
    with pytest.raises(ValueError, match="train_prompts is missing: write train_prompts:"):
        FlowGRPOTrainer(args=small())
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        FlowGRPOTrainer(args=small(), train_dataset=[])


# The run folder -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("curves")
def test_a_run_folder_answers_by_itself(small, train_prompts):
    args = small(ema_decay=0.5, eval_rewards=("shapes_strict", "shapes"), save_rollouts=True)
    result = FlowGRPOTrainer(args=args, train_dataset=train_prompts, eval_dataset=train_prompts).train()
    folder = args.output_dir
    assert (result.step, list(result.evaluations)) == (2, [0, 2])
    assert result.weights == (folder / "pytorch_lora_weights.safetensors",)
    assert result.card == folder / "README.md"
    assert 0 <= result.tuned["eval/accuracy"] <= 1
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "checkpoint-2/manifest.json",
        "samples/step-000000.png",
        "samples/step-000002.png",
        "curves.png",
        "compare.png",
        "pytorch_lora_weights.safetensors",
        "raw/pytorch_lora_weights.safetensors",
        "README.md",
        "rollouts/metadata.jsonl",
    ):
        assert (folder / name).is_file(), name
    card = (folder / "README.md").read_text()
    assert f'pipe.load_lora_weights("{folder}")' in card
    assert "| shapes: wins over base |" in card
    evaluations = [row for row in MetricsLog.read(folder / "metrics.jsonl") if "eval/accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, 2]
    assert {"eval/shapes", "eval/diversity", "eval/accuracy/position"} <= evaluations[0].keys()
    rollouts = [json.loads(line) for line in (folder / "rollouts/metadata.jsonl").read_text().splitlines()]
    assert len(rollouts) == 8
    assert (folder / "rollouts" / rollouts[0]["file_name"]).is_file()


def test_a_run_that_learned_nothing_says_so(small, train_prompts):
    def constant(images, prompts, metadata):
        return torch.ones(len(images))

    with pytest.warns(UserWarning, match="this LoRA changes nothing"):
        FlowGRPOTrainer(args=small(adam_weight_decay=0.0), reward_funcs=constant, train_dataset=train_prompts).train()


@pytest.mark.usefixtures("curves")
def test_held_out_rewards_that_fail_leave_a_run_with_what_was_measured(small, train_prompts, recwarn):
    args = small()

    def lost(images, prompts, metadata):
        raise ZeroDivisionError

    trainer = FlowGRPOTrainer(args=args, train_dataset=train_prompts, eval_dataset=train_prompts[:2])
    trainer.outputs.evaluation.rewards = {"lost": FunctionReward("lost", lost)}
    trainer.train()
    assert all((args.output_dir / name).is_file() for name in ("curves.png", "compare.png", "README.md"))
    assert "| lost | – | – |" in (args.output_dir / "README.md").read_text()
    assert any("reward 'lost' failed on" in str(warning.message) for warning in recwarn)


def test_averaged_weights_are_evaluated_and_exported(small, train_prompts):
    args = small(ema_decay=0.999, max_train_steps=3)
    trainer = FlowGRPOTrainer(args=args, train_dataset=train_prompts, eval_dataset=train_prompts)
    trainer.train()
    raw = load_file(args.output_dir / "raw/pytorch_lora_weights.safetensors")
    averaged = load_file(args.output_dir / "pytorch_lora_weights.safetensors")
    assert raw.keys() == averaged.keys()
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
    first = next(i for i, (n, p) in enumerate(trainer.model.raw_denoiser.named_parameters()) if p.requires_grad)
    name = [n for n, _ in trainer.model.raw_denoiser.named_parameters()][first].replace(".default", "")
    assert torch.equal(averaged[f"transformer.{name}"], trainer.loop.state.ema.shadow[0])


def test_arguments_as_users_of_other_trainers_write_them(small, model):
    trainer = FlowGRPOTrainer(
        model=model,
        args=small(model=""),
        reward_funcs=["shapes", "jpeg_compressibility"],
        train_dataset=[Prompt("a circle", {"include": [{"class": "circle", "count": 1}]})],
    )
    assert trainer.algorithm.collector.weights == {"shapes": 1.0, "jpeg_compressibility": 1.0}
    metrics = collect(trainer).metrics
    assert {"reward/shapes", "reward/jpeg_compressibility", "zero_std_groups"} <= metrics.keys()
    other = FlowGRPOTrainer(PIPELINE, small(model="", train_prompts=PROMPTS / "shapes_train.jsonl"), "shapes")
    assert other.args.model == str(PIPELINE)
