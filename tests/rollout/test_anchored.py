"""Groups whose trees branch from one ODE: every node once, with noise of its own, finished at several strides."""

from dataclasses import replace

import pytest
import torch

from diffalign.diffusion.plan import PlanConfig, make_plan
from diffalign.diffusion.steps import step
from diffalign.models import DiffusionModel
from diffalign.rng import KeyedRNG
from diffalign.rollout.anchored import allocate_anchored, anchored_evaluations, anchored_latents, anchored_trees
from diffalign.rollout.buffer import bytes_needed
from diffalign.rollout.generate import NoiseKeys, decode, generate, replay, rollouts
from diffalign.rollout.sampler import SamplingPlan, ode_plan, sample
from diffalign.rollout.tree import trees_per_group

G2 = PlanConfig("g2", num_steps=5, branch=(3,))
CASES = [(G2, 12), (PlanConfig("tempflow_branch", num_steps=4, branch=(2,)), 12)]


def roll(model: DiffusionModel, prompts, config, group_size, size=100, groups=(0, 1)):
    plan = SamplingPlan(make_plan(config, 0, 0, trees=True), model.levels(config.num_steps))
    group, member = anchored_trees(plan.plan, groups, group_size)
    buffer = allocate_anchored(plan.plan, group, member, list(prompts), model.latent_shape(), means=True)
    keys = NoiseKeys(KeyedRNG(0), "rollout", 0, group, member, True)
    conditioning = model.encode([p.text for p in prompts])
    parts = [*anchored_latents(model, plan, conditioning, keys, buffer, size)]
    assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == [*range(len(buffer.leaves))]
    return buffer, decode(model, torch.cat([latents for _, latents in parts])), plan, conditioning


@pytest.fixture
def evaluations(frozen, monkeypatch):
    """The batch sizes of the model's evaluations."""
    batches, evaluate = [], type(frozen).evaluate

    def counted(self, x, time, conditioning):
        batches.append(len(x))
        return evaluate(self, x, time, conditioning)

    monkeypatch.setattr(type(frozen), "evaluate", counted)
    return batches


@pytest.mark.parametrize(("config", "group_size"), CASES)
def test_evaluations_are_the_nodes_alive(frozen, train_prompts, evaluations, config, group_size):
    buffer, _, plan, _ = roll(frozen, train_prompts[:2], config, group_size)
    steps, anchors = config.num_steps, plan.plan.anchors
    trees = trees_per_group(plan.plan, group_size) // len(anchors)
    trunk = anchors[-1] + 1
    legs = sum(trees * config.factors[0] * -(-(steps - s - 1) // g) for s in anchors for g in plan.plan.strides)
    assert sum(evaluations) == 2 * (trunk + legs)
    assert anchored_evaluations(plan.plan, 2, len(buffer.leaves) // config.leaves) == 2 * (trunk + legs)
    evaluations.clear()
    roll(frozen, train_prompts[:2], config, group_size, 4)
    assert sum(evaluations) == 2 * (trunk + legs)
    assert max(evaluations) <= 4
    assert buffer.x.nbytes + buffer.mean.nbytes == bytes_needed(
        plan.plan.tree(0), len(buffer.leaves) // config.leaves, frozen.latent_shape(), torch.float32, means=True
    )


@pytest.mark.parametrize(("config", "group_size"), CASES)
def test_children_are_one_noisy_step_from_the_ode_and_leaves_its_ode(frozen, train_prompts, config, group_size):
    buffer, images, plan, conditioning = roll(frozen, train_prompts[:2], config, group_size)
    steps, levels, strides = config.num_steps, plan.levels, plan.plan.strides
    start = NoiseKeys(KeyedRNG(0), "rollout", 0, torch.tensor([1]), torch.tensor([0]), True).start(
        frozen.latent_shape()
    )
    own = conditioning[torch.tensor([1])]
    for index, anchor in enumerate(plan.plan.anchors):
        trunk = start if not anchor else sample(frozen, SamplingPlan(ode_plan(steps), levels), own, start,
                                                steps=range(anchor))  # fmt: skip
        mine = (buffer.group == 1) & (buffer.sample % len(plan.plan.anchors) == index)
        root = (mine & (buffer.step == anchor) & (buffer.parent < 0)).nonzero().flatten()
        torch.testing.assert_close(buffer.x[root], trunk.expand(len(root), *trunk.shape[1:]), rtol=0, atol=1e-5)
        with torch.no_grad():
            output = frozen.predict(trunk, levels[anchor], own)
        row, tree = plan.plan.rows[anchor], int(buffer.sample[root[0]])
        keys = NoiseKeys(KeyedRNG(0), "rollout", 0, torch.tensor([1]), torch.tensor([tree]), True)
        noise = keys.at(plan.plan.tree(index), anchor + 1).step(frozen.latent_shape(), anchor)
        children = step(row.solver, trunk.repeat(row.branch, 1, 1, 1), output.repeat(row.branch, 1, 1, 1),
                        levels[anchor], levels[anchor + 1], parameterization=frozen.parameterization,
                        noise_level=row.noise_level, noise=noise).x_next  # fmt: skip
        found = buffer.trained & (buffer.parent == root[0])
        torch.testing.assert_close(buffer.x[found], children, rtol=0, atol=1e-5)
        # Leaves of a child follow its strides.
        for child, x in zip(found.nonzero().flatten().tolist(), children, strict=True):
            leaves = ((buffer.parent == child) & buffer.leaf).nonzero().flatten()
            assert len(leaves) == len(strides)
            for leaf, stride in zip(leaves.tolist(), strides, strict=True):
                grid = [*range(anchor + 1, steps, stride), steps]
                coarse = SamplingPlan(ode_plan(len(grid) - 1), levels[torch.tensor(grid)])
                final = sample(frozen, coarse, own, x[None])
                torch.testing.assert_close(buffer.x[leaf][None], final, rtol=0, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(frozen.decode(buffer.x[buffer.leaves]), images, rtol=0, atol=1e-5)


def test_neither_micro_batches_nor_processes_change_a_tree(frozen, train_prompts):
    whole, images, *_ = roll(frozen, train_prompts[:2], G2, 12)
    parts, others, *_ = roll(frozen, train_prompts[:2], G2, 12, 3)
    assert (whole.x - parts.x).abs().max() < 1e-5
    assert (whole.log_prob - parts.log_prob)[whole.trained].abs().max() < 1e-5
    assert (images - others).abs().max() < 2e-5
    for group in (0, 1):
        alone, *_ = roll(frozen, train_prompts[:2], G2, 12, groups=(group,))
        assert (whole.x[whole.group == group] - alone.x).abs().max() < 1e-5


def test_replay_is_exact_and_evaluates_each_state_once(frozen, train_prompts, evaluations):
    buffer, _, plan, conditioning = roll(frozen, train_prompts[:2], G2, 12)
    for anchor in plan.plan.trained_steps:
        nodes = buffer.transitions(anchor)
        assert len(nodes) == 2 * 3
        evaluations.clear()
        with torch.no_grad():
            result = replay(frozen, plan, conditioning, buffer, nodes)
        assert evaluations == [2]
        assert torch.equal(result.log_prob, buffer.log_prob[nodes])
        assert torch.equal(result.mean, buffer.means(nodes))


def test_a_tree_at_one_step_is_a_branching_plan(frozen, train_prompts):
    """An anchor alone is a window of one step with that branch factor."""
    config = PlanConfig("tempflow_branch", num_steps=4, branch=(3,), window_range=(1, 2))
    buffer, images, *_ = roll(frozen, train_prompts[:2], config, 3)
    same = PlanConfig("flow_grpo_fast", num_steps=4, window_size=1, window_range=(1, 2), branch=(3,))
    plan = SamplingPlan(make_plan(same, 0, 0, trees=True), frozen.levels(4))
    group, member = torch.tensor([0, 1]), torch.tensor([0, 0])
    other = type(buffer).allocate(plan.plan, group, member, list(train_prompts[:2]), frozen.latent_shape(), means=True)
    keys = NoiseKeys(KeyedRNG(0), "rollout", 0, group, member, True)
    conditioning = frozen.encode([p.text for p in train_prompts[:2]])
    expected = torch.cat([part for _, part in rollouts(frozen, plan, conditioning, keys, other, 100)])
    assert torch.equal(buffer.x, other.x)
    assert torch.equal(images, expected)


def test_trees_of_a_trunk_share_their_start_and_cannot_be_generated_alone(frozen, train_prompts):
    plan = SamplingPlan(make_plan(G2, 0, 0, trees=True), frozen.levels(5))
    group, member = anchored_trees(plan.plan, [0], 12)
    buffer = allocate_anchored(plan.plan, group, member, list(train_prompts[:1]), frozen.latent_shape())
    keys, conditioning = NoiseKeys(KeyedRNG(0), "rollout", 0, group, member), frozen.encode(["a"])
    with pytest.raises(ValueError, match="share their initial noise: set shared_start: true"):
        next(anchored_latents(frozen, plan, conditioning, keys, buffer, 4))
    with pytest.raises(ValueError, match="the plan branches"):
        next(generate(frozen, plan, conditioning, torch.tensor([0]), keys, 1))
    with pytest.raises(ValueError, match=r"branches at 2 steps into 6 images each.*set group_size: 24"):
        trees_per_group(replace(plan).plan, 13)
