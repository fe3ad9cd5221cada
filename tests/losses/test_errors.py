import numpy as np
import pytest
import torch

from diffalign.losses.errors import Denoised, DenoisedPair, latent_mask


def squares(a, b):
    return (a.detach().double().numpy() - b.detach().double().numpy()) ** 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_errors_are_means_or_sums_of_squares(make_denoised, reduction):
    d = make_denoised(reduction=reduction)
    reduce = getattr(np, reduction)
    for value, other in ((d.error, d.target), (d.drift, d.reference)):
        np.testing.assert_allclose(value.detach().numpy(), reduce(squares(d.output, other), axis=(1, 2, 3)), rtol=1e-14)
    expected = reduce(squares(d.reference, d.target), axis=(1, 2, 3))
    np.testing.assert_allclose(d.reference_error.numpy(), expected, rtol=1e-14)
    torch.testing.assert_close(d.gain, d.reference_error - d.error, rtol=1e-12, atol=1e-14)


def test_only_the_policy_receives_a_gradient(make_denoised):
    d = make_denoised()
    d.target.requires_grad_()
    d.reference.requires_grad_()
    (d.gain.sum() + d.drift.sum() + d.reference_error.sum()).backward()
    assert d.target.grad is None
    assert d.reference.grad is None
    assert d.output.grad.abs().min() > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_closed_form_of_the_gradient_is_that_of_autograd(make_denoised, reduction, masked):
    mask = torch.rand(4, 1, 4, 4, dtype=torch.float64) if masked else None
    d = make_denoised(reduction=reduction, mask=mask)
    (expected,) = torch.autograd.grad(d.error.sum(), d.output)
    torch.testing.assert_close(d.error_gradient, expected, rtol=1e-13, atol=0)
    assert not d.error_gradient.requires_grad
    (of_gain,) = torch.autograd.grad(d.gain.sum(), d.output)
    torch.testing.assert_close(of_gain, -expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_is_subtracted(make_denoised, dtype):
    d = make_denoised(dtype=dtype, moved=0.01)
    for value, a, b in ((d.error, d.output, d.target), (d.reference_error, d.reference, d.target)):
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.detach().numpy(), squares(a, b).mean((1, 2, 3)), rtol=1e-6)
    d.gain.sum().backward()
    assert d.output.grad.dtype == dtype


def test_a_gain_keeps_its_digits_where_the_policy_has_hardly_moved(make_denoised):
    d = make_denoised(moved=1e-6, dtype=torch.float32)
    exact = (squares(d.reference, d.target) - squares(d.output, d.target)).mean((1, 2, 3))
    np.testing.assert_allclose(d.gain.detach().numpy(), exact, rtol=1e-5)


def test_a_policy_that_has_not_moved_has_a_margin_of_exactly_zero(make_pair):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        pair = make_pair(moved=0.0, dtype=dtype)
        assert torch.equal(pair.margin, torch.zeros_like(pair.margin))


def test_the_margin_is_the_difference_of_gains_up_to_its_bound(make_pair):
    pair = make_pair()
    sides = [(s.reference_error - s.error).detach() for s in (pair.winner, pair.loser)]
    torch.testing.assert_close(pair.margin.detach(), sides[0] - sides[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pair.gap, pair.loser.error - pair.winner.error)
    bound = float(pair.margin.detach().mean())
    held = DenoisedPair(pair.winner, pair.loser, bound)
    torch.testing.assert_close(held.margin.detach(), pair.margin.detach().clamp(max=bound))
    (gradient,) = torch.autograd.grad(held.margin.sum(), pair.winner.output)
    assert torch.equal(gradient.flatten(1).any(1), pair.margin <= bound)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mask_of_ones_is_no_mask(make_denoised, reduction):
    d = make_denoised(reduction=reduction)
    masked = make_denoised(reduction=reduction, mask=torch.ones(4, 1, 4, 4))
    for name in ("error", "reference_error", "gain", "drift"):
        assert torch.equal(getattr(d, name), getattr(masked, name))


def test_a_masked_error_is_the_mean_over_the_weight_of_the_mask(make_denoised):
    mask = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    mask[1] = 0
    mask[1, 0, 2, 3] = 0.5
    values = squares(*(getattr(make_denoised(), n) for n in ("output", "target")))
    weights = np.broadcast_to(mask.numpy(), values.shape)
    total = (weights * values).sum((1, 2, 3))
    mean = make_denoised(mask=mask).error.detach().numpy()
    np.testing.assert_allclose(mean, total / weights.sum((1, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(mean[1], values[1, :, 2, 3].mean(), rtol=1e-14)
    np.testing.assert_allclose(make_denoised(mask=mask, reduction="sum").error.detach().numpy(), total, rtol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_mask_has_no_error_and_no_gradient(make_pair, reduction):
    mask = torch.ones(4, 1, 4, 4)
    mask[2] = 0
    pair = make_pair(mask=mask, reduction=reduction)
    assert pair.winner.error[2] == pair.margin[2] == 0
    pair.margin.sum().backward()
    assert torch.equal(pair.winner.output.grad.flatten(1).any(1), torch.tensor([True, True, False, True]))


def test_pixels_become_latent_cells_by_their_mean():
    mask = (torch.rand(2, 1, 24, 16) > 0.5).to(torch.uint8)
    cells = latent_mask(mask, (3, 2))
    assert cells.dtype == torch.float32
    np.testing.assert_allclose(cells.numpy(), mask.numpy().reshape(2, 1, 3, 8, 2, 8).mean((3, 5)), rtol=1e-6)
    assert torch.equal(latent_mask(torch.ones(1, 1, 50, 30, dtype=torch.bool), (6, 4)), torch.ones(1, 1, 6, 4))
    with pytest.raises(ValueError, match="one channel"):
        latent_mask(torch.ones(2, 24, 16), (3, 2))


def test_shapes_that_do_not_fit_are_refused(make_denoised):
    x = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match="unknown reduction 'max'; use one of mean, sum"):
        Denoised(x, x, reduction="max")
    with pytest.raises(ValueError, match="target is"):
        Denoised(x, x[:1])
    with pytest.raises(ValueError, match="reference is"):
        Denoised(x, x, x[:, :1])
    with pytest.raises(ValueError, match=r"mask is \(2, 8, 8\).*make it \(2, 1, 8, 8\)"):
        Denoised(x, x, mask=x[:, 0])
    with pytest.raises(ValueError, match="as latents are"):
        Denoised(x[0], x[0])
    with pytest.raises(ValueError, match="no reference to compare with"):
        _ = make_denoised(reference=False).gain
    with pytest.raises(ValueError, match="one shape and one reduction"):
        DenoisedPair(make_denoised(), make_denoised(reduction="sum"))
