"""The collapse alarm: it sees a fall early, says so once, stands through a resume, and is silent in healthy runs."""

import csv
import json
import random

import pytest

from diffalign.config import from_dict
from diffalign.evaluation.collapse import CollapseMonitor
from diffalign.rollout.collapse_config import CollapseConfig
from tests.conftest import ROOT

HEALTHY = ROOT / "tests/evaluation/healthy_quickstart.json"


def rows_of(rewards, **more):
    return [(i + 1, {"reward/mean": value, "time/collect": 1.0, **more}) for i, value in enumerate(rewards)]


def follow(rows, config=None, remedy="Try this."):
    """The steps of alarms, and the messages."""
    monitor, steps, said = CollapseMonitor(config or CollapseConfig(), remedy), [], []
    for step, row in rows:
        message = monitor(step, row)
        if message:
            said.append(message)
        if monitor.active:
            steps.append(step)
    return steps, said


def climb_and_fall(seed=0, noise=0.03, fall=0.006):
    """A reward that rises from 0.6 to 0.78 in 100 iterations, stands for 50, and falls."""
    rng = random.Random(seed)
    trend = [0.6 + 0.0018 * min(i, 100) - fall * max(0, i - 150) for i in range(250)]
    return [value + rng.gauss(0, noise) for value in trend]


@pytest.mark.parametrize("seed", range(5))
def test_a_fall_is_seen_while_most_of_the_gain_is_left_and_told_once(seed):
    steps, said = follow(rows_of(climb_and_fall(seed)))
    assert 150 < steps[0] < 180  # half of the gain is lost at step 165
    assert steps[-1] == 250
    assert len(said) == 1
    assert "the mean reward of 10 iterations fell from 0." in said[0]
    assert said[0].endswith("Try this.")
    assert len(said[0]) < 2000


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_noise_alone_and_a_plateau_are_no_collapse(seed, noise):
    assert follow(rows_of(climb_and_fall(seed, noise, fall=0.0)))[0] == []
    assert follow(rows_of([0.5 + random.Random(seed * 1000 + i).gauss(0, noise) for i in range(250)]))[0] == []


def test_no_alarm_in_the_quickstart():
    assert follow(rows_of(json.loads(HEALTHY.read_text())))[0] == []


@pytest.mark.parametrize("name", ["flow_grpo_shapes_seeds", "flow_grpo_shapes_long_seeds", "refl_shapes_draft_k_seeds"])
def test_no_alarm_in_evaluations_of_record(name):
    runs = {}
    for row in csv.DictReader((ROOT / f"assets/results/{name}.csv").open()):
        figures = {f"eval/{key}": float(row[key]) for key in ("accuracy", "diversity")}
        runs.setdefault(row["seed"], []).append((int(row["step"]), figures))
    assert len(runs) == 3
    assert all(follow(rows) == ([], []) for rows in runs.values())


def test_evaluations_that_fall_twice_in_a_row_are_an_alarm():
    series = [0.34, 0.5, 0.57, 0.46, 0.56, 0.46, 0.36]
    steps, said = follow([(75 * i, {"eval/accuracy": value}) for i, value in enumerate(series)])
    assert steps == [450]
    assert "held-out accuracy fell from 0.57 (step 150) to 0.36" in said[0]


def test_a_fall_of_diversity_is_an_alarm():
    series = [0.20, 0.19, 0.17, 0.15]
    steps, said = follow([(i, {"eval/diversity": value}) for i, value in enumerate(series)])
    assert steps == [3]
    assert "diversity fell from 0.2 to 0.15" in said[0]
    low = CollapseConfig(diversity=0.0)
    assert follow([(i, {"eval/diversity": value}) for i, value in enumerate(series)], low)[0] == []


def test_the_message_says_what_moved_meanwhile():
    rows = rows_of(climb_and_fall())
    for step, row in rows:
        row |= {"reference_distance": 0.001 * step, "zero_std_groups": 0.1}
    (message,) = follow(rows)[1]
    assert "reference_distance rose from 0.0055 to 0." in message
    assert "zero_std_groups" not in message


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped():
    rows = rows_of(climb_and_fall())
    whole = CollapseMonitor(CollapseConfig(), "Try this.")
    first = [(whole(step, row), whole.active) for step, row in rows][200:]
    half = CollapseMonitor(CollapseConfig(), "Try this.", [{"step": step, **row} for step, row in rows[:200]])
    assert half.message == whole.message
    assert [(half(step, row), half.active) for step, row in rows[200:]] == first


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "inf"])
def test_values_that_are_no_numbers_are_passed_over(bad):
    rewards = climb_and_fall()
    rows = rows_of(rewards)
    with_bad = [*rows[:30], (30, {"reward/mean": bad, "time/collect": 1.0, "eval/accuracy": bad}), *rows[30:]]
    assert follow(with_bad)[0] == follow(rows)[0]


def test_several_updates_on_one_rollout_count_once():
    rows = rows_of(climb_and_fall())
    doubled = [
        (2 * step - 1 + i, row if not i else {"reward/mean": row["reward/mean"]}) for step, row in rows for i in (0, 1)
    ]
    assert len(follow(doubled)[0]) == 2 * len(follow(rows)[0])


def test_options():
    rows = rows_of(climb_and_fall())
    assert follow(rows, CollapseConfig(window=0)) == ([], [])
    late, early = (follow(rows, CollapseConfig(drop=drop, significance=3.0))[0][0] for drop in (0.9, 0.25))
    assert early < late
    assert from_dict(CollapseConfig, {"window": 5}, "file").window == 5
    with pytest.raises(ValueError, match="drop"):
        from_dict(CollapseConfig, {"drop": 0.0}, "file")
