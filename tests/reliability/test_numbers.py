"""R20 to R27: bad numbers move nothing, and good ones are the same however they are computed."""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign import FlowGRPOTrainer
from diffalign.diffusion.plan import PRESETS, PlanConfig, make_plan
from diffalign.models.weights import POLICY, REFERENCE
from diffalign.rollout.advantages import group_advantages
from diffalign.runtime import checkpoint
from diffalign.runtime.errors import NotFinite
from diffalign.runtime.gradient_guard import DRIFT, ENOUGH, FLAT_ALARM, WINDOW, GradientGuard
from diffalign.runtime.tracking import MetricsLog
from tests.conftest import ROOT
from tests.phases import collect
from tests.reliability import faults
from tests.reliability.compare import rows
from tests.reliability.forks import Child, several
from tests.reliability.golden import FILE, STEPS, digests, trajectory, where
from tests.reliability.null import run
from tests.reliability.trainers import QUICK, TRAINERS, short


def everything(loop):
    """Weights, moments, EMA and learning rate, as bytes."""
    moments = [t for state in loop.state.optimizer.optimizer.state.values() for t in state.values()]
    tensors = [*loop.state.parameters, *(loop.state.ema.shadow if loop.state.ema else []), *moments]
    found = [t.detach().clone().numpy().tobytes() for t in tensors]
    return [*found, loop.state.ema.updates if loop.state.ema else 0, loop.state.schedule.state_dict()["last_epoch"]]


def poisoned(trainer, steps, where):
    """The loss, or only one gradient, is not finite at some steps; returns what every step left as it was."""
    loss_of, loop, unmoved = trainer.algorithm.loss, trainer.loop, []
    bad = torch.nan if where == "loss" else torch.inf

    def spoilt(micro):
        loss, metrics = loss_of(micro)
        return (loss * bad, metrics) if where == "loss" and loop.progress.step in steps else (loss, metrics)

    if where == "gradient":
        loop.state.parameters[0].register_hook(lambda g: g * bad if loop.progress.step in steps else g)
    trainer.algorithm.loss, take_step = spoilt, loop.state.step

    def watched(reason, norm):
        before, step = everything(loop), loop.progress.step
        take_step(reason, norm)
        if everything(loop) == before:
            unmoved.append(step)

    loop.state.step = watched
    return unmoved


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("name", QUICK)
def test_r20_a_number_that_is_not_finite_moves_nothing(name, tmp_path, where):
    trainer = TRAINERS[name].make(short(name, tmp_path / "run"))
    unmoved = poisoned(trainer, {1, 2}, where)
    trainer.train()
    assert unmoved == [1, 2]
    skips = MetricsLog.read(tmp_path / "run/skipped.jsonl")
    assert [row["step"] for row in skips] == [2, 3]
    assert all(row["samples"] and row["seed"] == 0 and "prompt" in row["samples"][0] for row in skips)
    assert {row["reason"] for row in skips} == {f"{where} not finite"}
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row.get("skipped") for row in logged] == [None, 1.0, 2.0, None]


@pytest.mark.parametrize("name", QUICK)
def test_r20_three_in_a_row_end_the_run_with_a_good_checkpoint(name, tmp_path):
    trainer = TRAINERS[name].make(short(name, tmp_path / "run", max_train_steps=8))
    poisoned(trainer, {1, 2, 3, 4}, "gradient")
    with pytest.raises(NotFinite, match=r"3 steps in a row.*lower learning_rate.*last good checkpoint: .*checkpoint-4"):
        trainer.train()
    assert NotFinite.exit_code == 76
    weights = checkpoint.load(tmp_path / "run/checkpoint-4")[0]["weights"]
    assert all(t.isfinite().all() for t in weights.values())


@pytest.mark.slow
def test_r20_the_exit_code_is_76(tmp_path):
    child = Child(tmp_path, faults.bad_on_one, str(tmp_path), [1, 2, 3])
    assert child.wait() == 76
    assert "skipped.jsonl names their samples" in child.text


@pytest.mark.slow
def test_r21_infinity_on_one_process_makes_all_skip_the_same_step(tmp_path):
    children = several(2, tmp_path, faults.bad_on_one, str(tmp_path), [1, 4])
    assert [child.wait() for child in children] == [0, 0], children[0].text
    skips = MetricsLog.read(tmp_path / "skipped.jsonl")
    assert [row["step"] for row in skips] == [2, 5]
    assert [sample["rank"] for sample in skips[0]["samples"]] == [0, 1]
    for tensors in checkpoint.load(checkpoint.latest(tmp_path))[0].values():
        assert all(t.isfinite().all() for t in tensors.values())


def test_r22_a_spike_is_skipped_and_remembered():
    guard = GradientGuard(spike_factor=100.0)
    for k in range(ENOUGH):
        guard.note(None, 1.0 + 0.1 * math.sin(k))
    again = GradientGuard(spike_factor=100.0)
    again.restore(json.loads(json.dumps(guard.state())))
    for each in (guard, again):
        usual, spike = (each.flags(torch.tensor(0.5), torch.tensor(norm)).tolist() for norm in (50.0, 1000.0))
        assert GradientGuard.reason(usual) is None
        assert GradientGuard.reason(spike) == "spike"
    again.note("spike", 1000.0)
    assert again.skipped == 1
    assert again.limit == guard.limit, "a spike is no part of what is usual"


def test_r22_spikes_that_stay_are_the_new_usual_and_a_drift_is_reported_once():
    guard = GradientGuard(spike_factor=100.0, norms=[1.0] * WINDOW)
    guard.note("spike", 500.0), guard.note("spike", 500.0)
    with pytest.warns(UserWarning, match="3 spikes in a row"):
        guard.note("spike", 500.0)
    assert guard.limit == math.inf
    drifting = GradientGuard()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for k in range(400):
            norm = 1.02**k
            assert GradientGuard.reason(drifting.flags(torch.tensor(0.0), torch.tensor(norm)).tolist()) is None
            drifting.note(None, norm)
    assert [str(w.message).split(" to ")[0] for w in said] == [
        f"gradients have drifted from a norm of {1.02**24.5:.3g}"
    ]
    assert drifting.norms[WINDOW // 2] > DRIFT * drifting.baseline
    assert drifting.skipped == 0


def test_r22_a_run_skips_a_loss_a_thousand_times_too_large_also_after_a_resume(tmp_path):
    def hook(phase, task):
        if phase == "backward" and not hasattr(task, "spoilt"):
            task.spoilt = True
            task.loop.state.parameters[0].register_hook(lambda g: g * (1000 if task.loop.progress.step == 26 else 1))

    settings = {"lr_scheduler": "constant", "checkpointing_steps": 24, "eval_steps": 0}
    run(tmp_path, hook, max_train_steps=24, **settings)
    run(tmp_path, hook, max_train_steps=30, **settings)
    (skip,) = MetricsLog.read(tmp_path / "skipped.jsonl")
    assert (skip["step"], skip["reason"]) == (27, "spike")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "ode"])
@pytest.mark.parametrize("steps", [4, 7])
def test_r23_replay_at_unchanged_weights_gives_a_ratio_of_one(preset, steps, tmp_path, frozen_trainer):
    trainer = frozen_trainer(preset, steps)
    batch = collect(trainer, 0)
    batch.buffer.advantage.fill_(1.0)  # a flat group would be left out, and another batch shape rounds differently
    with torch.no_grad():
        for minibatch in trainer.algorithm.minibatches(batch, 0):
            for micro in minibatch.micros:
                _, metrics = trainer.algorithm.loss(micro)
                assert metrics["log_ratio_max"].item() == 0.0
                assert metrics["ratio_mean"].item() == 1.0
        for step in batch.plan.plan.trained_steps:
            nodes = batch.buffer.transitions(step)
            result = trainer.algorithm._replay(batch, nodes)
            stored = batch.buffer.log_prob[nodes]
            # Relative, because where noise is small, as at the end of cps, it is divided by little.
            largest = 5e-5 if preset == "fdfo" else 1e-5  # a twentieth of the others' noise
            assert ((result.log_prob - stored).abs() / (1 + stored.abs())).max() <= largest


@pytest.fixture
def frozen_trainer(tmp_path, frozen_model):
    def make(preset, steps):
        options = {key: {"window_size": 2} for key in ("flow_grpo_fast", "mix_grpo", "cps_fast", "first_steps")}
        options |= {key: {"branch": (2,)} for key in ("tempflow_branch", "g2")}
        options["tree_rpo"] = {"window_size": 2, "noise_growth": 0.0}  # four steps bear no more noise
        plan = PlanConfig(preset=preset, num_steps=steps, **options.get(preset, {}))
        made = make_plan(plan, 0, 0, trees=True)
        changes = {"group_size": max(4, plan.leaves * max(1, len(made.anchors)))}
        changes |= {"plan": plan, "updates_per_rollout": 1, "rollout_batch_size": 2, "train_batch_size": 2}
        args = short("flow_grpo", tmp_path, max_train_steps=1, **changes)
        return FlowGRPOTrainer(model=frozen_model(), args=args)

    return make


@pytest.fixture
def frozen_model(model):
    return lambda: model


def test_r24_a_group_of_one_is_refused_when_settings_are_read(tmp_path):
    with pytest.raises(ValueError, match="a lone image has no group"):
        short("flow_grpo", tmp_path, group_size=1).validate()


def test_r24_equal_rewards_have_an_advantage_of_exactly_zero():
    for value in (0.0, 0.1, 1e30, -3.3):
        groups = torch.tensor([0, 0, 0, 1, 1, 1])
        rewards = {"a": torch.tensor([value] * 3 + [1.0, 2.0, 3.0])}
        found = group_advantages(rewards, groups, weights={"a": 1.0})
        assert (found[:3] == 0).all()
        assert found.isfinite().all()
        assert found[3:].abs().max() > 0.5


@pytest.mark.parametrize("name", ["flow_grpo", "online_dpo"])
def test_r24_flat_batches_move_nothing_and_are_an_alarm_after_five(name, tmp_path):
    args = short(name, tmp_path / "run", max_train_steps=6)
    trainer = TRAINERS[name].trainer(args=args, reward_funcs=lambda images, *_: torch.ones(len(images)))
    before = everything(trainer.loop)
    with pytest.warns(UserWarning, match=f"{FLAT_ALARM} updates in a row had no gradient"):
        trainer.train()
    count = len(trainer.loop.state.parameters)
    assert everything(trainer.loop)[:count] == before[:count]
    assert [row["skipped"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", QUICK)
def test_r25_training_leaves_the_base_as_it_was(name, tmp_path):
    trainer = TRAINERS[name].make(short(name, tmp_path / "run", max_train_steps=20, checkpointing_steps=0))
    model = trainer.model

    def base():
        frozen = [p for p in model.raw_denoiser.parameters() if not p.requires_grad]
        others = [p for n, c in model.pipeline.components.items() if n != model.denoiser_name
                  and isinstance(c, torch.nn.Module) for p in c.parameters()]  # fmt: skip
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in [*frozen, *others])).hexdigest()

    shape, levels = (1, *model.latent_shape()), model.levels(4)
    x, words = trainer.run.rng.normal(shape, "probe"), trainer.run.prompts(["a red circle"])

    @torch.no_grad()
    def says():
        return model.predict(x, levels[1], words)

    known, before = base(), says()
    trainer.train()
    assert base() == known
    with model.using(REFERENCE):
        assert torch.equal(says(), before), "with the adapter off it is the base, bit for bit"
    after = says()
    assert not torch.equal(after, before)
    weights = [p.detach().clone() for p in trainer.loop.state.parameters]

    def evaluation_that_fails():
        with model.using("ema"):
            assert not torch.equal(says(), after)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluation_that_fails()
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.loop.state.parameters, strict=True))
    assert all(p.requires_grad for p in trainer.loop.state.parameters)
    with model.using(POLICY):
        assert torch.equal(says(), after)


@pytest.mark.parametrize("name", QUICK)
def test_r26_one_pass_of_many_or_many_of_one_give_one_gradient(name, tmp_path):
    found = []
    for size in (1, 4):
        trainer = TRAINERS[name].make(short(name, tmp_path / str(size), num_pairs=4) if "num_pairs" in
                                      TRAINERS[name].settings else short(name, tmp_path / str(size)),
                                      train_batch_size=size)  # fmt: skip
        batch = collect(trainer, 0)
        for micro in next(iter(trainer.algorithm.minibatches(batch, 0))).micros:
            (trainer.algorithm.loss(micro)[0] * micro.weight).backward()
        found.append(torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters]).double())
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


@pytest.mark.slow
def test_r26_the_folder_it_runs_in_and_the_order_of_hashes_change_nothing(tmp_path):
    code = "import json, sys; from tests.reliability.golden import digests; print(json.dumps(digests(sys.argv[1])))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "other")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == digests(str(tmp_path / "here"))
    assert found.keys() == TRAINERS.keys()


@pytest.mark.parametrize("name", QUICK)
def test_r27_fifty_steps_are_the_golden_ones(name, tmp_path):
    golden = json.loads(FILE.read_text())[name]
    found = trajectory(name, tmp_path)
    assert len(found["loss"]) == STEPS
    strict = golden["where"] == where()
    tolerance = 1e-6 if strict else 1e-3
    for figure in ("loss", "grad_norm"):
        gaps = torch.tensor(found[figure], dtype=torch.float64) - torch.tensor(golden[figure], dtype=torch.float64)
        size = torch.tensor(golden[figure], dtype=torch.float64).abs().clamp(min=1e-3 if strict else 0.1)
        assert (gaps.abs() / size).max() <= tolerance, (figure, strict)
        assert gaps.mean().abs() <= tolerance * size.mean(), "no drift to one side"


def test_r27_a_trajectory_ends_in_weights_that_load(tmp_path):
    trajectory("flow_grpo", tmp_path, steps=2)
    assert load_file(tmp_path / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("name", QUICK)
def test_training_consumes_no_global_generator(name, tmp_path):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    trainer = TRAINERS[name].make(short(name, tmp_path, max_train_steps=2))
    before = states()
    trainer.train()
    assert states() == before
