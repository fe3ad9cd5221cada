"""V-GRPO: a tight clip, or a bounded advantage."""

import math

import torch

from diffalign.losses.awm import awm
from diffalign.losses.v_grpo import v_grpo
from tests.losses.forward_steps import gradient, make_step


def test_it_is_the_clipped_surrogate_of_the_published_range():
    step = make_step(moved=0.5, estimator="adaptive")
    torch.testing.assert_close(v_grpo(step)[0], awm(step, clip_range=0.03)[0])
    assert v_grpo(step)[1]["clip_share"] > 0


def test_eta_bounds_the_advantage():
    step = make_step(moved=0.0, estimator="adaptive")
    bounded = 0.5 * (step.advantage / 0.5).tanh()
    losses, _ = v_grpo(step, clip_range=math.inf, eta=0.5)
    torch.testing.assert_close(gradient(losses, step.output), gradient(-bounded * step.log_p, step.output))
    assert bounded.abs().max() <= 0.5
