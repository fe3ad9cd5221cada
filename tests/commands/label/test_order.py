"""Which pair comes next."""

import math
import random

import numpy as np
import pytest

from diffalign.commands.label.order import ORDERS, count_wins, disagreement
from diffalign.evaluation.bradley_terry import strengths
from tests.commands.label.world import answer, comparison


def sequence(order, count, rater="Ada", answers=()):
    seen = []
    for _ in range(count):
        seen.append(order.next(rater, lambda i: i not in seen, lambda: answers))
    return seen


def test_random_gives_each_rater_an_order_of_their_own_that_the_seed_repeats():
    pairs = [comparison(number) for number in range(50)]
    make = ORDERS["random"]
    ada, bob = sequence(make(pairs, 0), 50), sequence(make(pairs, 0), 50, "Bob")
    assert sorted(ada) == sorted(bob) == list(range(50))
    assert ada != bob
    assert ada == sequence(make(pairs, 0), 50) != sequence(make(pairs, 1), 50)
    assert make(pairs, 0).next("Ada", lambda i: False, list) is None


def test_disagreement_comes_first_whatever_the_units():
    gaps = {"a": [1.0, 1.0, -1.0, 0.1, None], "b": [1000.0, -1000.0, -1000.0, 100.0, 5.0]}
    found = disagreement(gaps)
    assert found[1] == max(found)
    assert found[4] == -math.inf
    assert max(found[0], found[2], found[3]) < 0.01 * found[1]
    pairs = [
        comparison(i, scores={name: (None if gap is None else gap, 0.0) for name, gap in zip("ab", both, strict=True)})
        for i, both in enumerate(zip(gaps["a"], gaps["b"], strict=True))
    ]
    assert sequence(ORDERS["disagreement"](pairs, 0), 5)[0] == 1
    assert sequence(ORDERS["disagreement"](pairs, 0), 5)[-1] == 4


def test_a_single_reward_gives_the_pairs_that_it_can_hardly_tell_apart():
    assert np.argsort(disagreement({"a": [3.0, -0.5, 1.0, None]}))[::-1].tolist() == [1, 2, 0, 3]


def test_disagreement_needs_rewards_and_ranking_needs_models():
    with pytest.raises(ValueError, match="--rewards"):
        ORDERS["disagreement"]([comparison(0)], 0)
    for models in (("", ""), ("base", "base")):
        with pytest.raises(ValueError, match="two or more models"):
            ORDERS["ranking"]([comparison(0, models=models)], 0)


MODELS = [("a", "b"), ("a", "c"), ("b", "c")]


def test_ranking_shows_the_models_whose_order_is_open():
    pairs = [comparison(i, MODELS[i % 3]) for i in range(30)]
    order = ORDERS["ranking"](pairs, 0)
    # c lost everything to a and b, which are close.
    known = [answer(i, "first", models=("a", "c")) for i in range(20)]
    known += [answer(i, "first", models=("b", "c")) for i in range(20)]
    first = sequence(order, 10, answers=known)
    assert {pairs[i].models for i in first} == {("a", "b")}
    assert sorted(sequence(order, 30, answers=known)) == list(range(30))


def test_ranking_looks_at_every_model_before_it_decides():
    pairs = [comparison(i, MODELS[i % 3]) for i in range(60)]
    order, given, seen = ORDERS["ranking"](pairs, 0), [], []
    for _ in range(3):
        seen.append(order.next("Ada", lambda i: i not in seen, lambda: given))
        given.append(answer(seen[-1], "equal", models=pairs[seen[-1]].models))
    assert {pairs[i].models for i in seen} == set(MODELS)


def test_ranking_orders_models_better_than_random_pairs():
    """Five models of known strength, 60 answers: more pairs of models are in the right order, on average."""
    names = "abcde"
    models = [(a, b) for a in names for b in names if a < b]
    pairs = [comparison(i, models[i % 10]) for i in range(600)]

    def right(name, seed):
        draw, order, given, seen = random.Random(seed), ORDERS[name](pairs, seed), [], set()
        for _ in range(60):
            index = order.next("Ada", lambda i: i not in seen, lambda: given)
            seen.add(index)
            a, b = pairs[index].models
            first = draw.random() < 1 / (1 + math.exp(0.5 * (names.index(b) - names.index(a))))
            given.append(answer(index, "first" if first else "second", models=(a, b)))
        found = strengths(count_wins(given, {name: i for i, name in enumerate(names)}))
        return np.mean([found[i] < found[j] for j in range(5) for i in range(j)])

    means = {name: np.mean([right(name, seed) for seed in range(20)]) for name in ("ranking", "random")}
    assert means["ranking"] > means["random"] + 0.02
