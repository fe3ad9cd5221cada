"""DiffusionNFT against its equations."""

import pytest
import torch

from diffalign.losses.nft import nft, optimality
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


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_the_loss_and_its_gradient_are_the_papers(beta):
    step = make_step()
    v0, v_old = step.output.detach(), step.old
    r = (step.advantage / 10 + 0.5).clamp(0, 1)

    def branches(v):
        return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v

    weights = [error(branch, step)[2] for branch in branches(v0)]

    def frozen(v):
        plus, minus = (error(branch, step)[1] / w for branch, w in zip(branches(v), weights, strict=True))
        return 5 * (r * plus + (1 - r) * minus) / beta

    losses, _ = nft(step, beta=beta)
    torch.testing.assert_close(losses, frozen(step.output))
    assert same_as_finite_differences(losses, frozen, step.output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_at_the_old_weights_the_gradient_is_that_of_adaptive_matching(beta, kind):
    """A times the gradient of |x0_hat - x0|^2 / w, for every beta."""
    step = make_step(kind, moved=0.0, estimator="adaptive")
    found = gradient(nft(step, beta=beta)[0], step.output)
    torch.testing.assert_close(found, gradient(-step.advantage * step.log_p, step.output))
    assert found.any()


def test_optimality_is_a_probability():
    advantage = torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 7.0])
    assert optimality(advantage, 5.0).tolist() == [0, 0, 0.5, 0.75, 1, 1]


def test_models_of_every_kind_that_predict_the_same_x0_have_the_same_loss():
    found = []
    for kind in KINDS:
        output, target, level = predicting(kind, draw(7, *SHAPE))
        old, _, _ = predicting(kind, draw(8, *SHAPE))
        step = make_step(kind)
        fields = {**vars(step), "output": output, "old": old, "target": target, "level": level}
        found.append(nft(type(step)(**fields), beta=0.5)[0])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
