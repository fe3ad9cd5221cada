"""Step-wise preference: children of one state, and the steps of whole paths."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from diffalign import DiffusionDPOConfig, DiffusionDPOTrainer, LoraConfig
from diffalign.data.config import PreferenceDataConfig
from diffalign.data.rollouts import Pairing
from diffalign.diffusion.parameterization import to_x0
from diffalign.diffusion.plan import PlanConfig
from diffalign.diffusion.steps import step, transition
from diffalign.rewards.base import FunctionReward
from diffalign.rollout.generate import NoiseKeys
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.diffusion_dpo.siblings_config import SiblingsConfig
from tests.conftest import PIPELINE
from tests.phases import assert_resumes_within_an_iteration, collect, update
from tests.reliability.forks import finished
from tests.trainers.short_siblings import write

METHODS = {"spo": "spo", "tailorpo": "tailorpo", "tailorpo_g": "tailorpo", "d3po": "d3po"}


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))


RED = FunctionReward("red", red, differentiable=True)


@pytest.fixture
def stepwise(tmp_path, train_prompts):
    """A trainer of two prompts and three children; keyword arguments override its configuration."""

    def make(preset="spo", folder="run", rewards=RED, siblings=None, **changes):
        own = {} if preset == "d3po" else {"first_step": 1}
        settings = {
            "model": str(PIPELINE),
            "max_sequence_length": 16,
            "train_prompts": "named.txt",
            "output_dir": tmp_path / folder,
            "lora": LoraConfig(rank=4),
            "pairs": "siblings",
            "siblings": SiblingsConfig(preset, **(own | (siblings or {}))),
            "loss": METHODS[preset],
            "plan": PlanConfig("flow_grpo", num_steps=4, solver="cps"),
            "num_groups": 2,
            "group_size": 3,
            "max_train_steps": 2,
            "cache": False,
        }
        if preset == "d3po":
            settings["shared_start"] = True
        args = DiffusionDPOConfig(**(settings | changes))
        return DiffusionDPOTrainer(args=args, reward_funcs=rewards, train_dataset=train_prompts)

    return make


def test_children_are_steps_from_their_state_with_noise_of_their_path(stepwise):
    trainer = stepwise("tailorpo")
    paths = trainer.algorithm.sample(0).rollout
    model, source = trainer.model, trainer.algorithm.source
    plan, conditioning = source._plan(0), trainer.run.prompts([p.text for p in source.collector.prompts_of(0)])
    best = source.total(paths.rewards).argmax(2)
    for column, index in enumerate((1, 2)):
        with torch.no_grad():
            output = model.predict(paths.x[:, column], plan.levels[index], conditioning, plan.guidance)
        for child in range(3):
            path = [best[:, c] for c in range(column)] + [torch.full((2,), child)]
            keys = NoiseKeys(trainer.run.rng, "rollout", 0, torch.arange(2), torch.zeros(2, dtype=torch.long),
                             path=torch.stack(path, 1))  # fmt: skip
            expected = step("cps", paths.x[:, column], output, plan.levels[index], plan.levels[index + 1],
                            parameterization=model.parameterization, noise_level=0.8,
                            noise=keys.step(model.latent_shape(), index))  # fmt: skip
            torch.testing.assert_close(paths.children[:, column, child], expected.x_next, rtol=0, atol=1e-5)
    # The winner goes on, judged by the clean image that the model predicts from it.
    assert torch.equal(paths.x[:, 1], paths.children[torch.arange(2), 0, best[:, 0]])
    with torch.no_grad():
        output = model.predict(paths.x[:, 1], plan.levels[2], conditioning, plan.guidance)
        images = model.decode(to_x0(model.parameterization, paths.x[:, 1], output, plan.levels[2]))
    judged = paths.rewards["red"][torch.arange(2), 0, best[:, 0]]
    torch.testing.assert_close(red(images, None, None), judged, rtol=0, atol=1e-5)


def test_a_random_child_goes_on_and_the_best_and_the_worst_are_the_pair(stepwise):
    trainer = stepwise("spo", num_groups=4)
    batch = collect(trainer)
    paths, examples = batch.rollout, batch.ranked
    survivors = (paths.x[:, 1, None] == paths.children[:, 0]).flatten(2).all(2)
    assert torch.equal(survivors.sum(1), torch.ones(4, dtype=torch.long))
    best = trainer.algorithm.source.total(paths.rewards)[:, 0].argmax(1)
    assert not torch.equal(survivors.long().argmax(1), best), "not always the winner"
    totals = trainer.algorithm.source.total(paths.rewards).flatten(0, 1)
    children = paths.children.flatten(0, 1)
    assert torch.equal(examples.x_next[:, 0], children[torch.arange(8), totals.argmax(1)])
    assert torch.equal(examples.x_next[:, 1], children[torch.arange(8), totals.argmin(1)])
    assert examples.x.shape[1] == 1
    assert examples.step.tolist() == [1, 2] * 4
    assert batch.metrics["pairs"] == 8


@pytest.mark.parametrize(("preset", "size"), [("spo", 2), ("tailorpo", 4)])
def test_micro_batches_change_no_path(stepwise, preset, size):
    whole = stepwise(preset).algorithm.sample(1).rollout
    parts = stepwise(preset, rollout_batch_size=size).algorithm.sample(1).rollout
    torch.testing.assert_close(parts.x, whole.x, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.children, whole.children, rtol=0, atol=1e-5)


def test_rewards_are_handed_the_time_of_the_state(stepwise):
    seen = []

    def timed(images, prompts, metadata):
        seen.extend(entry.get("time", 0.0) for entry in metadata)
        return images.mean((1, 2, 3))

    trainer = stepwise(rewards=timed)
    seen.clear()
    trainer.algorithm.sample(0)
    times = trainer.algorithm.source.collector.levels.time[[2, 3]].tolist()
    assert seen == [time for time in times for _ in range(6)]


def test_a_step_without_update_has_the_log_ratio_zero_and_an_update_prefers_the_winner(stepwise):
    trainer = stepwise("tailorpo", learning_rate=1e-4, adam_weight_decay=0.0, beta=0.1)
    batch = collect(trainer)
    rows = torch.arange(len(batch.ranked.texts))
    before, _ = trainer.algorithm.compare(batch.ranked, rows, 0)
    assert all(not side.gain.any() for side in before)
    update(trainer, batch)
    winner, loser = trainer.algorithm.compare(batch.ranked, rows, 0)[0]
    assert (winner.gain - loser.gain).mean() > 0


@pytest.mark.parametrize("preset", ["spo", "d3po"])
def test_gains_are_log_ratios_of_the_sampled_steps(stepwise, preset):
    trainer = stepwise(preset)
    batch = collect(trainer)
    for parameter in trainer.loop.state.parameters:
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    examples, model, rows = batch.ranked, trainer.model, torch.tensor([2, 0])
    sides, level = trainer.algorithm.compare(examples, rows, 0)
    plan, texts = examples.plan, [examples.texts[i] for i in rows.tolist()]
    assert torch.equal(level.sigma, plan.levels[examples.step[rows]].sigma)
    for number, side in enumerate(sides):
        for position, row in enumerate(rows.tolist()):
            index = int(examples.step[row])
            begin, end = plan.levels[index], plan.levels[index + 1]
            x = examples.x[row, min(number, examples.x.shape[1] - 1)][None]
            found = []
            for weights in ("policy", "reference"):
                with torch.no_grad(), model.using(weights):
                    output = model.predict(x, begin, trainer.run.prompts([texts[position]]), plan.guidance)
                mean = step("cps", x, output, begin, end, parameterization=model.parameterization, noise_level=0.8,
                            x_next=examples.x_next[row, number][None]).mean.double()  # fmt: skip
                std = transition("cps", begin, end, 0.8).std
                found.append(-((examples.x_next[row, number][None] - mean) ** 2).mean() / (2 * std**2))
            assert side.gain[position].item() == pytest.approx((found[0] - found[1]).item(), rel=1e-3, abs=1e-6)


def test_a_nudge_raises_the_reward_of_the_winner_and_of_no_other(stepwise):
    plain, nudged = (stepwise("tailorpo_g", siblings={"nudge": n}) for n in (0.0, 1.0))
    before, after = (trainer.algorithm.sample(0).rollout for trainer in (plain, nudged))
    best = plain.algorithm.source.total(before.rewards)[:, 0].argmax(1)
    moved = (before.children[:, 0] != after.children[:, 0]).flatten(2).any(2)
    assert torch.equal(moved, torch.nn.functional.one_hot(best, 3).bool())
    model, plan = plain.model, plain.algorithm.source._plan(0)
    conditioning = plain.run.prompts([p.text for p in plain.algorithm.source.collector.prompts_of(0)])
    scores = []
    for paths in (before, after):
        x = paths.children[torch.arange(2), 0, best]
        with torch.no_grad():
            output = model.predict(x, plan.levels[2], conditioning, plan.guidance)
            scores.append(red(model.decode(to_x0(model.parameterization, x, output, plan.levels[2])), None, None))
    assert (scores[1] > scores[0]).all()
    assert torch.equal(after.x[:, 1], after.children[torch.arange(2), 0, best]), "the path goes on from it"


def test_whole_paths_have_the_label_of_their_images_at_every_step(stepwise):
    trainer = stepwise("d3po")
    batch = collect(trainer)
    examples, buffer = batch.ranked, batch.rollout.buffer
    rewards = buffer.rewards["red"][buffer.leaves].view(2, 3)
    assert examples.step.tolist() == [0, 1, 2] * 2
    for number, group in enumerate((0, 0, 0, 1, 1, 1)):
        index = int(examples.step[number])
        for side, leaf in enumerate((rewards[group].argmax(), rewards[group].argmin())):
            own = torch.tensor([3 * group + int(leaf)])
            assert torch.equal(examples.x[number, side], buffer.x[buffer.nodes(own, index)][0])
            assert torch.equal(examples.x_next[number, side], buffer.x[buffer.nodes(own, index + 1)][0])


@pytest.mark.parametrize("preset", ["spo", "d3po"])
def test_a_run_that_resumes_within_an_iteration_is_the_run(stepwise, preset, monkeypatch):
    changes = {"updates_per_rollout": 2, "max_train_steps": 4, "num_groups": 2}
    assert_resumes_within_an_iteration(partial(stepwise, preset, **changes), monkeypatch)


def test_a_reward_that_fails_on_children_costs_their_pairs_only(stepwise):
    def partly(images, prompts, metadata):
        found = images.mean((1, 2, 3))
        found[0] = torch.nan
        return found

    trainer = stepwise(rewards=partly, max_unscored=0.5)
    with pytest.warns(UserWarning, match="failed on"):
        batch = collect(trainer)
    assert 0 < batch.metrics["unscored"] < 0.5
    assert batch.metrics["pairs"] == 4
    assert batch.ranked.label.isfinite().all()


@pytest.mark.parametrize("preset", ["spo", "d3po"])
def test_a_reward_of_weight_zero_costs_no_pair_where_it_fails(stepwise, preset, monkeypatch):
    monkeypatch.setattr("diffalign.rewards.novelty.nearest_distance", lambda vectors, _: vectors[:, 0] * torch.nan)
    alone, both = (
        collect(stepwise(preset, rewards=rewards))
        for rewards in ({"brightness": 1.0}, {"brightness": 1.0, "novelty": 0.0})
    )
    assert torch.equal(alone.ranked.x_next, both.ranked.x_next)
    assert both.metrics["unscored"] == 0


def test_a_gap_keeps_fewer_pairs_and_all_pairs_are_more(stepwise):
    data = PreferenceDataConfig(rollouts=Pairing(rule="all"))
    assert collect(stepwise(data=data)).metrics["pairs"] == 2 * 2 * 3
    data = PreferenceDataConfig(rollouts=Pairing(min_gap=1e9))
    batch = collect(stepwise(data=data))
    assert batch.metrics["pairs"] == 0
    assert batch.ranked.weight.tolist() == [0.0]


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("spo", {"pairs": "images"}, "siblings.first_step, siblings.preset: read only with pairs: siblings"),
        ("spo", {"loss": "kto"}, "wants a loss of pairs, as spo, tailorpo or d3po, got 'kto'"),
        ("spo", {"loss": "dpo"}, "the beta of 'dpo' is one for denoising errors.*give beta"),
        ("spo", {"plan": PlanConfig("ode", num_steps=4)}, "has none: use plan.preset flow_grpo"),
        ("spo", {"siblings": {"first_step": 3}}, "from siblings.first_step 3 on, and plan 'flow_grpo' of 4 steps has"),
        ("spo", {"siblings": {"survivor": "best"}}, "siblings.survivor must be random or winner, got 'best'"),
        ("spo", {"plan": PlanConfig("flow_grpo", num_steps=4, branch=(3,))}, "reads chains only"),
        ("d3po", {"siblings": {"nudge": 1.0}}, "'d3po' compares whole paths, and does not read nudge"),
        ("spo", {"save_rollouts": True}, "save_rollouts: not read where children of one state are compared"),
        ("spo", {"prompt_dropout": 0.2}, "prompt_dropout: read only with pairs: images"),
        ("tailorpo_g", {"rewards": lambda i, p, m: i.mean((1, 2, 3))}, "no gradient reaches an image through it"),
    ],
)
def test_what_cannot_be_compared_is_refused(stepwise, preset, changes, message):
    with pytest.raises(ValueError, match=message):
        stepwise(preset, **changes)


def test_siblings_want_a_known_preset_and_their_own_mode(stepwise):
    with pytest.raises(ValueError, match="'spo' compares sampling steps: set pairs: siblings, or use another loss"):
        DiffusionDPOConfig(model=str(PIPELINE), train_data=("pairs.parquet",), loss="spo").validate()
    trainer = stepwise("spo")
    with pytest.raises(ValueError, match=r"siblings.preset 'spin' is unknown: use one of spo, tailorpo, tailorpo_g"):
        replace(trainer.args, siblings=SiblingsConfig("spin")).validate()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["spo", "tailorpo", "d3po"])
def test_two_processes_do_what_one_does(tmp_path, preset):
    alone, both = (finished(count, tmp_path / str(count), write, preset) for count in (1, 2))
    one, first, second = map(load_file, (alone / "0.safetensors", both / "0.safetensors", both / "1.safetensors"))
    assert (one.pop("world"), first.pop("world"), second.pop("world")) == (1, 2, 2)
    torch.testing.assert_close(torch.cat([first.pop("x"), second.pop("x")]), one.pop("x"), rtol=0, atol=1e-5)
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), f"the processes disagree on {name}"
        assert (first[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert sum(tensor.norm() for tensor in one.values()) > 0
    logs = [[row for row in MetricsLog.read(folder / "run/metrics.jsonl") if "loss" in row] for folder in (alone, both)]
    for single, double in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "pairs", "reward/mean"):
            assert double[name] == pytest.approx(single[name], rel=5e-3), name
    assert logs[1][0]["grad_norm"] == pytest.approx(logs[0][0]["grad_norm"], rel=1e-5)
