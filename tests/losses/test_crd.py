"""CRD in closed form."""

import pytest
import torch

from diffalign.losses.crd import crd, group_statistic
from diffalign.losses.forward import log_ratio
from tests.losses.forward_steps import gradient, make_step, same_as_finite_differences


def with_means(step, **options):
    """The step with means over two groups of three."""
    values = group_statistic(step, **options).unflatten(0, (2, 3)).mean(1, keepdim=True)
    return type(step)(**{**vars(step), "group_mean": values.expand(2, 3, -1).flatten(0, 1)})


def softmax_centres(step, temperature):
    """Centres (r, A) of both directions, by softmax within each group of three."""
    r, a = (x.detach().double().unflatten(0, (2, 3)) for x in (log_ratio(step), step.advantage))
    found = []
    for sign in (1, -1):
        if temperature:
            weight = (sign * a / temperature).softmax(1)
        else:
            of_sign = a.where(sign * a > 0, -torch.inf)
            weight = torch.where((sign * a > 0).any(1, keepdim=True), of_sign.softmax(1), torch.full_like(a, 1 / 3))
        found.append([(weight * x).sum(1).repeat_interleave(3) for x in (r, a)])
    return found


def both_signs(step):
    """Advantages of either sign in the first group, of one in the second."""
    advantage = torch.tensor([1.5, -0.5, 0.25, 0.5, 2.0, 1.0], dtype=step.advantage.dtype)
    return type(step)(**{**vars(step), "advantage": advantage})


@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("bce", [0.0, 1.0])
def test_softmax_weights_average_the_losses_of_both_directions(temperature, bce):
    options = {"beta": 0.7, "weight_temp": temperature, "bce": bce}
    step = with_means(both_signs(make_step(estimator="adaptive_output")), **options)
    wanted = 0
    for r_centre, a_centre in softmax_centres(step, temperature):
        implicit, a = 0.7 * (log_ratio(step) - r_centre), step.advantage.double() - a_centre
        p, q = a.sigmoid(), implicit.sigmoid()
        wanted = wanted + (-(p * q.log() + (1 - p) * (1 - q).log()) if bce else (implicit - a) ** 2) / 2
    losses, _ = crd(step, **options)
    torch.testing.assert_close(losses, wanted)
    torch.testing.assert_close(gradient(losses, step.output), gradient(wanted, step.output))


def test_a_high_temperature_is_uniform():
    step = both_signs(make_step(estimator="adaptive_output"))
    uniform = crd(with_means(step))[0]
    torch.testing.assert_close(crd(with_means(step, weight_temp=1e9), weight_temp=1e9)[0], uniform)


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_extreme_advantages_stay_finite(temperature):
    step = both_signs(make_step(estimator="adaptive_output"))
    step = type(step)(**{**vars(step), "advantage": step.advantage * 1e6})
    assert crd(with_means(step, weight_temp=temperature), weight_temp=temperature)[0].isfinite().all()


def test_cross_entropy_has_the_gradient_of_the_difference_of_sigmoids():
    step = with_means(make_step(estimator="adaptive_output"), bce=1.0)
    r, mean = log_ratio(step), step.group_mean.double()
    p = (step.advantage.double() - mean[:, 1]).sigmoid()
    weight = 0.7 * ((0.7 * (r - mean[:, 0])).sigmoid() - p).detach()
    found = gradient(crd(step, beta=0.7, bce=1.0)[0], step.output)
    torch.testing.assert_close(found, gradient(weight * r, step.output))


def test_another_value_of_bce_is_refused():
    with pytest.raises(ValueError, match="bce must be 0"):
        crd(with_means(make_step()), bce=0.5)


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
