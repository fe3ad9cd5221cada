"""Figures from answers."""

import json

import pytest

from diffalign.commands.label.statistics import DATA_LABEL, summarise, to_markdown
from tests.commands.label.world import answer, comparison

MODELS = [("a", "b"), ("b", "c"), ("a", "c")]


def pairs_of(count, **more):
    return [comparison(i, MODELS[i % 3], **more) for i in range(count)]


def test_models_are_ranked_and_compared():
    pairs = pairs_of(30)
    answers = [answer(i, "second" if i % 6 else "first", models=pairs[i].models) for i in range(30)]
    found = summarise(pairs, answers)
    assert list(found["models"]) == ["c", "b", "a"]
    assert found["models"]["c"]["low"] < found["models"]["c"]["elo"] < found["models"]["c"]["high"]
    assert sum(own["elo"] for own in found["models"].values()) == pytest.approx(3000)
    assert found["win_rates"]["b over a"]["rate"] == pytest.approx(0.5)
    assert found["win_rates"]["c over b"] | {"low": 1, "high": 1} == {
        "rate": 1, "low": 1, "high": 1, "wins": 10, "ties": 0, "losses": 0
    }  # fmt: skip


def test_the_order_of_the_images_does_not_matter_to_models():
    answers = [
        answer(0, "first", models=("a", "b")),
        answer(1, "second", models=("b", "a")),
        answer(2, models=("b", "b")),
    ]
    found = summarise(pairs_of(3), answers)
    assert found["win_rates"] == {"b over a": {"rate": 0, "low": 0, "high": 0, "wins": 0, "ties": 0, "losses": 2}}


def test_skipped_pairs_count_for_nothing_but_the_rater():
    found = summarise(pairs_of(3), [answer(0, "skip", models=("a", "b"))])
    assert found["answers"] == found["choices"]["skip"] == found["raters"]["Ada"]["answers"] == 1
    assert found["models"] == found["win_rates"] == found["agreement_with_rewards"] == {}


def test_agreement_of_raters():
    pairs = pairs_of(4)
    ours, theirs = ("first", "first", "second", "equal"), ("first", "first", "second", "bad")
    answers = [answer(i, choice) for i, choice in enumerate(ours)]
    answers += [answer(i, choice, rater="Bob") for i, choice in enumerate(theirs)] + [answer(0, rater="bob ".strip())]
    found = summarise(pairs, answers)["agreement_of_raters"]
    assert (found["alpha"], found["pairs"]) == (1, 4)
    assert found["kappa"] == {"Ada and Bob": {"kappa": 1, "pairs": 4}}


def test_agreement_with_rewards_and_with_labels_of_the_data():
    scores = {"good": (1.0, 0.0), "bad": (0.0, 1.0), "blind": (2.0, 2.0), "failed": (None, 1.0)}
    pairs = pairs_of(8, scores=scores, label=0.0)
    found = summarise(pairs, [answer(i) for i in range(8)] + [answer(7, "equal", rater="Bob")])[
        "agreement_with_rewards"
    ]
    rates = {name: own["rate"] for name, own in found.items()}
    assert rates == {DATA_LABEL: 0, "good": 1, "bad": 0, "blind": 0.5}


def test_a_habit_of_sides_and_the_time_show():
    answers = [answer(i, "first", left=0, seconds=i) for i in range(4)] + [answer(4, "second", left=0, seconds=50)]
    assert summarise(pairs_of(5), answers)["raters"] == {"Ada": {"answers": 5, "median_seconds": 2, "left": 0.8}}


def test_the_report_has_every_table_and_is_json_too():
    scores = {"good": (1.0, 0.0)}
    pairs = pairs_of(6, scores=scores)
    answers = [answer(i, models=pairs[i].models, rater=rater) for i in range(6) for rater in ("Ada", "B|<b>")]
    found = summarise(pairs, answers)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = to_markdown(found)
    for part in (
        "12 answers about 6 of 6 pairs: first 12",
        "| model |",
        "| a |",
        "b over a",
        "Cohen's kappa",
        "| good |",
    ):
        assert part in text
    assert "<b>" not in text
    assert "| first" not in text
