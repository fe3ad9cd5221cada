"""Training times, shared noise and lag schedules in closed form."""

import numpy as np
import pytest
import torch

from diffalign.diffusion.plan import PlanConfig
from diffalign.models.weights import POLICY
from diffalign.rng import KeyedRNG
from diffalign.trainers.forward_rl.copies import weight_sets
from diffalign.trainers.forward_rl.lag import LAGS, Lag, LagConfig
from diffalign.trainers.forward_rl.presets import PRESETS
from diffalign.trainers.forward_rl.times import TrainingTimes, strata
from tests.phases import collect
from tests.trainers.made_forward_rl import EPSILON, config, trainer_of

RNG = KeyedRNG(0)
KEYS = [(0, group, sample) for group in range(40) for sample in range(4)]


def times_of(model, tmp_path, **changes):
    args = config(tmp_path, **({"plan": PlanConfig("ode", num_steps=14)} | changes))
    args.validate()
    levels = model.levels(args.plan.num_steps)
    return TrainingTimes(args.method, args.times_per_image, args.grid_steps, levels, model)


@pytest.mark.parametrize(("first", "last", "count"), [(1, 12, 6), (1, 13, 6), (0, 7, 7), (3, 50, 11)])
def test_strata_cover_every_index_once(first, last, count):
    covered = [index for low, high in strata(first, last, count) for index in range(low, high)]
    assert covered == list(range(first, last))
    assert all(high > low for low, high in strata(first, last, count))


def test_too_many_strata_are_refused():
    with pytest.raises(ValueError, match="3 steps do not fill 4 strata"):
        strata(1, 4, 4)


def test_a_permuted_grid_holds_each_of_its_times_once(frozen, tmp_path):
    drawn = times_of(frozen, tmp_path, num_times=0).draw(RNG, KEYS)
    assert torch.equal(drawn.sort(1).values, torch.arange(14).expand(160, 14))
    assert len(torch.unique(drawn, dim=0)) > 100
    few = times_of(frozen, tmp_path, num_times=-1, time_fraction=0.5).draw(RNG, KEYS)
    assert few.shape == (160, 6)
    assert few.max() == 6


@pytest.mark.parametrize("times", ["stratified", "stratified_with_first", "stratified_all"])
def test_there_is_one_index_in_each_stratum(times, frozen, tmp_path):
    made = times_of(frozen, tmp_path, times=times, num_times=6, time_fraction=0.9)
    drawn = made.draw(RNG, KEYS)
    parts = {
        "stratified": strata(1, 12, 6),
        "stratified_with_first": [(0, 1), *strata(1, 12, 5)],
        "stratified_all": strata(0, 12, 6),
    }[times]
    for column, (low, high) in zip(drawn.T, parts, strict=True):
        assert set(column.tolist()) == set(range(low, high))
    levels = made.level(drawn[:, 0])
    assert torch.equal(levels.sigma, frozen.levels(14).sigma[drawn[:, 0]])


def test_continuous_times_lie_one_in_each_stratum(frozen, tmp_path):
    made = times_of(frozen, tmp_path, times="uniform", num_times=5, time_min=0.2)
    drawn = made.draw(RNG, KEYS).sort(1).values
    edges = torch.linspace(0.2, 1, 6, dtype=torch.float64)
    assert ((drawn >= edges[:-1]) & (drawn <= edges[1:])).all()
    shifted = times_of(frozen, tmp_path, times="uniform", num_times=5, time_min=0.2, time_shift=3.0)
    torch.testing.assert_close(shifted.draw(RNG, KEYS).sort(1).values, 3 * drawn / (1 + 2 * drawn))
    torch.testing.assert_close(made.level(drawn[:, 0]).sigma, drawn[:, 0])


def test_logit_normal_times_have_their_quantiles(frozen, tmp_path):
    made = times_of(frozen, tmp_path, times="logit_normal", num_times=200, time_mean=0.5, time_std=0.7)
    drawn = made.draw(RNG, [(0,)])[0].numpy()
    logits = np.log(drawn / (1 - drawn))
    assert logits.mean() == pytest.approx(0.5, abs=0.02)
    assert logits.std() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_draws_levels_of_both_families(preset, frozen, tmp_path):
    from diffalign import load_model

    for model in (frozen, load_model(EPSILON)):
        made = times_of(model, tmp_path, preset=preset, num_times=4)
        level = made.level(made.draw(RNG, KEYS)[:, 1])
        assert ((level.sigma > 0) & (level.sigma <= 1)).all()


@pytest.mark.parametrize("share", ["image", "group", "iteration"])
def test_times_are_shared_as_asked(share, tmp_path):
    trainer = trainer_of(config(tmp_path, share_times=share, num_groups=6, plan=PlanConfig("ode", num_steps=8)))
    batch = collect(trainer)
    found = trainer.algorithm._times(batch, 0)
    distinct = {"image": 12, "group": 6, "iteration": 1}[share]
    assert len(torch.unique(found, dim=0)) == distinct
    assert not torch.equal(found, trainer.algorithm._times(batch, 1))


@pytest.mark.parametrize("share", ["image", "group"])
def test_noise_is_shared_as_asked_and_fresh_at_each_time(share, tmp_path):
    trainer = trainer_of(config(tmp_path, share_noise=share, train_times_per_forward=2))
    batch = collect(trainer)
    (minibatch,) = trainer.algorithm.minibatches(batch, 0)
    data, rows = minibatch.micros[0].data, torch.arange(4)
    noise = trainer.algorithm._noise(data, rows, 0)[0].noise.unflatten(0, (2, 2, 2))  # time, group, image
    assert torch.equal(noise[:, :, 0], noise[:, :, 1]) == (share == "group")
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[:, 0], noise[:, 1])
    alone = trainer.algorithm._noise(data, rows[2:], 0)[0].noise.unflatten(0, (2, 2))  # as another process has it
    assert torch.equal(noise[:, 1], alone)


def test_lags_are_the_published_functions_of_the_step():
    closed = {
        "type0": lambda s: 0.0,
        "type1": lambda s: min(0.001 * s, 0.5),
        "type2": lambda s: 0.0 if s < 75 else min(0.0075 * (s - 75), 0.999),
        "type3": lambda s: 0.0 if s < 10 else min(0.01 * (s - 10), 0.5),
        "linear": lambda s: min(0.3, 0.001 * s),
        "crd_old": lambda s: min(0.25 + 0.005 * s, 0.999),
        "constant": lambda s: 0.9,
    }
    for name, function in closed.items():
        for step in (0, 1, 9, 10, 60, 74, 75, 76, 209, 300, 5000):
            assert LAGS[name].decay(step) == pytest.approx(function(step)), (name, step)
    assert LagConfig("type1", slope=0.01).resolve("current").decay(20) == pytest.approx(0.2)
    assert LagConfig().resolve("type1") == LAGS["type1"]
    with pytest.raises(ValueError, match="unknown lag 'type9'"):
        LagConfig("type9").resolve("current")


def test_a_copy_that_never_lags_is_the_policy():
    lags = {"sample": LAGS["type1"], "old": LAGS["type1"], "ema": LAGS["linear"]}
    assert weight_sets(lags, 1) == {"sample": "lagged_sample", "old": "lagged_sample", "ema": "lagged_ema"}
    assert weight_sets({"sample": Lag(), "old": Lag()}, 1) == {"sample": POLICY, "old": POLICY}
    # Of two updates, the second compares with the weights from before the first.
    assert weight_sets({"old": Lag()}, 2) == {"old": "lagged_old"}
    assert weight_sets({"old": Lag(every="step")}, 2) == {"old": POLICY}
