"""Calibration of a judge of pairs."""

import numpy as np
import pytest

from diffalign.evaluation.calibration import calibration_error, reliability


def test_bins_by_hand():
    probability, label = np.array([0.95, 0.05, 0.55, 0.45, 1.0]), np.array([1.0, 1.0, 1.0, 0.5, 1.0])
    bins = reliability(probability, label)
    assert [one.pairs for one in bins] == [2, 0, 0, 0, 3]
    assert (bins[0].confidence, bins[0].accuracy) == pytest.approx((0.55, 0.75))
    assert (bins[4].confidence, bins[4].accuracy) == pytest.approx((2.9 / 3, 2 / 3))
    assert calibration_error(bins) == pytest.approx((2 * 0.2 + 3 * 0.3) / 5)
    assert np.isnan(bins[1].accuracy)


def test_a_judge_that_is_as_often_right_as_it_says_has_no_error():
    rng = np.random.default_rng(0)
    probability = rng.uniform(0, 1, 200_000)
    right = (rng.uniform(0, 1, 200_000) < probability).astype(float)
    assert calibration_error(reliability(probability, right)) < 0.01
    assert calibration_error(reliability(probability, 1 - right)) > 0.3


def test_no_pairs_have_no_error_and_lengths_must_agree():
    assert np.isnan(calibration_error(reliability(np.array([]), np.array([]))))
    with pytest.raises(ValueError, match="2 probabilities for 1 labels"):
        reliability(np.array([0.5, 0.5]), np.array([1.0]))
