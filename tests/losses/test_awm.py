"""AWM and its clipping."""

import math

import pytest
import torch

from diffalign.losses.awm import awm
from tests.losses.forward_steps import KINDS, gradient, make_step, same_as_finite_differences


@pytest.mark.parametrize("estimator", ["uniform", "ghuber"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_the_gradient_is_the_advantage_times_that_of_the_training_loss(kind, estimator):
    step = make_step(kind, moved=0.0, estimator=estimator)
    losses, metrics = awm(step)
    assert metrics["ratio_mean"] == 1
    torch.testing.assert_close(gradient(losses, step.output), gradient(-step.advantage * step.log_p, step.output))


@pytest.mark.parametrize("clip_range", [0.05, 1.0, math.inf])
def test_the_surrogate_is_clipped_on_the_side_that_the_advantage_favours(clip_range):
    step = make_step(moved=0.5, estimator="t2")
    rho = (step.log_p - step.old_log_p).exp()
    lower = [-min(a * r, a * min(max(r, 1 - clip_range), 1 + clip_range)) for a, r in
             zip(step.advantage.tolist(), rho.tolist(), strict=True)]  # fmt: skip
    losses, metrics = awm(step, clip_range=clip_range)
    torch.testing.assert_close(losses, torch.tensor(lower, dtype=torch.float64))
    assert (metrics["clip_share"] > 0) == (clip_range < 0.1)


def test_the_gradient_is_that_of_the_surrogate():
    step = make_step(estimator="t2")

    def frozen(v):
        moved = type(step)(**{**vars(step), "output": v})
        return -step.advantage * (moved.log_p - step.old_log_p).exp()

    assert same_as_finite_differences(awm(step, clip_range=math.inf)[0], frozen, step.output)
