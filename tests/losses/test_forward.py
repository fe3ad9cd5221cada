"""Estimators of the log-likelihood, and what holds for all forward objectives."""

import math

import pytest
import torch

from diffalign.losses.forward import ESTIMATORS, anchor_weight, check_options
from diffalign.losses.registry import FORWARD_OBJECTIVES, get_forward_objective
from diffalign.structures import Level
from tests.losses.conftest import draw
from tests.losses.forward_steps import (
    KINDS,
    SHAPE,
    error,
    gradient,
    make_step,
    predicting,
    same_as_finite_differences,
)

# Of flow models, by their formulas: d = |v - u|^2, X = |x0_hat - x0|^2, a = mean |x0_hat - x0|, a constant.
FORMULAS = {
    "uniform": lambda d, X, a, t: -d,
    "t": lambda d, X, a, t: -t * d,
    "t2": lambda d, X, a, t: -X,
    "adaptive": lambda d, X, a, t: -X / a,
    "adaptive_output": lambda d, X, a, t: -d / (a / t),
    "exact": lambda d, X, a, t: -d * (1 - t) / (t + 1e-3),
    "huber": lambda d, X, a, t: -((d + 1e-10).sqrt() - 1e-5) * t,
    "ghuber": lambda d, X, a, t: -((d + 1e-10) ** 0.25 - 1e-10**0.25) * t / 0.25,
}


def completed(step, name):
    """The step with the group means that an objective needs, of its two halves."""
    objective = FORWARD_OBJECTIVES[name]
    if not objective.wants("statistic", objective.resolve({})):
        return step
    values = objective.statistic(step, **objective.resolve({}))
    halves = values.unflatten(0, (2, -1)).mean(1, keepdim=True).expand(2, 3, values.shape[1])
    return type(step)(**{**vars(step), "group_mean": halves.flatten(0, 1)})


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_its_formula_and_has_its_gradient(name):
    step = make_step(estimator=name)
    t, (_, _, weight) = step.level.sigma, error(step.output.detach(), step)

    def frozen(v):
        d, X, _ = error(v, step)
        return FORMULAS[name](d, X, weight, t)

    torch.testing.assert_close(step.log_p, frozen(step.output))
    assert same_as_finite_differences(step.log_p, frozen, step.output)


def test_anchors_are_weighted_by_the_variance_of_the_sde_or_not_at_all():
    level = Level(*(torch.tensor(x, dtype=torch.float64) for x in ([0.8, 0.5, 0.0], [0.2, 0.5, 1.0], [200, 500, 1000])))
    assert torch.equal(anchor_weight("uniform", level), torch.ones(3, dtype=torch.float64))
    std = torch.tensor([0.7 * (0.2 / 0.8) ** 0.5, 0.7, 0.7 * (1 / 0.01) ** 0.5], dtype=torch.float64)
    torch.testing.assert_close(anchor_weight("elbo", level), 1 / (2 * std**2))


@pytest.mark.parametrize("name", ["t2", "adaptive", "exact"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_estimators_in_x0_agree_for_models_of_every_kind(name, kind):
    x0_hat = draw(7, *SHAPE)
    found = []
    for one in ("flow", kind):
        output, target, level = predicting(one, x0_hat)
        step = make_step(one, estimator=name)
        found.append(type(step)(**{**vars(step), "output": output, "target": target, "level": level}).log_p)
    if name == "exact":  # its 1e-3 is in units of the level, so equal as well
        assert (found[0] < 0).all()
    torch.testing.assert_close(found[0], found[1])


def test_uniform_is_the_own_error_of_each_kind():
    for kind in KINDS:
        step = make_step(kind)
        torch.testing.assert_close(step.log_p, -(step.output - step.target).square().mean((1, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORWARD_OBJECTIVES)
def test_losses_are_per_sample_and_metrics_are_detached_scalars(name, kind):
    objective = FORWARD_OBJECTIVES[name]
    step = completed(make_step(kind, moved=0.02, estimator="adaptive"), name)
    losses, metrics = objective.function(step, **objective.resolve({}))
    assert losses.shape == (6,)
    assert losses.isfinite().all()
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert gradient(losses, step.output).isfinite().all()


@pytest.mark.parametrize("name", [name for name, one in FORWARD_OBJECTIVES.items() if one.linear])
def test_an_advantage_of_zero_gives_nothing_where_the_registry_says_so(name):
    objective = FORWARD_OBJECTIVES[name]
    step = completed(make_step(estimator="adaptive"), name)
    losses, _ = objective.function(step, **objective.resolve({}))
    assert losses[4] == 0
    assert not gradient(losses, step.output)[4].any()


@pytest.mark.parametrize("name", [name for name, one in FORWARD_OBJECTIVES.items() if not one.linear])
def test_an_advantage_of_zero_pulls_elsewhere(name):
    objective = FORWARD_OBJECTIVES[name]
    step = completed(make_step(estimator="adaptive"), name)
    assert gradient(objective.function(step, **objective.resolve({}))[0], step.output)[4].any()


@pytest.mark.parametrize("name", FORWARD_OBJECTIVES)
def test_an_objective_runs_without_the_outputs_that_it_does_not_declare(name):
    objective, options = FORWARD_OBJECTIVES[name], FORWARD_OBJECTIVES[name].resolve({})
    step = completed(make_step(estimator="adaptive"), name)
    missing = {} if objective.wants("old", options) else {"old": None}
    missing |= {} if objective.reference else {"reference": None}
    objective.function(type(step)(**{**vars(step), **missing}), **options)
    if objective.wants("old", options):
        with pytest.raises(ValueError, match="old"):
            objective.function(type(step)(**{**vars(step), "old": None}), **options)


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown gamma; this objective has beta"):
        get_forward_objective("nft").resolve({"gamma": 1.0})
    resolved = get_forward_objective("dgpo").resolve({"beta": 3.0})
    assert resolved == {"beta": 3.0, "clip_range": math.inf, "lagged_reference": 0.0}


REFUSED = {
    "nft": {"beta": 0.0},
    "awm": {"sum_first": 0.5},
    "v_grpo": {"clip_range": 0.0},
    "dgpo": {"lagged_reference": 2.0},
    "crd": {"bce": 0.5},
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_an_objective_refuses_are_found_before_a_run(name):
    objective = FORWARD_OBJECTIVES[name]
    with pytest.raises(ValueError, match=f"objective_options.*{next(iter(REFUSED[name]))}"):
        check_options(objective, objective.resolve(REFUSED[name]))


def test_every_objective_passes_its_own_check():
    for objective in FORWARD_OBJECTIVES.values():
        check_options(objective, objective.resolve({}))


@pytest.mark.parametrize("name", ["awm", "v_grpo"])
def test_the_ratio_of_a_mean_log_likelihood(name):
    """Two images at three times: the surrogate of exp(mean_k E - mean_k E_old), with its gradient in float64."""
    objective, clip_range = FORWARD_OBJECTIVES[name], 0.01
    step = make_step(estimator="adaptive", moved=0.05)
    log_rho = (step.log_p - step.old_log_p).unflatten(0, (2, 3)).mean(1)
    advantage = torch.tensor([1.5, -0.7], dtype=torch.float64)
    ratio = log_rho.exp()
    expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))

    options = objective.resolve({"sum_first": 1.0, "clip_range": clip_range})
    step = type(step)(**{**vars(step), "advantage": advantage.repeat_interleave(3)})
    mean = objective.statistic(step, **options).unflatten(0, (2, 3)).mean(1).repeat_interleave(3, 0)
    losses, _ = objective.function(type(step)(**{**vars(step), "group_mean": mean}), **options)
    torch.testing.assert_close(losses.unflatten(0, (2, 3)).mean(1), expected)
    torch.testing.assert_close(gradient(losses / 3, step.output), gradient(expected, step.output))
    apart, _ = objective.function(step, **objective.resolve({"clip_range": clip_range}))
    assert not torch.allclose(apart.unflatten(0, (2, 3)).mean(1), expected)
    with pytest.raises(ValueError, match="sum_first needs means over times"):
        objective.function(step, **options)


def test_code_is_an_objective(tmp_path):
    (tmp_path / "own.py").write_text(
        "def matching(step, *, scale=2.0):\n    return -scale * step.advantage * step.log_p, {}\n"
        "def wrong(reward):\n    return reward\n"
    )
    own = get_forward_objective(f"{tmp_path}/own.py:matching", allow_code=True)
    step = make_step()
    torch.testing.assert_close(own.function(step, **own.resolve({}))[0], -2 * step.advantage * step.log_p)
    with pytest.raises(ValueError, match="write it as"):
        get_forward_objective(f"{tmp_path}/own.py:wrong", allow_code=True)
    with pytest.raises(ValueError, match="unknown forward objective 'nfd'; use one of awm"):
        get_forward_objective("nfd")


def test_levels_may_be_one_for_all():
    step = make_step()
    one = type(step)(**{**vars(step), "level": step.level[2]})
    assert one.log_p.shape == (6,)
    assert torch.isfinite(FORWARD_OBJECTIVES["nft"].function(one)[0]).all()
