"""Likelihoods of paired comparisons: closed forms, sums, limits and gradients, in float64."""

import math

import pytest
import torch

from diffalign.losses.paired_comparison import TIE_MODELS, bradley_terry, comparison_loss, davidson, rao_kupper

MARGINS = torch.linspace(-6, 6, 25, dtype=torch.float64)
TIE = torch.tensor(0.3, dtype=torch.float64)


@pytest.mark.parametrize("model", TIE_MODELS.values())
def test_the_three_outcomes_sum_to_one_and_are_symmetric(model):
    first, tie, second = model(MARGINS, TIE)
    torch.testing.assert_close(first.exp() + tie.exp() + second.exp(), torch.ones_like(first), rtol=0, atol=1e-14)
    torch.testing.assert_close(first, second.flip(0), rtol=1e-12, atol=1e-12)
    assert tie.argmax() == len(MARGINS) // 2


def test_closed_forms():
    m, theta, nu = 0.7, 1 + math.exp(0.3), math.exp(0.3)  # softplus(0.3) is log(1 + e^0.3)
    a, b = math.exp(m), 1.0
    first, tie, second = (x.item() for x in rao_kupper(torch.tensor([m], dtype=torch.float64), TIE))
    assert first == pytest.approx(math.log(a / (a + theta * b)), abs=1e-14)
    assert second == pytest.approx(math.log(b / (b + theta * a)), abs=1e-14)
    assert tie == pytest.approx(math.log((theta**2 - 1) * a * b / (a + theta * b) / (b + theta * a)), abs=1e-14)
    first, tie, second = (x.item() for x in davidson(torch.tensor([m], dtype=torch.float64), TIE))
    total = a + b + nu * math.sqrt(a * b)
    expected = [math.log(x / total) for x in (a, nu * math.sqrt(a * b), b)]
    assert [first, tie, second] == pytest.approx(expected, abs=1e-14)
    assert bradley_terry(torch.tensor([m], dtype=torch.float64), torch.tensor([0.25])).item() == pytest.approx(
        -0.25 * math.log(a / (a + b)) - 0.75 * math.log(b / (a + b)), abs=1e-14
    )


@pytest.mark.parametrize("model", TIE_MODELS)
def test_without_ties_the_models_are_bradley_terry(model):
    label = torch.tensor([0.0, 1.0]).double().repeat(13)[:25]
    never = torch.tensor(-40.0, dtype=torch.float64)
    torch.testing.assert_close(comparison_loss(MARGINS, label, model, never), bradley_terry(MARGINS, label))


@pytest.mark.parametrize("model", ["soft", *TIE_MODELS])
@pytest.mark.parametrize("label", [0.0, 0.3, 0.5, 1.0])
def test_gradients_agree_with_finite_differences(model, label):
    margin, tie = MARGINS.clone().requires_grad_(), TIE.clone().requires_grad_()
    labels = torch.full_like(MARGINS, label)
    torch.autograd.gradcheck(lambda m, t: comparison_loss(m, labels, model, t), (margin, tie))
    swapped = comparison_loss(-margin, 1 - labels, model, tie)
    torch.testing.assert_close(comparison_loss(margin, labels, model, tie), swapped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", ["soft", *TIE_MODELS])
def test_large_margins_stay_finite_and_a_label_between_is_a_mixture(model):
    extreme = torch.tensor([-1e4, 1e4, 0.0])
    for label in (0.0, 0.5, 1.0):
        assert comparison_loss(extreme, torch.full((3,), label), model, TIE).isfinite().all()
    one, tie = (comparison_loss(MARGINS, torch.full_like(MARGINS, y), model, TIE) for y in (1.0, 0.5))
    between = comparison_loss(MARGINS, torch.full_like(MARGINS, 0.8), model, TIE)
    torch.testing.assert_close(between, 0.6 * one + 0.4 * tie)
    assert comparison_loss(MARGINS.half(), torch.full((25,), 0.5), model, TIE).dtype == torch.float32
