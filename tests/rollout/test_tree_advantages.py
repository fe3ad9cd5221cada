"""Advantages of BranchGRPO's weighted paths and of Granular-GRPO, and width pruning, against plain loops."""

import math

import numpy as np
import pytest
import torch

from diffalign.diffusion.plan import Plan, PlanConfig, Row, make_plan
from diffalign.rollout.anchored import allocate_anchored, anchored_trees
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.prune import kept_nodes, kept_per_level
from diffalign.structures import Prompt

ODE = Row("ode", 0.0, False)
PROMPTS = [Prompt("a red circle"), Prompt("two squares")]
TREE = Plan((*(Row("flow_sde", 0.7, True, branch=branch) for branch in (2, 1, 3, 1)), ODE))


def tree_buffer():
    buffer = RolloutBuffer.allocate(TREE, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), PROMPTS, (1, 2, 2))
    generator = torch.Generator().manual_seed(0)
    buffer.log_prob.copy_(torch.where(buffer.trained, torch.randn(len(buffer.step), generator=generator), torch.nan))
    return buffer, torch.randn(len(buffer.leaves), generator=generator, dtype=torch.float64)


def children_of(buffer, row):
    return (buffer.parent == row).nonzero().flatten().tolist()


def standardised(values):
    known = [value for value in values if value is not None]
    if len(known) < 2 or max(known) - min(known) < 1e-12:
        return [0.0] * len(values)
    return [0.0 if v is None else (v - np.mean(known)) / (np.std(known) + 1e-8) for v in values]


@pytest.mark.parametrize("failed", [False, True])
def test_paths_weigh_by_their_density(failed):
    buffer, rewards = tree_buffer()
    if failed:
        rewards[:3] = math.nan  # all leaves below one branch
        rewards[7] = math.inf
    leaves = buffer.leaves.tolist()

    def worth(row):
        if row in leaves:
            value = rewards[leaves.index(row)].item()
            return value if math.isfinite(value) else None
        known = [(child, value) for child in children_of(buffer, row) if (value := worth(child)) is not None]
        if not known:
            return None
        density = [0.0 if buffer.log_prob[c].isnan() else buffer.log_prob[c].item() for c, _ in known]
        weights = np.exp(np.array(density) - max(density))
        return float((weights / weights.sum()) @ np.array([value for _, value in known]))

    values = [worth(row) for row in range(len(buffer.step))]
    expected = torch.zeros(len(values), dtype=torch.float64)
    for group, sample in ((0, 0), (0, 1), (1, 0)):
        for step in buffer.steps:
            rows = ((buffer.group == group) & (buffer.sample == sample) & (buffer.step == step)).nonzero().flatten()
            expected[rows] = torch.tensor(standardised([values[row] for row in rows.tolist()]), dtype=torch.float64)
    buffer.set_advantages(torch.zeros(len(rewards)), "per_depth_weighted", rewards=rewards)
    torch.testing.assert_close(buffer.advantage.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("failed", [False, True])
def test_granularities_are_standardised_apart_and_add_up(failed):
    plan = make_plan(PlanConfig("g2", num_steps=6, branch=(4,)), 0, 0, trees=True)
    group, sample = anchored_trees(plan, [0, 1], 2 * 4 * 3 * 2)
    buffer = allocate_anchored(plan, group, sample, PROMPTS, (1, 2, 2))
    rewards = torch.randn(len(buffer.leaves), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if failed:
        rewards[[0, 9]] = math.nan
    column = torch.full((len(buffer.step),), torch.nan, dtype=torch.float64)
    column[buffer.leaves] = rewards

    expected = torch.zeros(len(buffer.step), dtype=torch.float64)
    for root in (buffer.parent < 0).nonzero().flatten().tolist():
        children = children_of(buffer, root)
        assert len(children) == 4
        for granularity in range(2):
            ends = [children_of(buffer, child)[granularity] for child in children]
            terms = standardised([None if column[end].isnan() else column[end].item() for end in ends])
            expected[children] += torch.tensor(terms, dtype=torch.float64)
    buffer.set_advantages(torch.zeros(len(rewards)), "granular", rewards=rewards)
    trained = buffer.trained
    assert int(trained.sum()) == 2 * 2 * 3 * 4
    torch.testing.assert_close(buffer.advantage[trained].double(), expected[trained], rtol=1e-6, atol=1e-7)
    if not failed:
        for root in (buffer.parent < 0).nonzero().flatten().tolist():
            assert abs(buffer.advantage[buffer.parent == root].sum()) < 1e-5


@pytest.mark.parametrize("rule", ["per_depth_weighted", "granular"])
def test_rules_of_trees_refuse_chains(rule):
    plan = Plan((ODE, ODE)) if rule == "granular" else Plan((Row("flow_sde", 0.7, True), ODE))
    buffer = RolloutBuffer.allocate(plan, torch.tensor([0, 0]), torch.tensor([0, 1]), PROMPTS, (1, 2, 2))
    with pytest.raises(ValueError, match="the plan does not branch: use subtree_mean"):
        buffer.set_advantages(torch.zeros(2), rule, rewards=torch.zeros(2))


@pytest.mark.parametrize("pruning", ["best", "best_worst"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.7, 1.0])
def test_pruning_keeps_the_best_branches_after_the_last_split(pruning, flat, ratio):
    buffer, rewards = tree_buffer()
    rewards = torch.zeros_like(rewards) if flat else rewards.index_fill(0, torch.tensor([4]), math.nan)
    kept = kept_nodes(buffer, TREE, pruning, rewards, ratio)
    assert kept[buffer.step <= 2].all()
    leaves, each = buffer.leaves.tolist(), 3 if pruning == "best" else 6  # of a state that splits last, or of a tree
    share = max(1 if pruning == "best" else 2, int(each * ratio))
    best = share if pruning == "best" else share // 2
    for level in buffer.steps:
        assert int(kept[buffer.step == level].sum()) == 3 * kept_per_level(TREE, pruning, level, ratio)
    chosen = [index for index, leaf in enumerate(leaves) if kept[leaf]]
    assert len(chosen) == len(leaves) // each * share
    if not flat and ratio < 1:
        for begin in range(0, len(leaves), each):
            finite = [i for i in range(begin, begin + each) if not math.isnan(rewards[i])]
            ranked = sorted(finite, key=lambda i: -rewards[i].item())
            wanted = {*ranked[:best], *ranked[len(ranked) - (share - best) :]}
            assert {i for i in chosen if begin <= i < begin + each} == wanted
    # What lies above a kept leaf is kept, and nothing else.
    for row in range(len(buffer.step)):
        below = [leaf for leaf in leaves if kept[leaf] and row in _above(buffer, leaf)]
        assert bool(kept[row]) == (bool(below) or int(buffer.step[row]) <= 2)


def _above(buffer, row):
    found = []
    while row >= 0:
        found.append(row)
        row = int(buffer.parent[row])
    return found
