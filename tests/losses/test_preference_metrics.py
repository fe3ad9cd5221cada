import math

import numpy as np
import pytest
import torch

from diffalign.losses.diffusion_dpo import dpo_logit
from diffalign.losses.errors import Denoised, DenoisedPair
from diffalign.losses.options import clamp_margin
from diffalign.losses.preference_metrics import preference_metrics

POSITION = torch.tensor([0.05, 0.95, 0.3, 1.0], dtype=torch.float64)


def with_margins(*margins):
    """Winners whose error the policy lowers by these amounts from 9, and losers that stay."""
    start = torch.full((len(margins), 1, 1, 1), 3.0)
    output = (9 - torch.tensor(margins)).sqrt().reshape(start.shape).requires_grad_()
    zero = torch.zeros_like(start)
    return DenoisedPair(Denoised(output, zero, start), Denoised(start.clone().requires_grad_(), zero, start))


def test_ties_count_half():
    metrics = preference_metrics(with_margins(1.0, 0.0, -1.0, 0.0, 2.0), beta=1.0, position=torch.tensor(0.5))
    assert float(metrics["accuracy"]) == pytest.approx((2 + 2 * 0.5) / 5)
    assert float(metrics["negative_margins"]) == pytest.approx(1 / 5)
    assert float(metrics["margin"]) == pytest.approx(2 / 5, abs=1e-6)


def test_metrics_equal_their_definitions(make_pair):
    pair = make_pair()
    metrics = {name: float(value) for name, value in preference_metrics(pair, beta=3.0, position=POSITION).items()}
    logit = dpo_logit(pair, 3.0).detach().numpy()
    expected = {
        "margin": (2 * logit / 3).mean(),
        "winner_error": pair.winner.error.mean().item(),
        "loser_error": pair.loser.error.mean().item(),
        "winner_gain": (pair.winner.reference_error - pair.winner.error).mean().item(),
        "loser_gain": (pair.loser.reference_error - pair.loser.error).mean().item(),
        "logit_size": abs(logit).mean(),
        "logit_std": logit.std(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["margin"] == pytest.approx(metrics["winner_gain"] - metrics["loser_gain"])


def test_margins_fall_into_the_bins_of_their_levels(make_pair):
    pair = make_pair()
    margin = pair.margin.detach().numpy()
    metrics = preference_metrics(pair, beta=1.0, position=POSITION, bins=4)
    parts, shares = ([float(metrics[f"{kind}_bin/{k}"]) for k in range(4)] for kind in ("margin", "share"))
    assert shares == [0.25, 0.25, 0.0, 0.5]
    np.testing.assert_allclose(parts, [margin[0] / 4, margin[2] / 4, 0, (margin[1] + margin[3]) / 4])
    assert sum(parts) == pytest.approx(float(metrics["margin"]))
    one = preference_metrics(pair, beta=1.0, position=torch.tensor(0.6), bins=2)
    assert (one["share_bin/0"], one["share_bin/1"]) == (0, 1)
    with pytest.raises(ValueError, match="at least 1"):
        preference_metrics(pair, beta=1.0, position=POSITION, bins=0)


def test_a_level_below_the_edge_of_a_bin_is_not_rounded_over_it():
    position = torch.tensor([0.5 - 1e-12], dtype=torch.float64)
    assert preference_metrics(with_margins(1.0), beta=1.0, position=position, bins=2)["share_bin/0"] == 1


def test_means_of_micro_batches_are_those_of_the_batch(make_pair):
    pair = make_pair()
    whole = preference_metrics(pair, beta=2.0, position=POSITION)
    rows = [
        preference_metrics(
            DenoisedPair(*(Denoised(*(getattr(s, n)[i : i + 1] for n in ("output", "target", "reference")))
                   for s in (pair.winner, pair.loser))), beta=2.0, position=POSITION[i : i + 1]
        )
        for i in range(4)
    ]  # fmt: skip
    for name in whole.keys() - {"logit_std"}:
        mean = torch.stack([row[name].double() for row in rows]).mean()
        torch.testing.assert_close(mean, whole[name].double(), rtol=1e-6, atol=1e-12)


def test_metrics_ignore_the_bound_of_the_margin(make_pair):
    pair = make_pair()
    bounded = preference_metrics(clamp_margin(pair, 1e-3), beta=2.0, position=POSITION)
    for name, value in preference_metrics(pair, beta=2.0, position=POSITION).items():
        assert torch.equal(bounded[name], value)


def test_without_a_reference_errors_are_compared_with_each_other(make_pair):
    pair = make_pair(reference=False)
    metrics = preference_metrics(pair, beta=2.0, position=POSITION)
    gap = (pair.loser.error - pair.winner.error).detach()
    torch.testing.assert_close(metrics["margin"], gap.mean())
    assert float(metrics["accuracy"]) == float((gap > 0).double().mean())
    assert float(metrics["logit_size"]) == pytest.approx(float(gap.abs().mean()))
    assert "winner_gain" not in metrics


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_metrics_are_numbers_without_a_gradient(make_pair, dtype):
    for value in preference_metrics(make_pair(dtype=dtype), beta=torch.tensor(2.0), position=POSITION).values():
        assert value.shape == ()
        assert not value.requires_grad
        assert value.dtype in (torch.float32, torch.float64)
        assert math.isfinite(value)
