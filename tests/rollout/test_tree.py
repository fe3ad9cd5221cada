"""Buffers of branching plans, and advantages on them, against brute force."""

import math

import datasets
import numpy as np
import pytest
import torch

from diffalign.data.rollouts import Pairing, rollout_pairs
from diffalign.diffusion.plan import Plan, Row
from diffalign.rollout.advantages import ADVANTAGE_RULES, advantage_rule, group_advantages
from diffalign.rollout.buffer import RolloutBuffer, bytes_needed
from diffalign.rollout.tree import path_table, paths, trees_per_group
from diffalign.structures import Prompt

ODE = Row("ode", 0.0, False)
PROMPTS = [Prompt("a red circle", {"tag": "colors"}), Prompt("two squares")]
GROUP, SAMPLE = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])


def plan_of(*branches):
    return Plan((*(Row("flow_sde", 0.7, True, branch=branch) for branch in branches), ODE))


PLANS = [plan_of(1, 2, 1, 3), plan_of(2, 2), plan_of(1, 1), Plan((ODE, Row("cps", 0.5, False, branch=3), ODE, ODE))]


def allocated(plan, shape=(2, 3, 3), **options):
    return RolloutBuffer.allocate(plan, GROUP, SAMPLE, PROMPTS, shape, **options)


def ancestors(buffer, row):
    """The row and all that lie above it."""
    found = []
    while row >= 0:
        found.append(row)
        row = int(buffer.parent[row])
    return found


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 5), (2, 3, 4, 4)])
def test_columns_describe_the_tree(plan, shape):
    buffer = allocated(plan, shape, means=True)
    assert buffer.x.nbytes + buffer.mean.nbytes == bytes_needed(plan, 3, shape, torch.float32, means=True)
    assert len(buffer.leaves) == 3 * paths(plan, len(plan))
    assert torch.equal(buffer.transitions(), buffer.trained.nonzero().flatten())
    seen = set()
    for row in range(len(buffer.step)):
        above = ancestors(buffer, row)
        assert buffer.depth[row] == len(above) - 1
        seen.add(
            (
                *buffer.group[[row]].tolist(),
                *buffer.sample[[row]].tolist(),
                *buffer.path[row].tolist(),
                int(buffer.step[row]),
            )
        )
        for old in above[1:]:
            assert (buffer.group[old], buffer.sample[old]) == (buffer.group[row], buffer.sample[row])
            known = buffer.path[old] >= 0
            assert torch.equal(buffer.path[old][known], buffer.path[row][known])
        if buffer.trained[row]:
            assert buffer.step[above[1]] == buffer.step[row] - 1
    assert len(seen) == len(buffer.step), "no two nodes share an address"


@pytest.mark.parametrize("plan", PLANS)
def test_nodes_are_the_ancestors_of_leaves(plan):
    buffer = allocated(plan)
    order = torch.arange(len(buffer.leaves)).flip(0)
    for step in buffer.steps:
        rows = buffer.nodes(order, step).tolist()
        assert [step] * len(rows) == buffer.step[rows].tolist()
        assert all(
            row in ancestors(buffer, leaf) for row, leaf in zip(rows, buffer.leaves[order].tolist(), strict=True)
        )
    with pytest.raises(ValueError, match="step 99 is not stored; stored"):
        buffer.nodes(slice(None), 99)


def test_a_shared_transition_is_one():
    plan = plan_of(1, 2, 1, 3)
    buffer = allocated(plan)
    assert len(buffer.transitions()) == 3 * (1 + 2 + 2 + 6) < len(buffer.leaves) * len(plan.trained_steps)
    with pytest.raises(ValueError, match="samples of a tree share nodes"):
        _ = buffer.nodes_per_sample


def test_paths_of_a_level():
    assert path_table(plan_of(1, 2, 1, 3), 2).tolist() == [[0, -1], [1, -1]]
    assert path_table(plan_of(2, 2), 3).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert path_table(plan_of(1, 1), 3).shape == (1, 0)


def by_hand(buffer, rule, rewards, advantages):
    """The definition of each rule, one node at a time, in float64."""
    leaves = buffer.leaves.tolist()
    under = [[i for i, leaf in enumerate(leaves) if row in ancestors(buffer, leaf)] for row in range(len(buffer.step))]
    if rule == "leaf":
        return [advantages[own[0]] if len(own) == 1 else 0.0 for own in under]
    if rule == "subtree_mean":
        return [np.mean(advantages[own]) for own in under]
    means = [
        np.mean(good) if len(good := [rewards[i] for i in own if np.isfinite(rewards[i])]) else None for own in under
    ]
    found = []
    for row, mean in enumerate(means):
        alike = [
            means[other]
            for other in range(len(means))
            if means[other] is not None and all(c[other] == c[row] for c in (buffer.group, buffer.sample, buffer.step))
        ]
        flat = mean is None or max(alike) - min(alike) < 1e-12
        found.append(0.0 if flat else (mean - np.mean(alike)) / (np.std(alike) + 1e-8))
    return found


@pytest.mark.parametrize("rule", ["leaf", "subtree_mean", "per_depth"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("failed", [False, True])
def test_advantage_rules_equal_the_plain_loop(rule, plan, failed):
    buffer = allocated(plan)
    count = len(buffer.leaves)
    if rule == "per_depth" and plan.rows == plan_of(1, 1).rows:
        with pytest.raises(ValueError, match="the plan does not branch: use subtree_mean"):
            buffer.set_advantages(torch.zeros(count), rule, rewards=torch.zeros(count))
        return
    rewards = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if failed:
        rewards[:2] = math.nan
    advantages = group_advantages({"r": rewards}, buffer.group[buffer.leaves])
    buffer.set_advantages(advantages, rule, rewards=rewards)
    expected = torch.tensor(by_hand(buffer, rule, rewards.numpy(), advantages.double().numpy()), dtype=torch.float64)
    torch.testing.assert_close(buffer.advantage.double(), expected, rtol=1e-6, atol=1e-7)


def test_on_chains_rules_of_leaves_are_flow_grpo_to_the_bit():
    advantages = torch.tensor([0.1, -1.3, 0.7])
    for rule in ("leaf", "subtree_mean"):
        buffer = allocated(plan_of(1, 1))
        buffer.set_advantages(advantages, rule)
        assert torch.equal(buffer.advantage, advantages.repeat_interleave(4))
        buffer.set_advantages(advantages)
        assert torch.equal(buffer.advantage, advantages.repeat_interleave(4))


def test_advantages_of_a_depth_sum_to_zero():
    buffer = allocated(plan_of(2, 2, 1))
    rewards = torch.arange(12.0).square()
    buffer.set_advantages(rewards, "per_depth", rewards=rewards)
    for group, sample in zip(GROUP.tolist(), SAMPLE.tolist(), strict=True):
        for step in buffer.steps:
            here = (buffer.group == group) & (buffer.sample == sample) & (buffer.step == step)
            assert abs(buffer.advantage[here].sum()) < 1e-5


def test_rules_are_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        advantage_rule("leaf")(ADVANTAGE_RULES["leaf"].compute)
    with pytest.raises(ValueError, match="unknown advantage rule 'best'; known: leaf"):
        allocated(plan_of(2)).set_advantages(torch.zeros(6), "best")


@pytest.mark.parametrize(
    ("rule", "given", "message"),
    [
        ("per_depth", {"advantages": torch.zeros(6)}, "normalises the rewards of leaves: pass rewards"),
        ("leaf", {"advantages": torch.zeros(5)}, r"shape \(5,\) for 6 leaves"),
        ("per_depth", {"advantages": torch.zeros(6), "rewards": torch.zeros(1)}, r"shape \(1,\) for 6 leaves"),
    ],
)
def test_a_rule_reads_a_value_per_leaf(rule, given, message):
    buffer = allocated(plan_of(2))
    with pytest.raises(ValueError, match=message):
        buffer.set_advantages(rule=rule, **given)


def test_leaves_of_a_tree_do_not_move_alone():
    with pytest.raises(ValueError, match="share ancestors and cannot move alone"):
        allocated(plan_of(2)).moved(torch.arange(2), lambda column: column)


def test_leaves_are_named_by_their_index_in_the_group():
    named = allocated(plan_of(2, 2)).named(torch.tensor([0, 5, 11]))
    assert [(leaf["group"], leaf["member"], leaf["prompt"]) for leaf in named] == [
        (0, 0, "a red circle"),
        (0, 5, "a red circle"),
        (1, 3, "two squares"),
    ]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 5), (2, 3, 4, 4)])
def test_what_is_drawn_fills_a_new_buffer(plan, shape):
    buffer, again = (allocated(plan, shape, means=True) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for column in (buffer.x, buffer.log_prob, buffer.mean):
        column.normal_(generator=generator)
    buffer.set_rewards({"shapes": torch.arange(float(len(buffer.leaves)))})
    buffer.set_advantages(torch.arange(float(len(buffer.leaves))))
    again.fill({name: tensor.clone() for name, tensor in buffer.drawn().items()})
    assert all(torch.equal(t.nan_to_num(9), again.drawn()[name].nan_to_num(9)) for name, t in buffer.drawn().items())


@pytest.mark.parametrize(("plan", "leaves"), [(plan_of(1, 2, 1, 3), 6), (plan_of(2, 2), 4), (plan_of(1, 1), 1)])
def test_a_group_is_made_of_whole_trees(plan, leaves):
    assert trees_per_group(plan, 2 * leaves) == 2
    if leaves > 1:
        with pytest.raises(ValueError, match=rf"has {leaves} images.*set group_size: {2 * leaves}$"):
            trees_per_group(plan, leaves + 1)


def test_the_disk_form_of_a_tree_comes_back_and_reads_as_pairs(tmp_path):
    buffer = allocated(plan_of(1, 2, 1, 3), means=True)
    buffer.x.normal_(generator=torch.Generator().manual_seed(0))
    buffer.mean.zero_()
    count = len(buffer.leaves)
    buffer.set_rewards({"shapes": torch.arange(float(count))})
    buffer.save(tmp_path, torch.rand(count, 3, 8, 8), model="m", seed=7)
    again = RolloutBuffer.load(tmp_path)
    for name in ("group", "sample", "parent", "depth", "step", "path", "leaf", "trained", "x", "mean"):
        assert torch.equal(getattr(again, name), getattr(buffer, name)), name
    lines = datasets.load_dataset(
        "json", data_files=str(tmp_path / "metadata.jsonl"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert len({line["file_name"] for line in lines}) == count
    assert [line["sample"] for line in lines] == [*range(12), *range(6)]
    pairs = rollout_pairs(list(lines), Pairing())
    assert [pair["name"] for pair in pairs] == ["group 0, samples 11 and 0", "group 1, samples 5 and 0"]
