"""RAM in closed form."""

import pytest
import torch

from diffalign.losses.ram import ram
from tests.losses.forward_steps import KINDS, gradient, make_step, same_as_finite_differences


@pytest.mark.parametrize("kind", KINDS)
def test_at_reference_and_old_the_direction_is_that_of_awm(kind):
    """-2 m A (u - v) / D, in which D is the number of elements."""
    step = make_step(kind, moved=0.0, lag=0.0)
    found = gradient(ram(step, multiplier=0.5)[0], step.output)
    a = step.advantage.view(-1, 1, 1, 1)
    torch.testing.assert_close(found, -2 * 0.5 * a * (step.target - step.output.detach()) / 48)
    torch.testing.assert_close(found, gradient(-0.5 * step.advantage * step.log_p, step.output))


def test_the_gradient_is_that_of_the_distance_from_a_constant():
    step, a = make_step(), make_step().advantage.view(-1, 1, 1, 1)
    goal = step.reference + 2.0 * a * (step.target - step.old)
    losses, _ = ram(step, multiplier=2.0)
    frozen = lambda v: (v - goal).square().mean((1, 2, 3))  # noqa: E731
    torch.testing.assert_close(losses, frozen(step.output))
    assert same_as_finite_differences(losses, frozen, step.output)


def test_without_advantage_it_pulls_to_the_reference():
    step = make_step()
    still = type(step)(**{**vars(step), "advantage": torch.zeros(6, dtype=torch.float64)})
    found = gradient(ram(still)[0], step.output)
    torch.testing.assert_close(found, 2 * (step.output.detach() - step.reference) / 48)
