"""Forward-process RL: it learns, it is exact, and nothing runs that has no weight."""

import pytest
import torch

from diffalign.diffusion.plan import PlanConfig
from diffalign.runtime.tracking import MetricsLog
from diffalign.trainers.forward_rl.lag import LagConfig
from diffalign.trainers.forward_rl.presets import PRESETS
from tests.phases import collect
from tests.reliability.compare import same_checkpoint
from tests.trainers.made_forward_rl import EPSILON, config, gradient, redness, stir, trainer_of


def rows(folder):
    return [row for row in MetricsLog.read(folder / "metrics.jsonl") if "loss" in row]


def close(one, two):
    return (one - two).norm() <= 1e-5 * one.norm() and one.norm() > 0


# It learns ----------------------------------------------------------------------------------------------------------

PIPELINES = {"flow": {}, "epsilon": {"model": str(EPSILON), "max_sequence_length": None}}


@pytest.mark.parametrize("kind", ["flow", pytest.param("epsilon", marks=pytest.mark.slow)])
def test_it_learns_a_reward_in_a_few_steps(kind, tmp_path):
    """The iterations draw the same six prompts, so that their rewards can be compared."""
    options = {"num_groups": 6, "group_size": 4, "rollout_batch_size": 24, "train_batch_size": 24, "num_times": 2}
    args = config(tmp_path, max_train_steps=8, learning_rate=5e-3, **(options | PIPELINES[kind]))
    trainer_of(args).train()
    found = [row["reward/mean"] for row in rows(args.output_dir)]
    spread = rows(args.output_dir)[0]["reward/std"]
    assert found[-1] - found[0] > 0.25 * spread, found


# Exactness ----------------------------------------------------------------------------------------------------------


CUT = {preset: (preset, {}) for preset in PRESETS} | {
    "a ratio per image": ("awm", {"objective_options": {"sum_first": 1.0}, "advantage_scale": 1.0}),
    "groups against lagged weights": ("dgpo", {"objective_options": {"lagged_reference": 1.0}}),
}


@pytest.mark.parametrize("name", CUT)
def test_neither_images_nor_train_times_per_forward_change_gradients(name, tmp_path):
    """Passes of 3 images cut groups, so that sums over groups take passes of their own; so do means over times."""
    found, (preset, changes) = [], CUT[name]
    for size, times in ((4, 1), (3, 1), (4, 2), (1, 2)):
        changes |= {"num_times": 2, "train_batch_size": size, "train_times_per_forward": times}
        args = config(tmp_path, preset, **changes)
        trainer = trainer_of(args)
        batch = collect(trainer)
        stir(trainer)
        found.append(gradient(trainer, batch))
    assert all(close(found[0], other) for other in found[1:])


def test_a_pass_that_holds_whole_groups_finds_the_sums_of_a_first_pass(tmp_path):
    trainer = trainer_of(config(tmp_path, "dgpo", train_batch_size=2))
    assert not trainer.algorithm.needs.first_pass
    trainer.args.train_batch_size = 3  # as after a lack of memory
    assert trainer.algorithm.needs.first_pass


def test_the_first_loss_is_exactly_on_policy(tmp_path):
    for preset, name, value in (("nft", "drift", 0.0), ("pepg", "ratio_mean", 1.0), ("crd", "implicit_reward", 0.0)):
        trainer = trainer_of(config(tmp_path, preset))
        (minibatch,) = trainer.algorithm.minibatches(collect(trainer), 0)
        for micro in minibatch.micros:
            assert trainer.algorithm.loss(micro)[1][name].item() == value


def test_the_gradient_of_nft_at_the_old_weights_is_that_of_adaptive_awm(tmp_path):
    """For every beta, through the whole trainer."""
    common = {"num_times": 2, "reference_weight": 0.0, "advantage_scale": 1.0}
    expected = gradient(trainer_of(config(tmp_path, "epg", advantage_std="global", **common)))
    for beta in (0.1, 3.0):
        found = gradient(trainer_of(config(tmp_path, objective_options={"beta": beta}, **common)))
        assert close(expected, found)


def test_only_leaves_are_stored_whatever_the_plan(tmp_path):
    trainer = trainer_of(config(tmp_path, plan=PlanConfig("flow_grpo", num_steps=4)))
    batch = collect(trainer)
    assert len(batch.buffer.x) == 4
    assert batch.buffer.leaf.all()
    assert gradient(trainer, batch).norm() > 0


# Resuming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["nft", "dgpo", "awm"])
def test_a_run_resumes_bit_for_bit(preset, tmp_path):
    options = {"max_train_steps": 3, "checkpointing_steps": 2}
    if preset != "awm":
        options["old_lag"] = LagConfig("constant", offset=0.5)
    whole = config(tmp_path / "whole", preset, **options)
    trainer_of(whole).train()
    part = config(tmp_path / "part", preset, **options)
    part.resume_from_checkpoint = str(whole.output_dir / "checkpoint-2")
    trainer_of(part).train()
    same_checkpoint(whole.output_dir / "checkpoint-3", part.output_dir / "checkpoint-3")


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_iteration_goes_on_with_its_rollout(stop, tmp_path, monkeypatch):
    """Between two updates the rollout and the copies come from the checkpoint: the policy has moved."""
    lag = LagConfig("constant", offset=0.5)
    options = {"updates_per_rollout": 2, "max_train_steps": 4, "old_lag": lag, "sample_lag": lag}
    whole, part = config(tmp_path / "whole", **options), config(tmp_path / "part", **options)
    trainer_of(whole).train()
    trainer = trainer_of(part)
    on_step = trainer.algorithm.on_step

    def stopping(batch, metrics):
        on_step(batch, metrics)
        trainer.run.heartbeat.signals.received = 15 if trainer.run.progress.step == stop else None
        trainer.loop.stop_agreed = trainer.run.progress.step == stop

    monkeypatch.setattr(trainer.algorithm, "on_step", stopping)
    with pytest.raises(SystemExit):
        trainer.train()
    part.resume_from_checkpoint = "latest"
    trainer_of(part).train()
    same_checkpoint(whole.output_dir / "checkpoint-4", part.output_dir / "checkpoint-4")


# Lagged copies ------------------------------------------------------------------------------------------------------


def test_copies_after_steps_have_their_closed_form(tmp_path):
    """copy_s = d_s copy + (1 - d_s) theta_s, after each iteration; roles of one lag share a copy."""
    lag = LagConfig("type1", slope=0.1)
    trainer = trainer_of(config(tmp_path, sample_lag=lag, old_lag=lag, max_train_steps=3))
    copies = trainer.algorithm.copies
    assert copies.sets == {"sample": "lagged_sample", "old": "lagged_sample"}
    expected, seen = [p.detach().clone() for p in trainer.loop.state.parameters], []
    on_step = trainer.algorithm.on_step

    def noting(batch, metrics):
        on_step(batch, metrics)
        decay = 0.1 * trainer.run.progress.step
        for own, parameter in zip(expected, trainer.loop.state.parameters, strict=True):
            own.copy_(decay * own + (1 - decay) * parameter.detach())
        seen.append(metrics["decay/sample"])

    trainer.algorithm.on_step = noting
    trainer.train()
    assert seen == pytest.approx([0.1, 0.2, 0.3])
    for own, shadow in zip(expected, copies.copies["lagged_sample"].shadow, strict=True):
        torch.testing.assert_close(own, shadow)


def test_images_are_drawn_with_the_lagged_weights(tmp_path):
    trainer = trainer_of(config(tmp_path))
    before = collect(trainer).buffer.x
    stir(trainer)
    assert torch.equal(collect(trainer).buffer.x, before)
    current = trainer_of(config(tmp_path, "awm"))
    stir(current)
    assert not torch.equal(collect(current).buffer.x, before)


# Advantages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["positive", "negative", "one", "binary"])
def test_modes_choose_advantages(mode, tmp_path):
    whole = collect(trainer_of(config(tmp_path, "awm", advantage_scale=1.0))).buffer.advantage
    trainer = trainer_of(config(tmp_path, "awm", advantage_mode=mode, advantage_scale=0.5))
    found = collect(trainer).buffer.advantage
    expected = {
        "positive": whole.clamp(min=0),
        "negative": whole.clamp(max=0),
        "one": (whole > 0).float(),
        "binary": whole.sign(),
    }
    assert torch.equal(found, expected[mode] * 0.5)


def test_good_images_that_differ_from_their_group_count_more(tmp_path):
    changes = {"preset": "nft", "group_size": 3, "rollout_batch_size": 6, "advantage_std": "unit"}
    rewards = {"brightness": 1.0, "novelty": 0.0}
    plain, shaped = (
        collect(trainer_of(config(tmp_path, **changes, advantage_diversity=name, advantage_scale=9.0), reward=rewards))
        for name in ("", "novelty")
    )
    before, after = (batch.buffer.advantage[batch.buffer.leaves].view(2, 3) for batch in (plain, shaped))
    novelty = shaped.buffer.rewards["novelty"][shaped.buffer.leaves].view(2, 3)
    share = novelty / novelty.mean(1, keepdim=True)
    torch.testing.assert_close(after, torch.where(before > 0, before * share, before))
    assert (share[before > 0] != 1).all()
    with pytest.raises(ValueError, match="advantage_diversity 'novelty' is none of the rewards redness"):
        trainer_of(config(tmp_path, advantage_diversity="novelty"))


def test_images_without_advantage_are_skipped_where_they_have_no_gradient(tmp_path):
    anchors = {"reference_weight": 0.0, "ema_weight": 0.0}
    options = {"advantage_mode": "positive", "num_times": 2, **anchors}
    trainer = trainer_of(config(tmp_path, "awm", **options))
    batch = collect(trainer)
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    assert sum(len(micro.rows) for micro in minibatch.micros) == 2 * 2
    assert minibatch.metrics == {"kept_fraction": 0.5}
    few = gradient(trainer, batch)
    trainer.args.filter_zero_advantage = False
    assert close(gradient(trainer, batch), few)
    (minibatch,) = trainer_of(config(tmp_path, "nft", advantage_mode="positive")).algorithm.minibatches(batch, 0)
    assert sum(len(micro.rows) for micro in minibatch.micros) == 4 * 3


def test_a_failed_image_trains_nothing(tmp_path):
    def nearly(images, *_):
        found = redness(images)
        found[0] = torch.nan
        return found

    args = config(tmp_path, "awm", group_size=3, rollout_batch_size=6, max_unscored=0.5, num_groups=1)
    batch = collect(trainer_of(args, nearly))
    assert batch.buffer.advantage[0] == 0
    assert batch.buffer.advantage[1:].all()


def test_an_anchor_grows_with_the_advantage(tmp_path):
    """With low + (high - low) r, r = clip(A / (2 A_max) + 1/2, 0, 1) of the advantage before it is scaled."""
    options = {"reference_weight": 0.5, "reference_weight_min": 0.1, "advantage_scale": 0.1, "advantage_clip": 2.0}
    trainer = trainer_of(config(tmp_path, **options))
    weight = trainer.algorithm._reference_weight(torch.tensor([-1.0, -0.2, 0.0, 0.05, 0.2]))
    torch.testing.assert_close(weight, torch.tensor([0.1, 0.1, 0.3, 0.35, 0.5]))

    gradients, batch = [], collect(trainer)
    stir(trainer)
    for low, high in ((0.1, 0.5), (0.1, 0.1), (0.5, 0.5)):
        trainer.args.reference_weight, trainer.args.reference_weight_min = high, low
        trainer.algorithm.method = trainer.args.method
        gradients.append(gradient(trainer, batch))
    found = (gradients[0] - gradients[1]).norm() / (gradients[2] - gradients[1]).norm()
    assert 0.3 < found < 0.9, "between the two"


def test_a_weighted_anchor_adds_its_weighted_distance(tmp_path):
    """With advantages of zero, the gradient is the anchor's alone, and both weightings differ in it."""
    found = {}
    for kind in ("uniform", "elbo"):
        options = {"reference_weight": 2.0, "anchor_weighting": kind, "max_train_steps": 1, "num_times": 1}
        trainer = trainer_of(
            config(tmp_path / kind, "awm", ema_weight=0.0, **options), reward=lambda x, *_: x[:, 0, 0, 0]
        )
        batch = collect(trainer, 0)
        batch.buffer.advantage = torch.zeros_like(batch.buffer.advantage)
        for parameter in trainer.loop.state.parameters:  # away from the reference
            torch.nn.init.normal_(parameter.data, std=0.05, generator=torch.Generator().manual_seed(0))
        found[kind] = gradient(trainer, batch)
    assert found["uniform"].norm() > 0
    cosine = torch.cosine_similarity(found["uniform"], found["elbo"], 0)
    assert 0 < cosine < 0.9999
