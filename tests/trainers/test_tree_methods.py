"""BranchGRPO, TempFlow-GRPO, Granular-GRPO, Dynamic-TreeRPO, FDFO and trust regions in the Flow-GRPO trainer."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from diffalign import FlowGRPOTrainer, LoraConfig
from diffalign.diffusion.plan import PlanConfig
from diffalign.forecast.cost import run_work
from diffalign.losses.policy import TRUST_REGIONS
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.cost import Share
from diffalign.trainers.flow_grpo.algorithm import split_by_parent
from diffalign.trainers.registry import find_algorithm
from tests.conftest import ROOT
from tests.phases import assert_resumes_within_an_iteration, collect, update
from tests.reliability.forks import finished
from tests.trainers.short_trees import write

METHODS = {
    "branch": {"plan": PlanConfig("branch_grpo", num_steps=5, split_steps=(0, 2)), "group_size": 4},
    "pruned": {
        "plan": PlanConfig("branch_grpo", num_steps=5, split_steps=(0, 2), prune_steps=(1, 2)),
        "group_size": 4,
        "width_pruning": "best",
        "advantage_rule": "per_depth_weighted",
    },
    "tempflow": {
        "plan": PlanConfig("tempflow_branch", num_steps=4, branch=(3,)),
        "group_size": 9,
        "step_weights": "tempflow",
    },
    "g2": {"plan": PlanConfig("g2", num_steps=5, branch=(3,)), "group_size": 12, "rollout_batch_size": 5},
    "tree_rpo": {"plan": PlanConfig("tree_rpo", num_steps=6, window_size=2), "group_size": 4},
    "fdfo": {
        "plan": PlanConfig("fdfo", num_steps=4),
        "group_size": 2,
        "loss": "fdfo",
        "advantage_std": "unit",
        "clip_range": 0.03,
        "clip_unit": "per_dim",
    },
    "dppo": {"plan": PlanConfig("flow_grpo", num_steps=4), "group_size": 2, "loss": "dppo"},
}


@pytest.fixture
def trained(small, tmp_path, train_prompts):
    def make(method, folder="run", **changes):
        settings = {"train_prompts": "named.txt", "num_groups": 2, "rollout_batch_size": 64, "train_batch_size": 64}
        settings |= {"output_dir": tmp_path / folder, "lora": LoraConfig(rank=2), "rewards": {"brightness": 1.0}}
        return FlowGRPOTrainer(args=small(**(settings | METHODS[method] | changes)), train_dataset=train_prompts)

    return make


def gradient(trainer, batch):
    for parameter in trainer.loop.state.parameters:
        parameter.grad = None
    for minibatch in trainer.algorithm.minibatches(batch, 0):
        for micro in minibatch.micros:
            (trainer.algorithm.loss(micro)[0] * micro.weight).backward()
    return torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters])


@pytest.mark.parametrize("method", ["branch", "pruned", "tempflow", "g2", "tree_rpo"])
def test_the_gradient_of_trees_is_the_sum_over_their_transitions(trained, method):
    """-sum A grad log p / count, each transition once and evaluated alone, with densities in float64."""
    trainer = trained(method)
    batch, algorithm = collect(trainer), trainer.algorithm
    buffer, plan, levels = batch.buffer, batch.plan.plan, batch.plan.levels
    found = gradient(trainer, batch)

    kept = algorithm._kept(batch)
    rows = buffer.trained if kept is None else buffer.trained & kept
    rows = rows.nonzero().flatten().tolist()
    stds = {}
    for parameter in trainer.loop.state.parameters:
        parameter.grad = None
    losses = []
    for row in rows:
        step = int(buffer.step[row]) - 1
        x = buffer.x[buffer.parent[row]][None]
        own = batch.conditioning[buffer.group[[row]]]
        v = trainer.model.predict(x, levels[step], own, batch.plan.guidance).double()
        t, s, a = levels.sigma[step], levels.sigma[step + 1], plan.rows[step].noise_level
        dt = s - t
        guarded = s if t == 1 else t
        diffusion = (
            torch.tensor(a).double() if plan.rows[step].solver == "dance_sde" else a * (t / (1 - guarded)).sqrt()
        )
        drift = v + diffusion**2 / (2 * t) * (x.double() + (1 - t) * v)
        mean, stds[step] = x.double() + drift * dt, diffusion * (-dt).sqrt()
        log_prob = -((buffer.x[row].double() - mean) ** 2).mean() / (2 * stds[step] ** 2)
        losses.append((step, -buffer.advantage[row].double() * log_prob))
    weight = dict.fromkeys(stds, 1.0)
    if method == "tempflow":
        mean_std = sum(stds.values()) / len(stds)
        weight = {step: (std / mean_std).item() for step, std in stds.items()}
    sum(weight[step] * loss for step, loss in losses).div(len(rows)).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.loop.state.parameters])
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5 * expected.abs().max().item())


def test_a_reward_of_weight_zero_costs_no_image_where_it_fails(trained, monkeypatch):
    monkeypatch.setattr("diffalign.rewards.novelty.nearest_distance", lambda vectors, _: vectors[:, 0] * torch.nan)
    found = []
    for rewards in ({"brightness": 1.0}, {"brightness": 1.0, "novelty": 0.0}):
        trainer = trained("pruned", rewards=rewards)
        batch = collect(trainer)
        found.append((batch.buffer.advantage, trainer.algorithm._kept(batch), batch.metrics["unscored"]))
    assert all(torch.equal(one, other) for one, other in zip(*(f[:2] for f in found), strict=True))
    assert found[1][0].any()
    assert found[1][2] == 0


@pytest.mark.parametrize("method", ["pruned", "g2", "tree_rpo"])
def test_a_run_computes_what_was_forecast(trained, method):
    changes = {"max_train_steps": 3, "updates_per_rollout": 2, "num_groups": 4, "guidance_scale": 2.0}
    changes |= {"num_groups": 4, "train_batch_size": 3}
    trainer = trained(method, **changes)
    calls = {True: 0, False: 0}

    def count(module, args, kwargs):
        calls[torch.is_grad_enabled()] += len(kwargs["hidden_states"])

    trainer.model.raw_denoiser.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    work = run_work(find_algorithm("flow_grpo").cost, trainer.args, Share(), 0)
    assert calls == {True: work.training, False: work.evaluations - work.training}


@pytest.mark.parametrize("method", ["pruned", "g2"])
def test_several_steps_in_a_pass_give_the_same_gradient(trained, method):
    batch = collect(trained(method))
    found = [gradient(trained(method, train_times_per_forward=times, train_batch_size=2), batch) for times in (1, 3)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5 * found[0].abs().max().item())


def test_g2_trains_in_a_pass_per_group_where_flow_grpo_takes_one_per_image(trained):
    """Twelve transitions, four states: 1 / G of the evaluations."""
    work = {
        method: run_work(find_algorithm("flow_grpo").cost, trained(method, **changes).args, Share(), 0)
        for method, changes in (("g2", {}), ("tempflow", {"plan": PlanConfig("flow_grpo_fast", num_steps=5,
                                                                           window_size=2), "group_size": 3}))
    }  # fmt: skip
    assert work["g2"].training * 3 == work["tempflow"].training
    trainer = trained("g2", train_batch_size=1)
    (minibatch,) = trainer.algorithm.minibatches(collect(trainer), 0)
    assert [len(micro.rows) for micro in minibatch.micros] == [3] * 4


@pytest.mark.parametrize("method", ["g2", "fdfo"])
def test_a_run_that_resumes_within_an_iteration_is_the_run(trained, method, monkeypatch):
    changes = {"updates_per_rollout": 2, "max_train_steps": 4}
    assert_resumes_within_an_iteration(partial(trained, method, **changes), monkeypatch)


def test_fdfo_pulls_each_image_from_its_partner(trained):
    trainer = trained("fdfo")
    batch = collect(trainer)
    buffer, finals = batch.buffer, batch.buffer.x[batch.buffer.leaves]
    assert torch.equal(buffer.advantage[buffer.leaves][::2], -buffer.advantage[buffer.leaves][1::2])
    for chain in range(4):
        nodes = buffer.transitions(1)[[chain]]
        found = trainer.algorithm._direction(batch, nodes)
        assert torch.equal(found[0], (finals[chain] - finals[chain ^ 1]) / 2)
        rewards = buffer.rewards["brightness"][buffer.leaves]
        difference = (rewards[chain] - rewards[chain ^ 1]) / 2
        assert buffer.advantage[buffer.leaves][chain].item() == pytest.approx(difference.item(), abs=1e-6)


@pytest.mark.parametrize("region", sorted(TRUST_REGIONS))
@pytest.mark.parametrize("loss", ["flow_grpo", "grpo_guard"])
def test_every_region_trains(trained, region, loss):
    trainer = trained("dppo", loss=loss, trust_region=region, updates_per_rollout=2, learning_rate=1e-3)
    batch = collect(trainer)
    update(trainer, batch)
    metrics = [
        trainer.algorithm.loss(micro)[1] for mini in trainer.algorithm.minibatches(batch, 0) for micro in mini.micros
    ]
    assert all(value.isfinite() for found in metrics for value in found.values())
    assert ("divergence" in metrics[0]) == TRUST_REGIONS[region].means
    assert metrics[0]["log_ratio_max"] > 0


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("fdfo", {"group_size": 4}, "'fdfo' compares two images of a prompt, got group_size 4"),
        ("fdfo", {"clip_range": float("inf")}, "give a finite one, 0.03 is published"),
        ("fdfo", {"shared_start": False}, "'fdfo' compares images that start from one noise"),
        ("fdfo", {"advantage_std": "group"}, "got 'group': set advantage_std: unit"),
        ("fdfo", {"trust_region": "kl"}, "trust_region: read only by losses of a ratio"),
        (
            "fdfo",
            {"model": str(ROOT / "assets/shapes-sd"), "max_sequence_length": None},
            "compares velocities of flow models",
        ),
        ("g2", {"shared_start": False}, "branches from one ODE per prompt: set shared_start: true"),
        ("g2", {"group_size": 6}, "branches at 2 steps into 6 images each"),
        ("g2", {"width_pruning": "best"}, "width_pruning: read only by trees with several splits"),
        ("g2", {"advantage_std": "global"}, "advantage_std: not read by advantage_rule 'granular'"),
        ("dppo", {"width_pruning": "best"}, "width_pruning: read only with plan.branch"),
    ],
)
def test_what_cannot_train_is_refused(trained, method, changes, message):
    with pytest.raises(ValueError, match=message):
        trained(method, **changes)


def test_passes_hold_the_children_of_so_many_states():
    parent = torch.tensor([-1, -1, 0, 0, 0, 1, 1, 5])
    parts = split_by_parent(torch.arange(2, 8), parent, 2)
    assert [part.tolist() for part in parts] == [[2, 3, 4, 5, 6], [7]]
    chain = torch.arange(4, 9)
    parents = torch.cat([torch.full((4,), -1), torch.arange(5)])
    assert [p.tolist() for p in split_by_parent(chain, parents, 2)] == [p.tolist() for p in torch.split(chain, 2)]
    assert split_by_parent(chain[:0], parents, 2) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["branch", "g2", "fdfo"])
def test_two_processes_do_what_one_does(tmp_path, method):
    alone, both = (finished(count, tmp_path / str(count), write, method) for count in (1, 2))
    one, first, second = map(load_file, (alone / "0.safetensors", both / "0.safetensors", both / "1.safetensors"))
    assert (one.pop("world"), first.pop("world"), second.pop("world")) == (1, 2, 2)
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), f"the processes disagree on {name}"
        assert (first[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert sum(tensor.norm() for tensor in one.values()) > 0
    logs = [[row for row in MetricsLog.read(folder / "run/metrics.jsonl") if "loss" in row] for folder in (alone, both)]
    for single, double in zip(*logs, strict=True):
        for name in ("grad_norm", "reward/mean"):
            assert double[name] == pytest.approx(single[name], rel=5e-3), name
    assert logs[1][0]["grad_norm"] == pytest.approx(logs[0][0]["grad_norm"], rel=1e-4)
