"""Sampling of trees: every node once, with noise of its own, and the density that a replay finds again."""

import contextlib

import pytest
import torch

from diffalign.diffusion.plan import PUBLISHED_NOISE_LEVEL, Plan, Row
from diffalign.diffusion.schedule import flow_levels
from diffalign.rng import KeyedRNG
from diffalign.rollout.buffer import RolloutBuffer
from diffalign.rollout.generate import NoiseKeys, generate, replay
from diffalign.rollout.sampler import SamplingPlan, sample
from diffalign.rollout.tree import paths
from diffalign.structures import Conditioning, Guidance
from tests.rollout.decoded import rollouts

GROUP, SAMPLE = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
ODE, MULTI = Row("ode", 0.0, False), Row("dpmpp_2m", 0.0, False)


def sde(branch=1, solver="flow_sde", trained=True):
    return Row(solver, PUBLISHED_NOISE_LEVEL[solver], trained, branch=branch)


TREES = [
    (sde(2), sde(), sde(3), ODE),
    (ODE, sde(2), ODE, sde(2), MULTI, MULTI),
    (sde(2, trained=False), ODE, sde(), ODE),
    (MULTI, MULTI, sde(4), ODE),
]


def roll(model, prompts, rows, size=100, trees=slice(None), shared=False, guidance=None):
    plan = SamplingPlan(Plan(rows), model.levels(len(rows)), guidance)
    group, member = GROUP[trees], SAMPLE[trees]
    buffer = RolloutBuffer.allocate(plan.plan, group, member, list(prompts), model.latent_shape(), means=True)
    keys = NoiseKeys(KeyedRNG(0), "rollout", 0, group, member, shared)
    conditioning = model.encode([p.text for p in prompts])
    parts = [*rollouts(model, plan, conditioning, keys, buffer, size)]
    images = torch.cat([images for _, images in parts])
    assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == [*range(len(buffer.leaves))]
    assert len(images) == len(buffer.leaves)
    return buffer, images, plan, conditioning


@pytest.fixture
def evaluations(frozen, monkeypatch):
    """The batch sizes of the model's evaluations."""
    batches, evaluate = [], type(frozen).evaluate

    def counted(self, x, time, conditioning):
        batches.append(len(x))
        return evaluate(self, x, time, conditioning)

    monkeypatch.setattr(type(frozen), "evaluate", counted)
    return batches


@pytest.mark.parametrize("rows", TREES)
def test_each_node_is_evaluated_once(frozen, train_prompts, evaluations, rows):
    plan = Plan(rows)
    nodes = [len(GROUP) * paths(plan, step) for step in range(len(plan))]
    roll(frozen, train_prompts[:2], rows)
    assert evaluations == nodes
    for size in (1, 2, 4):
        evaluations.clear()
        roll(frozen, train_prompts[:2], rows, size)
        assert sum(evaluations) == sum(nodes)
        assert max(evaluations) <= size


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", TREES)
def test_neither_micro_batches_nor_processes_change_a_tree(frozen, train_prompts, rows, shared):
    whole, images, *_ = roll(frozen, train_prompts[:2], rows, shared=shared)
    parts, others, *_ = roll(frozen, train_prompts[:2], rows, 4, shared=shared)
    assert (whole.x - parts.x).abs().max() < 1e-5
    assert (whole.log_prob - parts.log_prob)[whole.trained].abs().max() < 1e-5
    assert (images - others).abs().max() < 2e-5
    halves = [roll(frozen, train_prompts[:2], rows, trees=own, shared=shared)[0] for own in (slice(0, 1), slice(1, 3))]
    assert (whole.x - torch.cat([half.x for half in halves])).abs().max() < 1e-5


@pytest.mark.parametrize("rows", TREES)
def test_no_two_nodes_are_alike(frozen, train_prompts, rows):
    buffer, *_ = roll(frozen, train_prompts[:2], rows)
    assert not buffer.x.isnan().any()
    assert len(buffer.x.unique(dim=0)) == len(buffer.x)
    assert buffer.log_prob[buffer.trained].isfinite().all()
    assert buffer.log_prob[~buffer.trained].isnan().all()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("solver", sorted(PUBLISHED_NOISE_LEVEL))
def test_replay_of_every_transition_is_exact(frozen, train_prompts, solver, guided):
    guidance = Guidance(3.0, frozen.encode([""])) if guided else None
    rows = (sde(2, solver), sde(1, solver), sde(3, solver), ODE)
    buffer, _, plan, conditioning = roll(frozen, train_prompts[:2], rows, guidance=guidance)
    replayed = 0
    for step in plan.plan.trained_steps:
        nodes = buffer.transitions(step)
        with torch.no_grad():
            result = replay(frozen, plan, conditioning, buffer, nodes)
        assert torch.equal(result.log_prob, buffer.log_prob[nodes])
        assert torch.equal(result.mean, buffer.means(nodes))
        replayed += len(nodes)
    assert replayed == len(buffer.transitions()) == 3 * (2 + 2 + 6)


def test_replay_evaluates_a_shared_parent_once(frozen, train_prompts, evaluations):
    buffer, _, plan, conditioning = roll(frozen, train_prompts[:2], (sde(4), ODE))
    evaluations.clear()
    replay(frozen, plan, conditioning, buffer, buffer.transitions(0))
    assert evaluations == [3]


def test_replay_takes_transitions_of_one_trained_step(frozen, train_prompts):
    buffer, _, plan, conditioning = roll(frozen, train_prompts[:2], (sde(2), sde(), ODE))
    for nodes in (buffer.transitions(), buffer.leaves):
        with pytest.raises(ValueError, match="replay transitions of one trained step"):
            replay(frozen, plan, conditioning, buffer, nodes)


def test_keys_carry_the_path_after_the_branching(frozen, train_prompts):
    """Before it, and in chains, they are the keys without a path."""
    keys = NoiseKeys(KeyedRNG(0), "rollout", 0, GROUP, SAMPLE)
    chain, tree = Plan((sde(), sde(), ODE)), Plan((sde(), sde(2), ODE))
    assert torch.equal(keys.at(chain, 2).step((2, 3), 1), keys.step((2, 3), 1))
    assert torch.equal(keys.at(tree, 1).step((2, 3), 0), keys.step((2, 3), 0)), "before the branching they agree"
    noise = keys.at(tree, 2).step((2, 3), 1)
    assert len(noise.unique(dim=0)) == 6
    wider = keys.at(Plan((sde(), sde(3), ODE)), 2).step((2, 3), 1)
    assert torch.equal(wider.unflatten(0, (3, 3))[:, :2].flatten(0, 1), noise), "more children leave the others as is"


@pytest.mark.parametrize("row", [Row("ode", 0.0, False, branch=2), Row("flow_sde", 0.0, False, branch=2)])
def test_a_step_without_noise_does_not_branch(frozen, row):
    with pytest.raises(ValueError, match=r"step 0 of the plan .*branching, but draws no noise"):
        SamplingPlan(Plan((row, ODE)), frozen.levels(2))


def test_keys_must_be_those_of_the_buffer(frozen, train_prompts):
    rows = (sde(2), ODE)
    plan = SamplingPlan(Plan(rows), frozen.levels(2))
    buffer = RolloutBuffer.allocate(plan.plan, GROUP[:2], SAMPLE[:2], list(train_prompts[:2]), frozen.latent_shape())
    keys = NoiseKeys(KeyedRNG(0), "rollout", 0, GROUP, SAMPLE)
    with pytest.raises(ValueError, match="a buffer of 4 leaves does not hold 3 trees of 2 leaves"):
        next(rollouts(frozen, plan, frozen.encode(["a", "b"]), keys, buffer, 4))
    with pytest.raises(ValueError, match="generate samples one image per key, and the plan branches"):
        next(generate(frozen, plan, frozen.encode(["a", "b"]), GROUP, keys, 4))


def test_a_sampled_tree_comes_back_from_its_files(frozen, train_prompts, tmp_path):
    buffer, images, plan, conditioning = roll(frozen, train_prompts[:2], TREES[0])
    buffer.save(tmp_path, images, model="m", seed=7)
    again = RolloutBuffer.load(tmp_path)
    for name in ("group", "sample", "parent", "depth", "step", "path", "leaf", "trained", "x", "log_prob", "mean"):
        assert torch.equal(getattr(again, name).nan_to_num(9), getattr(buffer, name).nan_to_num(9)), name
    with torch.no_grad():
        result = replay(frozen, plan, conditioning, again, again.transitions(2))
    assert torch.equal(result.log_prob, buffer.log_prob[buffer.transitions(2)])


class Linear:
    """A velocity that depends on latents and prompts, for latents of any shape."""

    parameterization, device = "flow", torch.device("cpu")

    def trajectory(self):
        return contextlib.nullcontext()

    def resolve_guidance(self, guidance):
        return guidance

    def predict(self, x, level, conditioning, guidance):
        return 0.3 * x + conditioning.tensors["embeds"].reshape(-1, *[1] * (x.ndim - 1))

    def decode(self, latents):
        return latents


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 3), (2, 3, 4, 4)], ids=["packed", "image", "video"])
@pytest.mark.parametrize("size", [2, 100])
@pytest.mark.parametrize("rows", TREES)
def test_latents_of_any_shape_follow_the_paths_one_by_one(shape, size, rows):
    """Against the sampling of each leaf alone, as a chain that draws the noise of its path."""
    model, levels = Linear(), flow_levels(torch.linspace(1, 0, len(rows) + 1, dtype=torch.float64))
    plan, keys = SamplingPlan(Plan(rows), levels), NoiseKeys(KeyedRNG(0), "rollout", 0, GROUP, SAMPLE)
    conditioning = Conditioning({"embeds": torch.tensor([0.5, -1.0])})
    buffer = RolloutBuffer.allocate(plan.plan, GROUP, SAMPLE, [], shape, means=True)
    final = torch.cat([x for _, x in rollouts(model, plan, conditioning, keys, buffer, size)])
    assert torch.equal(final, buffer.x[buffer.leaves])

    chain = SamplingPlan(Plan(tuple(Row(row.solver, row.noise_level, row.trained) for row in rows)), levels)
    digits = [index for index, row in enumerate(rows) if row.branch > 1]
    for leaf in buffer.leaves.tolist():
        address, path = (0, int(buffer.group[leaf]), int(buffer.sample[leaf])), buffer.path[leaf].tolist()

        def draw(index, address=address, path=path):
            taken = [child for step, child in zip(digits, path, strict=True) if step <= index]
            return KeyedRNG(0).normal_batch(shape, "rollout/step", [(*address, index, *taken)])

        start = KeyedRNG(0).normal_batch(shape, "rollout/start", [address])
        seen = {}
        sample(model, chain, conditioning[[address[1]]], start, draw, lambda i, r, seen=seen: seen.update({i + 1: r}))
        row = leaf
        while row >= 0:
            if (step := int(buffer.step[row])) == 0:
                torch.testing.assert_close(buffer.x[row], start[0])
            else:
                torch.testing.assert_close(buffer.x[row], seen[step].x_next[0])
            if buffer.trained[row]:
                torch.testing.assert_close(buffer.log_prob[row], seen[step].log_prob[0])
            row = int(buffer.parent[row])
