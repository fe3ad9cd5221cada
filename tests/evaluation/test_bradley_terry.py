"""Strengths of models from comparisons, against closed forms and direct maximisation."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from diffalign.evaluation.bradley_terry import CENTRE, PRIOR, elo, information, strengths


def test_two_models_have_the_odds_of_their_games():
    found = strengths(np.array([[0, 3000], [1000, 0]]))
    assert found[0] - found[1] == pytest.approx(math.log(3), rel=1e-3)
    assert found.sum() == pytest.approx(0)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_maximum_of_the_posterior(seed):
    wins = np.random.default_rng(seed).integers(0, 9, (5, 5)).astype(float)
    np.fill_diagonal(wins, 0)

    def loss(s):
        return (wins * np.log1p(np.exp(s[None, :] - s[:, None]))).sum() + PRIOR / 2 * (s**2).sum()

    best = minimize(loss, np.zeros(5), tol=1e-12).x
    assert np.allclose(strengths(wins), best - best.mean(), atol=1e-4)


def test_a_model_that_never_lost_is_finite_and_best():
    found = strengths(np.array([[0, 500, 500], [0, 0, 250], [0, 250, 0]]))
    assert np.isfinite(found).all()
    assert found[0] > found[1] == pytest.approx(found[2])


def test_information_is_large_where_little_is_known_and_the_order_is_open():
    wins = np.array([[0, 50, 40, 0], [50, 0, 40, 0], [2, 2, 0, 0], [0, 0, 0, 0]], float)
    gain = information(wins)
    assert np.allclose(gain, gain.T)
    assert gain[0, 3] > gain[0, 1]  # nothing is known about the last model
    assert gain[0, 1] > 100 * gain[0, 2] > 0  # which lost clearly


def test_elo_is_centred_and_narrows_with_answers():
    game = np.array([[0, 1.0], [0, 0]])
    few = elo(np.stack([game] * 9 + [game.T] * 3))
    many = elo(np.stack([game] * 90 + [game.T] * 30))
    assert sum(mid for mid, _, _ in few) == pytest.approx(2 * CENTRE)
    assert many[0][0] - many[1][0] == pytest.approx(400 * math.log10(3), rel=0.02)
    assert few[0][1] < few[0][0] < few[0][2]
    assert many[0][2] - many[0][1] < few[0][2] - few[0][1]
