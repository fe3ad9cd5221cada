"""CRD in closed form."""

import pytest
import torch

from diffalign.losses.crd import crd, group_statistic
from tests.losses.forward_steps import gradient, make_step, same_as_finite_differences


def with_means(step):
    """The step with means over two groups of three."""
    values = group_statistic(step).unflatten(0, (2, 3)).mean(1, keepdim=True)
    return type(step)(**{**vars(step), "group_mean": values.expand(2, 3, 2).flatten(0, 1)})


def test_the_loss_and_its_gradient_are_the_papers():
    step, beta = with_means(make_step(estimator="adaptive_output")), 0.7

    def own(v):
        e = v - step.target
        return -e.square().mean((1, 2, 3)) / (step.output.detach() - step.target).abs().mean((1, 2, 3))

    old = step.old - step.target
    r_old = -old.square().mean((1, 2, 3)) / old.abs().mean((1, 2, 3))
    centre = (own(step.output.detach()) - r_old).unflatten(0, (2, 3)).mean(1).repeat_interleave(3)
    a = step.advantage - step.advantage.unflatten(0, (2, 3)).mean(1).repeat_interleave(3)

    def frozen(v):
        return (beta * (own(v) - r_old - centre) - a) ** 2

    losses, _ = crd(step, beta=beta)
    torch.testing.assert_close(losses, frozen(step.output))
    assert same_as_finite_differences(losses, frozen, step.output)


def test_at_the_old_weights_the_gradient_is_that_of_centred_advantages():
    step = with_means(make_step(moved=0.0, estimator="adaptive_output"))
    centred = step.advantage - step.group_mean[:, 1]
    found = gradient(crd(step, beta=0.5)[0], step.output)
    torch.testing.assert_close(found, gradient(-2 * 0.5 * centred * step.log_p, step.output))


def test_missing_means_are_named():
    with pytest.raises(ValueError, match="means over groups"):
        crd(make_step())
