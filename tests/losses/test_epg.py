"""EPG, PEPG and PAR: three losses of one family, in closed form."""

import pytest
import torch

from diffalign.losses.awm import awm
from diffalign.losses.epg import epg
from diffalign.losses.par import par
from diffalign.losses.pepg import pepg
from tests.losses.forward_steps import KINDS, gradient, make_step, same_as_finite_differences

WEIGHTS = {
    epg: lambda a, log_rho: log_rho.exp() * a,
    pepg: lambda a, log_rho: log_rho.exp() * (a - log_rho),
    par: lambda a, log_rho: log_rho.exp() * (a - log_rho),
}


@pytest.mark.parametrize("estimator", ["uniform", "t2", "exact"])
@pytest.mark.parametrize("function", WEIGHTS, ids=lambda f: f.__name__)
def test_the_gradient_is_a_constant_times_that_of_the_elbo(function, estimator):
    step = make_step(estimator=estimator)
    constant = WEIGHTS[function](step.advantage, (step.log_p - step.old_log_p).detach())

    def frozen(v):
        return -constant * type(step)(**{**vars(step), "output": v}).log_p

    losses, _ = function(step)
    assert same_as_finite_differences(losses, frozen, step.output)
    torch.testing.assert_close(gradient(losses, step.output), gradient(-constant * step.log_p, step.output))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_par_and_pepg_have_one_gradient(kind, ratio):
    step = make_step(kind, estimator="adaptive")
    first, second = (gradient(function(step, ratio=ratio)[0], step.output) for function in (par, pepg))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_par_is_half_the_squared_residual():
    step = make_step(estimator="t2")
    log_rho = (step.log_p - step.old_log_p).detach()
    torch.testing.assert_close(par(step)[0].detach(), log_rho.exp() * (step.advantage - log_rho) ** 2 / 2)
    torch.testing.assert_close(par(step, ratio=0.0)[0].detach(), (step.advantage - log_rho) ** 2 / 2)


def test_pepg_differs_from_epg_by_the_proximal_term():
    step = make_step(estimator="adaptive")
    log_rho = (step.log_p - step.old_log_p).detach()
    torch.testing.assert_close(pepg(step)[0] - epg(step)[0], log_rho.exp() * log_rho * step.log_p)


def test_on_policy_epg_is_grpo():
    step = make_step(moved=0.0, estimator="adaptive")
    found = [gradient(function(step)[0], step.output) for function in (epg, awm, pepg)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_without_a_ratio_the_weight_is_the_advantage():
    step = make_step(estimator="adaptive")
    found = gradient(epg(step, ratio=0.0)[0], step.output)
    torch.testing.assert_close(found, gradient(-step.advantage * step.log_p, step.output))
