from dataclasses import replace

import pytest

from diffalign.diffusion.plan import PRESETS, Plan, PlanConfig, Row, make_plan, possible_plans
from diffalign.diffusion.plan_config import TREES
from diffalign.diffusion.schedule import flow_levels, vp_levels
from tests.diffusion.grids import flow_match_euler_sigmas

LEVELS = flow_levels(flow_match_euler_sigmas(10, 3.0))
SDE, ODE = Row("flow_sde", 0.7, True), Row("ode", 0.0, False)


def test_ode_draws_no_noise_and_trains_nothing():
    plan = make_plan(PlanConfig(preset="ode", num_steps=3, ode_solver="dpmpp_2m"), 0, 0)
    assert plan == Plan((Row("dpmpp_2m", 0.0, False),) * 3)
    with pytest.raises(ValueError, match="does not read noise_level; it reads ode_solver"):
        make_plan(PlanConfig(preset="ode", noise_level=0.5), 0, 0)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"ode"}))
def test_every_preset_makes_a_valid_plan(preset):
    for iteration in (0, 1, 999):
        plan = make_plan(PlanConfig(preset, 10), iteration, seed=0, trees=True)
        plan.validate(LEVELS)
        assert len(plan) == 10
        assert plan.trained_steps
        assert 9 not in plan.trained_steps


@pytest.mark.parametrize(
    ("preset", "solver", "noise_level"),
    [("flow_grpo", "flow_sde", 0.7), ("dance_grpo", "dance_sde", 0.3), ("cps", "cps", 0.8)],
)
def test_all_steps_but_the_last(preset, solver, noise_level):
    plan = make_plan(PlanConfig(preset, 6), 3, seed=1)
    assert plan == Plan((Row(solver, noise_level, True),) * 5 + (ODE,))


def test_options_override_the_preset():
    plan = make_plan(PlanConfig("first_steps", 5, "cps", 0.5, window_size=3, ode_solver="dpmpp_2m"), 0, seed=0)
    assert plan.rows == (Row("cps", 0.5, True),) * 3 + (Row("dpmpp_2m", 0.0, False),) * 2
    assert make_plan(PlanConfig("flow_grpo", 5, "ddim"), 0, 0).rows[0].noise_level == 1.0


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"ode", *TREES, "branch_grpo"}))
def test_branch_factors_go_to_the_stochastic_steps_in_order(preset):
    for iteration in (0, 30, 999):
        plan = make_plan(PlanConfig(preset, 10, branch=(2, 3)), iteration, seed=0, trees=True)
        plan.validate(LEVELS)
        chain = make_plan(PlanConfig(preset, 10), iteration, seed=0)
        assert [row.branch for row in plan.rows if row.noise_level][:3] in ([2, 3, 1], [2, 3])
        assert tuple(replace(row, branch=1) for row in plan.rows) == chain.rows
    assert make_plan(PlanConfig(preset, 10, branch=(1, 1)), 0, 0) == make_plan(PlanConfig(preset, 10), 0, 0)


def test_more_branch_factors_than_stochastic_steps_are_refused():
    with pytest.raises(ValueError, match=r"plan\.branch has 3 factors, and the plan 2 stochastic steps"):
        make_plan(PlanConfig("first_steps", 5, branch=(2, 2, 2)), 0, 0, trees=True)


def starts(config, iterations, seed=0):
    windows = [make_plan(config, iteration, seed).trained_steps for iteration in iterations]
    for window in windows:
        assert window == tuple(range(window[0], window[0] + len(window)))
    return [window[0] for window in windows], {len(window) for window in windows}


def test_random_window_covers_its_range_and_depends_on_seed_and_iteration_alone():
    config = PlanConfig("flow_grpo_fast", 10, window_size=2, window_range=(1, 6))
    first, sizes = starts(config, range(200))
    assert sizes == {2}
    assert set(first) == {1, 2, 3, 4}
    assert min(first.count(start) for start in (1, 2, 3, 4)) > 30
    assert first == starts(config, range(200))[0]
    assert first != starts(config, range(200), seed=1)[0]


def test_random_window_defaults_to_the_first_half():
    assert set(starts(PlanConfig("flow_grpo_fast", 10), range(100))[0]) == {0, 1, 2, 3}


@pytest.mark.parametrize(("stride", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (9, [0])])
def test_sliding_window_is_always_full_and_rolls_back(stride, expected):
    config = PlanConfig("mix_grpo", 10, window_size=4, shift_every=3, window_stride=stride)
    first, sizes = starts(config, range(40))
    assert sizes == {4}
    assert first == [expected[i // 3 % len(expected)] for i in range(40)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PlanConfig("grpo"), "known: flow_grpo"),
        (PlanConfig("flow_grpo", window_size=2), "does not read window_size; it reads noise_level, solver"),
        (PlanConfig("flow_grpo_fast", shift_every=5), "does not read shift_every"),
        (PlanConfig("cps", ode_solver="dpmpp_2m"), "does not read ode_solver"),
        (PlanConfig("flow_grpo", solver="ode"), "must be stochastic"),
        (PlanConfig("flow_grpo", branch=(2,)), "this trainer reads chains only: leave plan.branch out"),
        (PlanConfig("ode", branch=(2,)), "does not read branch"),
        (PlanConfig("mix_grpo", ode_solver="cps"), "ode_solver must be"),
        (PlanConfig("mix_grpo", 4, window_size=4), "shrink it"),
        (PlanConfig("first_steps", 4, window_size=4), "last of 4 steps"),
        (PlanConfig("flow_grpo_fast", 10, window_size=3, window_range=(4, 6)), "no window of 3 steps"),
        (PlanConfig("flow_grpo_fast", 4, window_size=4, window_range=(0, 4)), "last of 4 steps"),
    ],
)
def test_degenerate_settings_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_plan(config, 0, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "mix_grpo", "shift_every": 0}, "shift_every must be at least 1"),
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"branch": (2, 0)}, r"branch\.1 must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**options)


def with_row(step, row):
    return Plan((SDE,) * step + (row,) + (SDE,) * (8 - step) + (ODE,))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (with_row(3, Row("ode", 0.0, True)), "step 3 .*'ode'.*use a stochastic solver"),
        (with_row(3, Row("dpmpp_2m", 0.0, True)), "step 3 .*use a stochastic solver"),
        (with_row(3, Row("flow_sde", 0.0, True)), "step 3 .*with a noise level"),
        (with_row(3, Row("ode", 0.0, False, branch=2)), "step 3 .*branching"),
        (with_row(3, Row("flow_sde", 0.7, True, branch=0)), "step 3 .*at least 1"),
        (with_row(3, Row("dpmpp_2m", 0.5, False)), "step 3 .*lies in"),
        (with_row(3, Row("euler", 0.0, False)), "step 3 .*known: ode, dpmpp_2m, flow_sde"),
        (Plan((SDE,) * 9 + (Row("cps", 0.8, True),)), "step 9 .*leave this step untrained"),
        (Plan((ODE,) * 10), "trains no step"),
        (Plan((SDE,) * 9), "9 steps need 10 levels, got 11"),
    ],
)
def test_a_plan_that_cannot_be_trained_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        plan.validate(LEVELS)


def test_a_flow_solver_on_other_levels_is_refused():
    levels = vp_levels([0.999 - 0.0009 * t for t in range(1000)], [900, 600, 300])
    plan = make_plan(PlanConfig("flow_grpo", 3), 0, seed=0)
    with pytest.raises(ValueError, match=r"step 0 .*use 'ddim'"):
        plan.validate(levels)
    Plan(tuple(replace(row, solver="ddim") if row.trained else row for row in plan.rows)).validate(levels)


# Trees --------------------------------------------------------------------------------------------------------------


def test_branch_grpo_splits_and_slides_its_pruning_to_the_noise():
    config = PlanConfig("branch_grpo", 20, prune_steps=(14, 18), prune_stop=11, shift_every=30)
    for iteration, low in ((0, 14), (29, 14), (30, 13), (90, 11), (999, 11)):
        plan = make_plan(config, iteration, 0, trees=True)
        assert [step for step, row in enumerate(plan.rows) if row.branch == 2] == [0, 3, 6, 9]
        assert set(range(19)) - set(plan.trained_steps) == set(range(low, low + 4))
        assert all(row.noise_level == 0.3 for row in plan.rows[:-1]), "one noise for sample and density"
    assert config.leaves == 16
    assert PlanConfig("branch_grpo", 8).leaves == 8, "0, 3 and 6: 9 is beyond"
    assert PlanConfig("branch_grpo", 8, split_steps=(1, 2), branch=(3, 2)).leaves == 6


def test_tree_rpo_s_noise_grows_over_its_window():
    plan = make_plan(PlanConfig("tree_rpo", 10, window_size=3, noise_growth=0.5), 25, 0, trees=True)
    assert [(row.noise_level, row.branch) for row in plan.rows[1:4]] == [(0.7, 2), (0.7 * 1.25, 2), (0.7 * 1.5, 2)]
    assert PlanConfig("tree_rpo", 10, window_size=3).leaves == 8


@pytest.mark.parametrize(("preset", "anchors", "leaves"), [("tempflow_branch", range(9), 6), ("g2", range(5), 24)])
def test_each_tree_of_a_trunk_branches_at_one_step(preset, anchors, leaves):
    config = PlanConfig(preset, 10)
    plan = make_plan(config, 0, 0, trees=True)
    assert plan.anchors == tuple(anchors) == plan.trained_steps
    assert config.leaves == leaves
    for sample in range(2 * len(anchors)):
        tree = plan.tree(sample)
        assert tree.trained_steps == (anchors[sample % len(anchors)],)
        assert sum(row.noise_level > 0 for row in tree.rows) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PlanConfig("branch_grpo", 8, split_steps=(0, 7)), "a factor per step, each step once, and all below 7"),
        (PlanConfig("branch_grpo", 8, split_steps=(0, 3), branch=(2,)), "a factor per step"),
        (PlanConfig("branch_grpo", 8, prune_steps=(5, 5)), "LOW below HIGH"),
        (PlanConfig("branch_grpo", 8, prune_steps=(0, 7)), "leaves no step to train"),
        (PlanConfig("g2", 8, branch=(2, 3)), "branches once: give plan.branch one number"),
        (PlanConfig("g2", 8, strides=(2, 2)), "give each stride once"),
        (PlanConfig("tempflow_branch", 8, window_range=(3, 3)), "no step to branch at"),
        (PlanConfig("tempflow_branch", 8, window_range=(3, 8)), "the last of 8 steps is not trained"),
        (PlanConfig("tempflow_branch", 8, strides=(1, 2)), "does not read strides"),
        (PlanConfig("tree_rpo", 4), "leaves no untrained last step"),
    ],
)
def test_trees_that_cannot_be_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        possible_plans(config, trees=True)


def test_trainers_of_chains_refuse_presets_of_trees():
    with pytest.raises(ValueError, match=r"plan\.preset 'g2' samples trees, and this trainer reads chains only"):
        make_plan(PlanConfig("g2", 8), 0, 0)
