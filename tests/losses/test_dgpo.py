"""DGPO in closed form."""

import math

import pytest
import torch

from diffalign.losses.awm import awm
from diffalign.losses.dgpo import dgpo, group_statistic
from tests.losses.forward_steps import KINDS, error, gradient, make_step, same_as_finite_differences


def with_means(step, **options):
    """The step with means over two groups of three."""
    values = group_statistic(step, **options).unflatten(0, (2, 3)).mean(1, keepdim=True)
    return type(step)(**{**vars(step), "group_mean": values.expand(2, 3, 1).flatten(0, 1)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [10.0, 100.0])
def test_it_starts_at_half_of_awm(kind, beta):
    step = with_means(make_step(kind, moved=0.0, lag=0.0), beta=beta)
    losses, metrics = dgpo(step, beta=beta)
    assert metrics["sigmoid"] == 0.5
    torch.testing.assert_close(gradient(losses, step.output), gradient(awm(step)[0], step.output) / 2)


def test_the_statistic_and_the_loss_are_the_papers():
    beta, step = 30.0, make_step()
    own, base = (error(v, step)[0] for v in (step.output, step.reference))
    s = (step.advantage * beta * (own - base)).unflatten(0, (2, 3)).sum(1) / 3
    weight = s.repeat_interleave(3).sigmoid().detach()
    ready = with_means(step, beta=beta)
    losses, _ = dgpo(ready, beta=beta)
    torch.testing.assert_close(losses, weight * step.advantage * own)
    assert same_as_finite_differences(losses, lambda v: weight * step.advantage * error(v, step)[0], step.output)


def test_a_group_that_has_improved_weighs_less():
    step = make_step(moved=0.0, lag=0.0)
    way = step.advantage.sign().view(-1, 1, 1, 1) * 0.1 * (step.target - step.reference)
    better = type(step)(**{**vars(step), "output": step.reference + way})
    assert (with_means(better).group_mean < 0).all()


def test_clipped_samples_have_no_gradient():
    step = with_means(make_step(moved=0.5))
    rho = (step.log_p - step.old_log_p).exp()
    c = 0.01
    stopped = ((step.advantage > 0) & (rho > 1 + c)) | ((step.advantage <= 0) & (rho < 1 - c))
    losses, metrics = dgpo(step, clip_range=c)
    found = gradient(losses, step.output).flatten(1).any(1)
    assert found.tolist() == (~stopped & (step.advantage != 0)).tolist()
    assert metrics["clip_share"] == stopped.double().mean()
    torch.testing.assert_close(losses, dgpo(step, clip_range=math.inf)[0])
    assert 0 < stopped.sum() < 6


def test_missing_sums_are_named():
    with pytest.raises(ValueError, match="sums over groups"):
        dgpo(make_step())
