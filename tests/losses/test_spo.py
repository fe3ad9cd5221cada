"""Losses of sampling steps against closed forms in one dimension, float64."""

import math

import pytest
import torch

from diffalign.losses.d3po import d3po
from diffalign.losses.errors import Denoised, DenoisedPair
from diffalign.losses.spo import spo
from diffalign.losses.tailorpo import tailorpo

STD, BETA = 0.3, 7.0
# Means under policy and reference, and where the step ended, of a winner and a loser.
MEAN, REFERENCE, WINNER, LOSER = 0.21, 0.2, 0.45, -0.1


def pair_of(mean, reference=REFERENCE, winner=WINNER, loser=LOSER):
    """One-dimensional steps of two siblings as denoised latents: see ``step_pairs``."""

    def side(end):
        def scaled(value):
            tensor = torch.as_tensor(value, dtype=torch.float64)
            return (tensor / (math.sqrt(2) * STD)).reshape(1, 1, 1, 1)

        return Denoised(scaled(mean), scaled(end), scaled(reference))

    return DenoisedPair(side(winner), side(loser))


def log_ratio(mean, end, reference=REFERENCE):
    return ((end - reference) ** 2 - (end - mean) ** 2) / (2 * STD**2)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize("loss", [spo, d3po, tailorpo])
def test_a_step_near_its_reference_has_the_loss_and_gradient_of_the_paper(loss):
    mean = torch.tensor(MEAN, dtype=torch.float64, requires_grad=True)
    value = loss(pair_of(mean), beta=BETA)
    z = BETA * (log_ratio(MEAN, WINNER) - log_ratio(MEAN, LOSER))
    assert value.item() == pytest.approx(math.log1p(math.exp(-z)), rel=1e-12)
    # d log p / d mean = (end - mean) / std^2, and the mean cancels between siblings.
    value.backward()
    assert mean.grad.item() == pytest.approx(-sigmoid(-z) * BETA * (WINNER - LOSER) / STD**2, rel=1e-12)
    assert mean.grad < 0, "descent moves the mean towards the winner"


def test_ratios_out_of_range_have_no_gradient():
    far = 0.6
    inside = [abs(math.exp(log_ratio(far, end)) - 1) < 0.1 for end in (WINNER, LOSER)]
    assert inside == [False, False]
    mean = torch.tensor(far, dtype=torch.float64, requires_grad=True)
    clipped = BETA * (math.log(1.1) - math.log(0.9))
    for loss in (spo, d3po):
        value = loss(pair_of(mean), beta=BETA)
        assert value.item() == pytest.approx(math.log1p(math.exp(-clipped)), rel=1e-12)
        (gradient,) = torch.autograd.grad(value, mean)
        assert gradient == 0
    (gradient,) = torch.autograd.grad(tailorpo(pair_of(mean), beta=BETA), mean)
    assert gradient < 0


def test_steps_of_two_paths_can_have_the_wrong_sign_and_siblings_cannot():
    """D3PO's winner may end nearer to its mean than the loser to its own: raising the margin lowers the winner."""
    step, reference = 1e-3, 0.0
    mean = torch.tensor(reference, dtype=torch.float64, requires_grad=True)
    # Other states: the winner ended above its mean by a little, the loser by a lot.
    (gradient,) = torch.autograd.grad(d3po(pair_of(mean, reference, 0.05, 0.4), beta=BETA), mean)
    moved = reference - step * gradient.sign().item()
    assert log_ratio(moved, 0.05, reference) < 0, "the winner's density falls"
    for winner, loser in ((0.3, -0.2), (-0.1, 0.4)):
        (gradient,) = torch.autograd.grad(tailorpo(pair_of(mean, reference, winner, loser), beta=BETA), mean)
        assert gradient.sign() == math.copysign(1, loser - winner)


def test_soft_labels_and_a_bad_clip_range():
    soft = tailorpo(pair_of(MEAN), beta=BETA, label=torch.tensor([0.7]))
    z = BETA * (log_ratio(MEAN, WINNER) - log_ratio(MEAN, LOSER))
    assert soft.item() == pytest.approx(0.7 * math.log1p(math.exp(-z)) + 0.3 * math.log1p(math.exp(z)), rel=1e-6)
    for clip in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=r"clip must be in \(0, 1\)"):
            spo(pair_of(MEAN), beta=BETA, clip=clip)
